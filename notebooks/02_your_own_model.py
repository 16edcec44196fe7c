# %% [markdown]
# # Your own model
#
# A model doesn't have to come from a library. Here is a Llama from scratch: its own norm, its own rotary embedding, its own
# attention, its own `silu`, all of it plain torch. It gets tinychat's weights, goes down the same road as any checkpoint
#
# ```
# torch module ──export──▶ plain graph ──optimize──▶ serving graph ──build──▶ engine ──LLM──▶ tokens
# ```
#
# and has to say the same as tinychat's own engine, to the last digit that float32 has. No GPU, no network, about a minute.

# %%
import math

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import llmlab as ll
from llmlab.checkpoint import Checkpoint, resolve

folder = resolve("tinychat")
config = Checkpoint(folder).config
config

# %% [markdown]
# ## The model
#
# Nothing here is written with llmlab in mind. `forward` takes `input_ids` and `position_ids`, both `[batch, sequence]`, and
# returns logits; that is all that `export` asks for. There is no cache in it, no paging and no packing. The names of the
# submodules are those of the checkpoint, so that its weights find their places.

# %%
raw = config.raw
HEADS, KV_HEADS, DIM = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]


def silu(x):
    return x / (1 + torch.exp(-x))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x):
        return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + raw["rms_norm_eps"]))


def rope_tables(positions):
    """Cosines and sines [batch, 1, sequence, DIM / 2] of each position's angles."""
    powers = torch.arange(0, DIM, 2) / DIM
    angles = positions[:, None, :, None] * raw["rope_parameters"]["rope_theta"] ** -powers
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, KV_HEADS * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, DIM).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(later, -math.inf), -1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, raw["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(config.hidden_size, raw["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(raw["intermediate_size"], config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer() for _ in range(config.num_layers))
        self.norm = Norm()

    def forward(self, input_ids, position_ids):
        x, (cos, sin) = self.embed_tokens(input_ids), rope_tables(position_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x) @ self.embed_tokens.weight.T


# %%
model = Llama()
stored = {
    name.removeprefix("model."): tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
}
model.load_state_dict(stored)
sum(p.numel() for p in model.parameters())

# %% [markdown]
# ## Export: what torch wrote
#
# `export` takes the module as it takes a checkpoint. The module brings its weights, but neither a configuration nor a
# tokenizer, so both are handed over: a dictionary with Hugging Face's field names would do for the one, any folder that
# holds a `tokenizer.json` for the other.

# %%
plain = ll.export(model, config=config, tokenizer="tinychat")
plain

# %% [markdown]
# Attention, as we wrote it, is no node that anything could recognise by its name. It is these:

# %%
from collections import Counter

Counter(node.op for node in plain.nodes("layers.0.self_attn")).most_common()

# %% [markdown]
# ## Optimize: what the passes make of it
#
# No pass knows a Llama, and none looks at the names of our classes. They go by what a graph computes: a mask is evaluated to
# see that it is causal, a softmax between two products is attention however its scale is written, and keys that are repeated
# for several query heads are read once instead.

# %%
graph = ll.optimize(plain)
graph.history

# %% [markdown]
# `why` tells the story of one place. This is our attention: which passes fired there, what they took out and put in, and what
# kept the others from it.

# %%
graph.why("layers.0.self_attn")

# %% [markdown]
# And what became of the norm, five operators by hand:

# %%
graph.why("layers.0.input_layernorm")

# %% [markdown]
# What no pass knows stays as it was written, and runs right all the same: speed may suffer from an odd spelling, the result
# may not. What might mix up the tokens of different sequences is refused, with the node and the reason. Here is what is
# left of a whole layer:

# %%
graph.nodes("layers.0")

# %% [markdown]
# Where would one cut it? Between the attention nodes lie the dense layers, the same ones again and again. `cut` splits
# a graph at the nodes that a predicate picks, for runtimes that launch kernels of their own there. Of its pieces those of
# one *kind* are the same up to names and weights: all but the first layer and the last.

# %%
ll.cut(graph, at=lambda node: node.op == "PagedAttention")

# %% [markdown]
# ## Answers

# %%
llm = ll.LLM(ll.build(graph, "engines/mine", overwrite=True), max_num_seqs=8)
llm.chat([{"role": "user", "content": "How do I count to nine in French?"}])

# %% [markdown]
# ## The proof
#
# tinychat's own checkpoint, through transformers' own code, on the same road. Both engines get the same questions; the
# tokens have to be the same, and the log-probability of each, too.

# %%
from pathlib import Path

from llmlab.zoo.tasks import examples

saved = Path("engines/tinychat-graph")  # by the notebook before this one
reference = ll.Graph.load(saved) if saved.exists() else ll.optimize(ll.export("tinychat"))
theirs = ll.LLM(ll.build(reference, "engines/theirs", overwrite=True), max_num_seqs=8)
questions = [example.messages for example in examples("held-out", 24, seed=3)]


def answers(llm):
    return llm.chat(questions, ll.SamplingParams(logprobs=0), progress=False)


def largest_difference(results, others):
    """Between the log-probabilities of two runs over the same tokens."""
    pairs = [pair for a, b in zip(results, others, strict=True) for pair in zip(a.logprobs, b.logprobs, strict=False)]
    return max(abs(a.logprob - b.logprob) for a, b in pairs)


ours, expected = answers(llm), answers(theirs)
same = [a.token_ids for a in ours] == [b.token_ids for b in expected]
difference = largest_difference(ours, expected)
print(f"{sum(len(r.token_ids) for r in ours)} tokens, the same: {same}; largest difference {difference:.1e}")

# %% [markdown]
# A proof that can't fail proves nothing. The control: one matrix of our model, a twentieth larger. It still talks, and says
# nearly the same. The comparison sees it.

# %%
spoiled = graph.copy()
matrix = spoiled.surgeon.tensors()["layers.3.self_attn.o_proj.weight"]
matrix.values = matrix.values * np.float32(1.05)
wrong = ll.LLM(ll.build(spoiled, "engines/wrong", overwrite=True), max_num_seqs=8)
control = largest_difference(answers(wrong), expected)
print(f"with one matrix changed: {control:.1e}")
assert same and difference < 1e-5 < control

# %%
for engine in (llm, theirs, wrong):
    engine.close()

# %% [markdown]
# ## What next
#
# A model may bring more than layers of its own: the next notebook declares an *operator*, with a name, a reference, a body that
# every target can run, and a place for a kernel.
