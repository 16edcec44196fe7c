# %% [markdown]
# # From a checkpoint to tokens
#
# A language model arrives as a *checkpoint*: a folder of weights and a config. Between it and a fast answer lie a few
# steps, and llmlab takes them one at a time, each with a result that you can look at, save and compare:
#
# ```
# checkpoint ──export──▶ plain graph ──optimize──▶ serving graph ──build──▶ engine ──LLM──▶ tokens
# ```
#
# Every arrow is one function. This notebook walks the whole road with *tinychat*, a chat model of 8.5 million
# parameters that comes with llmlab: no GPU, no network, about a minute.

# %% tags=["parameters"]
model = "tinychat"  # or the folder of a checkpoint, or a hub id
precision = "float32"  # or a recipe, such as int8 or int4_rtn
output = "engines/tinychat"

# %%
from pathlib import Path

import llmlab as ll

ll.__version__

# %% [markdown]
# ## The checkpoint
#
# A folder in Hugging Face's layout. In place of `"tinychat"` the path of any such folder or a hub id does as well: change the first cell, or
# run `llmlab notebook run 01_checkpoint_to_engine.ipynb -p model=… -p precision=int4_rtn -o engines/mine`. The weights are opened as memory maps: nothing is read until it is used.

# %%
from llmlab.checkpoint import Checkpoint, resolve

checkpoint = Checkpoint(resolve(model))
checkpoint.config

# %%
parameters = sum(tensor.map().size for tensor in checkpoint.weights.values())
print(f"{parameters:,} parameters in {len(checkpoint.weights)} tensors; those of the first layer:")
for name, tensor in checkpoint.weights.items():
    if name.startswith("model.layers.0."):
        print(f"  {name:<50} {tensor.dtype} {list(tensor.shape)}")

# %% [markdown]
# ## Export: what torch writes
#
# `export` has torch trace the model, and brings the trace here as an ONNX graph. It is the *plain* graph: stateless, over
# padded `[batch, sequence]` tokens, with everything that torch said, the superfluous too. Weights keep their checkpoint
# names and stay where they are.

# %%
plain = ll.export(model)
plain

# %% [markdown]
# Nodes carry the path of the module that made them, so any part of the model can be looked at. This is the
# feed-forward block of the first layer: `down(silu(gate(x)) * up(x))`, with a transpose in front of each weight.

# %%
plain.nodes("model.layers.0.mlp")

# %% [markdown]
# Attention is another matter. What is one idea in a paper comes out of the trace like this:

# %%
from collections import Counter

Counter(node.op for node in plain.nodes("model.layers.0.self_attn"))

# %% [markdown]
# ## Optimize: the serving graph
#
# A server works on many sequences at once, some reading a prompt, some writing their next token. `optimize` rewrites the
# graph for exactly that, in passes. Each pass looks for a *pattern*, *checks* that the rewrite is valid there, and
# rewrites. The history says what each of them did, and where one of them held back, it says why. `steps` goes through it:
# in a live notebook the slider moves from pass to pass, and a click on a place shows it before and after.

# %%
graph = ll.optimize(plain)
ll.steps(graph, "page_attention")

# %% [markdown]
# Three of them make the difference:
#
# - `pack_tokens` lays the tokens of all sequences end to end. No padding; the dense layers never see a batch.
# - `page_attention` folds RoPE, the key/value cache and attention into one node, `PagedAttention`, which finds each
#   sequence's keys and values through a block table.
# - `gather_logits` picks the rows whose next token is wanted *before* the last layer's output is computed for all of them.
#
# What is left is best looked at from above. `inspect` shows the graph as layers, their blocks, and the nodes of these; layers
# of the same structure stand together, and each number is the sum of what lies below. Live, a click unfolds a part and draws it,
# a node shows what it reads and what is in its weights, and other numbers can be laid over: operations, types, time.

# %%
ll.inspect(graph)

# %% [markdown]
# The dashed boxes of a block (casts, transposes, joins) touch weights alone: `build` does them once. The last layers differ
# from the others because only the rows whose next token is wanted go through their end. How did it come to that? `why` asks the history about one place: which passes fired there, what they took away and put in,
# and whose pattern was found but held back, with the reason.

