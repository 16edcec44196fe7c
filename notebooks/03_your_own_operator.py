# %% [markdown]
# # Your own operator
#
# Some models compute what no standard has a name for. Take a SiLU that is clipped, as some recent mixtures of experts use
# it to keep activations within what 8 bits can hold:
#
# ```
# clipped_silu(x) = min(x · sigmoid(x), limit)
# ```
#
# In the graph that comes out of torch this is three nodes like any others. Declared as an *operator* it is one node with a
# name, which a report can show, a pass can look for, and a GPU target can run with a kernel of its own. One declaration
# says all there is to say about it, and this notebook takes it from there to generated tokens. About a minute.

# %%
import numpy as np
import torch

import llmlab as ll

# %% [markdown]
# ## The declaration
#
# - attributes are annotated, with their defaults;
# - `shape` says what comes out for what goes in, in sizes;
# - `reference` says what it *is*, in NumPy;
# - `onnx` says it again in ONNX's operators. This body travels with every graph that uses the operator, so that any
#   runtime can run it, whether it has heard of the operator or not.


# %%
@ll.operator("mylab::clipped_silu", replace=True)
class clipped_silu:
    """x · sigmoid(x), at most `limit`."""

    limit: float = 7.0

    def shape(self, x):
        return x

    def reference(self, x):
        return np.minimum(x / (1 + np.exp(-x)), np.float32(self.limit))

    def onnx(self, op, x):
        return op.Min(op.Mul(x, op.Sigmoid(x)), self.limit)


clipped_silu

# %% [markdown]
# `replace=True` is for notebooks, where a cell is run again; without it a name can be declared once. The operator can be
# called at once, on arrays and on torch tensors:

# %%
x = np.linspace(-6, 12, 145, dtype=np.float32)
print(clipped_silu(x)[-3:], clipped_silu(x, limit=3)[-3:], clipped_silu(torch.from_numpy(x), limit=3)[-3:])

# %%
from IPython.display import HTML


def plot(x, curves, width=560, height=200):
    """Curves over x as an SVG; `curves` holds (label, colour, values)."""
    low, high = min(y.min() for _, _, y in curves), max(y.max() for _, _, y in curves)
    lines = ""
    for row, (label, color, y) in enumerate(curves):
        points = " ".join(
            f"{(a - x[0]) / (x[-1] - x[0]) * width:.1f},{(high - b) / (high - low) * (height - 8) + 4:.1f}"
            for a, b in zip(x, y, strict=True)
        )
        lines += f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='2'/>"
        lines += f"<text x='8' y='{18 + 16 * row}' font-size='13' fill='{color}'>{label}</text>"
    return HTML(f"<svg width='100%' style='max-width:{width}px' viewBox='0 0 {width} {height}'>{lines}</svg>")


silu = x / (1 + np.exp(-x))
plot(
    x,
    [("silu", "#888", silu), ("limit=7", "#3a7ec8", clipped_silu(x)), ("limit=3", "#e8833a", clipped_silu(x, limit=3))],
)

# %% [markdown]
# ## Does the body compute what the reference says?
#
# That is what `check` asks, on examples of yours: the body runs in ONNX Runtime, and its values, shapes and types are held
# against the reference and the shape rule. It returns the largest difference.

# %%
examples = [x, x.reshape(5, 29), x[:0]]
print("float32", clipped_silu.check(*examples), " limit=3", clipped_silu.check(*examples, limit=3))

# %% [markdown]
# The same with a body that somebody got wrong, in a way that reads just as well: the clip comes before the product
# instead of after it. For small numbers it makes no difference at all.


# %%
@ll.operator("mylab::wrong_silu", replace=True)
class wrong_silu:
    limit: float = 7.0

    def shape(self, x):
        return x

    def reference(self, x):
        return np.minimum(x / (1 + np.exp(-x)), np.float32(self.limit))

    def onnx(self, op, x):
        return op.Mul(op.Min(x, self.limit), op.Sigmoid(x))