# %%
graph.why("layers.0.self_attn")

# %% [markdown]
# `diff` compares two graphs, node by node: what came, what went, and at each node that both have, what is different. What
# happened alike in several layers is said once. Unfold a line to see it.

# %%
ll.diff(plain, graph)

# %% [markdown]
# Anything between two arrows can be saved and opened again.

# %%
saved = graph.save("engines/tinychat-graph", overwrite=True)
again = ll.Graph.load(saved)
again.to_dict() == graph.to_dict()

# %% [markdown]
# ## Build: the engine
#
# `build` lowers the serving graph to what a target has. Here that is ONNX Runtime on the CPU, where `PagedAttention`
# becomes `GroupQueryAttention` with the cache updated in place. The result is a folder, and all there is to deploy: it runs
# wherever llmlab's core is installed, without torch. It is written whole or not at all, and every file in it has its hash
# in the manifest.

# %%
if precision != "float32":
    graph = ll.quantize(graph, precision)
engine = ll.build(graph, output, overwrite=True)
engine

# %%
for path in sorted(Path(output).iterdir()):
    print(f"{path.name:<24} {path.stat().st_size:>12,} bytes")

# %% [markdown]
# ## Answers

# %%
llm = ll.LLM(engine, max_num_seqs=8)
llm.chat([{"role": "user", "content": "How do I count to nine in French?"}])

# %% [markdown]
# A result has `.text`, `.token_ids`, `.finish_reason` and `.metrics`. `stream` gives the same answer piece by piece, as
# the tokens come:

# %%
conversation = [
    {"role": "user", "content": "Hi! My name is Clara."},
    {"role": "assistant", "content": "Nice to meet you, Clara!"},
    {"role": "user", "content": "What is my name?"},
]
for delta in llm.stream(conversation):
    print(delta.text, end="", flush=True)

# %% [markdown]
# `generate` takes raw text, or token ids, for models and uses without a chat template.

# %%
answer = llm.generate("<|user|>Spell the word engine backwards.<|end|><|assistant|>")
print(answer.text)
print(answer.prompt_token_ids, "→", answer.token_ids)

# %% [markdown]
# ## Sampling
#
# `logprobs` shows what a model considered at each step. Two-digit products are beyond tinychat. It knows the form of the
# answer, and one can see its certainty go where the result begins:

# %%
import math

question = [{"role": "user", "content": "What is 17 times 25?"}]
result = llm.chat(question, ll.SamplingParams(logprobs=3))
for token in result.logprobs:
    likely = [f"{llm.tokenizer.decode([i], skip_special_tokens=False)!r} {math.exp(p):.0%}" for i, p in token.top]
    print(*[f"{choice:<22}" for choice in likely])

# %% [markdown]
# Left alone, an engine decodes as its model's generation config says, which for tinychat is greedily: always the first
# column. `SamplingParams` changes that for one request. A seed makes it reproducible, whoever else is being served.

# %%
llm.chat(question, ll.SamplingParams(temperature=1.0, n=3, seed=7))

# %% [markdown]
# Whatever can be got wrong is one line that says what was given, what was expected and what to do.

# %%
try:
    llm.chat(question, ll.SamplingParams(temperature=-1))
except ll.LlmlabError as error:
    print(error)

# %% [markdown]
# ## Many at once
#
# The engine batches *in flight*: each step works on all sequences there are, and when one ends, the next in line takes its
# place at once instead of waiting for the rest. tinychat was trained on text that llmlab generates, so there are questions
# with known answers that it has never seen. Here are 40 of them, eight in flight at a time.

# %%
from llmlab.zoo.tasks import examples

asked = examples("held-out", 40, seed=1)
results = llm.chat([example.messages for example in asked])
right = [result.text == example.answer for result, example in zip(results, asked, strict=True)]
print(f"{sum(right)} of {len(right)} right, for example:")
for result, example in list(zip(results, asked, strict=True))[:6]:
    print(f"  {example.messages[-1]['content'].splitlines()[-1]}  →  {result.text}")