print("up to 3:", wrong_silu.check(x[x < 3]))
try:
    wrong_silu.check(x)
except ll.LlmlabError as error:
    print(error)

# %% [markdown]
# What can be got wrong in the declaration itself is one line too, at once and not when a model is exported:

# %%
try:

    @ll.operator("mylab::typo", replace=True)
    class typo:
        def shape(self, x):
            return x

        def reference(self, x):
            return x

        def onnx(self, op, x):
            return op.Sigmoyd(x)

except ll.LlmlabError as error:
    print(error)

# %% [markdown]
# ## In a model
#
# A small transformer with random weights will do (for a Llama with tinychat's weights see the notebook before this one). Its
# activation is an argument, because it comes in two versions: one that calls the operator, and one whose author has never
# heard of it.

# %%
from torch import nn
from torch.nn import functional as F

HIDDEN, HEADS, LAYERS, VOCAB, LONGEST = 64, 4, 2, 2048, 128


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.activation = activation

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, HIDDEN))
        return x + self.down(self.activation(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(Block(activation) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Clipped(nn.Module):
    def __init__(self, limit=0.5):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return clipped_silu(x, limit=self.limit)


def make(activation):
    torch.manual_seed(0)
    model = Model(activation).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.35)
    return model


config = {
    "model_type": "mine",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "max_position_embeddings": LONGEST,
}
model = make(Clipped())
plain = ll.export(model, config=config, tokenizer="tinychat")
plain.nodes("blocks.0.activation")

# %% [markdown]
# There it is, one node. Its body travels with the graph, through every pass, through `save` and `load`, and
# into the engine.

# %%
import onnx

print(onnx.printer.to_text(plain.to_onnx().functions[0]))

# %% [markdown]
# `optimize` packs the tokens of all sequences into one row, so it has to know of each node whether it might let one token
# see another. Of an operator of yours it knows nothing but the body, so that is where it looks. Here all is well, and because
# the body is elementwise, the batch axis even sinks through it:

# %%
graph = ll.optimize(plain)
graph.nodes("blocks.0")

# %% [markdown]
# An operator that does mix tokens is refused, with its name and the reason. (In such a graph, other people's tokens would end
# up in your answer.)


# %%
@ll.operator("mylab::below_max", replace=True)
class below_max:
    def shape(self, x):
        return x

    def reference(self, x):
        return x - x.max(axis=-2, keepdims=True)

    def onnx(self, op, x):
        return op.Sub(x, op.ReduceMax(x, [-2]))


class BelowMax(nn.Module):
    def forward(self, x):
        return below_max(x)


try:
    ll.optimize(ll.export(make(BelowMax()), config=config))
except ll.LlmlabError as error:
    print(error)

# %% [markdown]
# ## A pass that finds it
#
# The other version of the model comes from somebody who wrote the formula out, and not even in our words. Its graph has
# the arithmetic instead:


# %%
class WrittenOut(nn.Module):
    def forward(self, x):
        return torch.clamp(x / (1 + torch.exp(-x)), max=0.5)


theirs = ll.export(make(WrittenOut()), config=config, tokenizer="tinychat")
theirs.nodes("blocks.0.activation")

# %% [markdown]
# llmlab knows a SiLU by what it computes, however it is spelled: its pass `fuse_activation` leaves `x · Sigmoid(x)`. So ours
# runs after that one and has a single spelling to look for. It has three parts. `pattern` finds the place: an upper bound on
# a product of `x` with its own sigmoid. `check` says why the rewrite does *not* apply there, for people to read. `rewrite` puts
# the operator in; its shape and type come from the declaration.

# %%
from llmlab.graph.edit import operand, producer, scalar, scope


@ll.register_pass(after="fuse_activation", before="pack_tokens", replace=True)
class FindClippedSilu(ll.Pass):
    """Min(x · sigmoid(x), limit) → mylab::clipped_silu."""

    name = "find_clipped_silu"

    def pattern(self, node):
        product = producer(node.inputs[0], "Mul") if node.op in ("Min", "Clip") else None
        if product is None:
            return None
        for x, gate in (product.inputs, product.inputs[::-1]):
            sigmoid = producer(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is x:
                return ll.Match(node=node, x=x)
        return None

    def check(self, edit, match):
        low, high = (operand(match.node, i) for i in ((1, 2) if match.node.op == "Clip" else (2, 1)))
        match.limit = scalar(high)
        if low is not None:
            return "it has a lower bound as well"
        return None if match.limit is not None else "its upper bound is computed"

    def rewrite(self, edit, match):
        (out,) = clipped_silu.add(edit, scope(match.node), [match.x], limit=match.limit)
        edit.replace(match.node.outputs[0], out)


found = ll.optimize(theirs)
next(report for report in found.history if report.name == "find_clipped_silu")

# %% [markdown]
# From here on both versions are the same graph:

# %%
found.op_counts() == graph.op_counts(), found.op_counts()

# %%
ll.unregister_pass("find_clipped_silu")

# %% [markdown]
# ## Tokens
#
# The rest is the road that every model goes. The weights are random and so is what it says; what counts is that the engine says
# exactly what torch says. So: both engines, a few prompts of different lengths in flight together, and the log-probability of
# every generated token against torch.

# %%
prompts = [list(range(5, 5 + n)) for n in (1, 3, 8, 21)]
params = ll.SamplingParams(max_tokens=24, temperature=1.0, seed=1, logprobs=0, ignore_eos=True)


def generate(graph, path):
    with ll.LLM(ll.build(graph, path, overwrite=True), max_num_seqs=4) as llm:
        return llm.generate(prompts, params, progress=False)


def largest_difference(results, reference):
    worst = 0.0
    for result in results:
        ids = torch.tensor([result.prompt_token_ids + result.token_ids])
        with torch.no_grad():
            logits = reference(ids, torch.arange(ids.shape[1])[None])[0, len(result.prompt_token_ids) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(result.token_ids)), torch.tensor(result.token_ids)]
        worst = max(worst, (expected - torch.tensor([t.logprob for t in result.logprobs])).abs().max().item())
    return worst


results = generate(graph, "engines/operator")
inserted = generate(found, "engines/operator-found")
difference = max(largest_difference(results, model), largest_difference(inserted, model))
same = [a.token_ids for a in results] == [b.token_ids for b in inserted]
print(f"largest difference {difference:.1e} over {sum(len(r.token_ids) for r in results)} tokens; same tokens: {same}")

# %% [markdown]
# And the control: torch with the limit a little off, 0.55 instead of 0.5. The comparison sees it at once.

# %%
control = largest_difference(results, make(Clipped(0.55)))
print(f"with another limit: {control:.1e}")
assert same and difference < 1e-3 < control

# %% [markdown]
# The engine still knows its operator by name, and which implementation its target used:

# %%
nodes = onnx.load("engines/operator/model.onnx", load_external_data=False).graph.node
[
    (n.op_type, n.domain, {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute})
    for n in nodes
    if n.domain == "mylab"
]

# %% [markdown]
# ## A kernel of your own
#
# On the CPU the body is all there is to run, and ONNX Runtime fuses what it can. For a GPU target the declaration may bring
# a Triton kernel. The method is called only where one is launched, so everything above goes without triton:
#
# ```python
# def triton(self, x):                       # shapes again
#     import triton, triton.language as tl
#
#     @triton.jit
#     def kernel(x, out, n, limit, BLOCK: tl.constexpr):
#         at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
#         value = tl.load(x + at, mask=at < n)
#         tl.store(out + at, tl.minimum(value * tl.sigmoid(value), limit), mask=at < n)
#
#     n = math.prod(x)
#     return Launch(kernel, (triton.cdiv(n, 1024),), (n, self.limit), {"BLOCK": 1024})
# ```
#
# `Launch` is in `llmlab.graph.operators.operator`: the kernel, its grid, the scalars behind the pointers, and what is compiled in.