# %% [markdown]
# Each row below is a request: waiting in grey, reading the prompt in orange, writing the answer in blue. Where one ends,
# another begins. Long prompts are read in chunks, so that the others go on writing meanwhile.

# %%
from IPython.display import HTML


def timeline(results, width=720, row=7):
    """Requests that arrived together, as an SVG of when each waited, read and wrote."""
    end = max(r.metrics.e2e_s for r in results)
    bars = ""
    for y, metrics in enumerate(r.metrics for r in results):
        marks = [0, metrics.queue_s, metrics.ttft_s, metrics.e2e_s]
        for color, start, stop in zip(("#8883", "#e8833a", "#3a7ec8"), marks, marks[1:], strict=False):
            bars += f"<rect x='{start / end * width:.1f}' y='{y * row}' width='{(stop - start) / end * width:.1f}' "
            bars += f"height='{row - 1}' fill='{color}'/>"
    height = len(results) * row + 16
    label = f"<text x='0' y='{height - 2}' font-size='12' fill='#888'>0 s</text>"
    label += f"<text x='{width}' y='{height - 2}' font-size='12' fill='#888' text-anchor='end'>{end:.2f} s</text>"
    return HTML(f"<svg width='100%' style='max-width:{width}px' viewBox='0 0 {width} {height}'>{bars}{label}</svg>")


timeline(results)

# %% [markdown]
# One request's metrics, and the engine's own counts since it was opened: how many steps it took for how many tokens, and
# what share of their time went to scheduling, packing and sampling. (A step of tinychat takes a few milliseconds. Of a larger
# model's steps the share is smaller.)

# %%
print(results[0].metrics)
total = llm.core.stats.total
print(f"{total.steps} steps, {total.sequences / total.steps:.1f} sequences in each on average")
print(f"{total.prefill_tokens:,} prompt tokens, {total.decode_tokens:,} decoded one by one")
print(f"{1 - total.execute_s / total.step_s:.1%} of the time for scheduling, packing and sampling")

# %% [markdown]
# ## The proof
#
# A faster model that says something else is no use. So: the same prompts through transformers, without any cache, and the
# log-probability of every token that the engine generated above compared with what transformers gives it at that place.

# %%
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
reference = transformers.AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32).eval()
results = llm.chat([example.messages for example in asked], ll.SamplingParams(logprobs=0), progress=False)


def largest_difference(model):
    """Between the engine's log-probabilities and the model's, over all generated tokens; and whether greedy agrees."""
    worst, same = 0.0, True
    for result in results:
        ids = torch.tensor([result.prompt_token_ids + result.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(result.prompt_token_ids) - 1 : -1].float()
        chosen = torch.tensor(result.token_ids)
        expected = logits.log_softmax(-1)[torch.arange(len(chosen)), chosen]
        got = torch.tensor([token.logprob for token in result.logprobs])
        worst = max(worst, (expected - got).abs().max().item())
        same &= bool((logits.argmax(-1) == chosen).all())
    return worst, same


difference, same = largest_difference(reference)
print(f"largest difference {difference:.1e} over {sum(len(r.token_ids) for r in results)} tokens, same tokens: {same}")

# %% [markdown]
# A proof that can't fail proves nothing. The control: the reference computed in bfloat16 instead, a change so small that
# it seldom changes a word. The comparison sees it at once.

# %%
rounded, _ = largest_difference(reference.bfloat16())
print(f"largest difference in bfloat16: {rounded:.1e}, {rounded / difference:,.0f} times as much")
assert precision != "float32" or (same and difference < 1e-3 < rounded)

# %%
llm.close()

# %% [markdown]
# ## What next
#
# The engine stays where it was built. In a terminal:
#
# ```
# llmlab chat engines/tinychat                  talk to it
# llmlab bench engines/tinychat                 measure it
# llmlab inspect engines/tinychat               see what it holds
# llmlab inspect --passes                       leave out each pass in turn, and measure what it was good for
# llmlab build path/or/hub-id -o engines/mine   the same road for a model of yours, in one go
# ```
#
# To serve from an asyncio program, `ll.AsyncLLM` takes the same engine and streams the same way. How the pieces fit together
# is in `docs/architecture.md`; how to add a pass of your own, in `CONTRIBUTING.md`.
