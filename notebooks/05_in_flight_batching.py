# %% [markdown]
# # In-flight batching
#
# An engine that answers many people at once works in *steps*. In each step a scheduler decides which requests get how many
# tokens; the model computes all of them together; then it decides anew. This is called in-flight (or continuous) batching, and
# this notebook takes it apart with the scheduler that `ll.LLM` runs, on tinychat, one step at a time. About a minute.

# %%
import time

import llmlab as ll
from llmlab.runtime.trace import record

graph = ll.optimize(ll.export("tinychat", progress=False))
engine = ll.build(graph, "engines/tinychat", overwrite=True)
engine

# %% [markdown]
# ## Why batch at all
#
# To make one token, a model reads all of its weights. To make one token for each of eight requests, it reads them once as well. So a
# step for eight takes much less than eight times as long:

# %%
long_answers = ll.SamplingParams(max_tokens=32, ignore_eos=True)
for count in (1, 2, 4, 8, 16):
    with ll.LLM(engine, max_num_seqs=count) as llm:
        llm.generate(["warm up"] * count, ll.SamplingParams(max_tokens=2), progress=False)
        began = time.perf_counter()
        llm.generate([f"Request number {i}" for i in range(count)], long_answers, progress=False)
        speed = 32 * count / (time.perf_counter() - began)
    print(f"{count:3} at a time: {speed:6.0f} tokens/s  {'█' * round(speed / 40)}")

# %% [markdown]
# ## The monitor
#
# `ll.monitor` shows what the scheduler does. Given a graph, it runs it on the NumPy reference over a pool of small KV blocks: slow, but the
# scheduler, the blocks and the answers are the real ones. Each row of the timeline is a request, each column a step. Numbers after P are tokens
# of a prompt (*prefill*), d is one token of an answer (*decode*), w is waiting. Below are the blocks of the KV cache after the step
# that is framed, and the answers.
#
# In a running notebook: press **Step** or **Play**, click into a column to look at that step, type prompts and submit them. What
# follows does the same from Python, so that the pictures are here without a click.

# %%
QUESTIONS = [
    "How do I count to nine in French?",
    "What is the capital of Italy?",
    "Who are you?",
    "How do I count to nine in German?",
    "What is 17 plus 25?",
    "What is the opposite of hot?",
]
first = ll.monitor(graph, QUESTIONS[:2], max_tokens=24, kv_blocks=32)
first.step(4)
first

# %% [markdown]
# Two requests are under way. A third one comes now, and is in the batch with the next step, beside the two that go on decoding. Nobody waits for
# anybody to end:

# %%
first.submit(QUESTIONS[2], max_tokens=24)
record_of_step = first.step()
[(s.name, s.state, s.count) for s in record_of_step.sequences]

# %% [markdown]
# ## Static batching, to compare
#
# The simple way is to take as many requests as fit, run them until the *last* one has ended, and only then take the next ones. Short answers
# leave their places empty:

# %%
static = ll.monitor(graph, QUESTIONS, max_tokens=24, max_num_seqs=3, kv_blocks=32, batching="static")
static.run()
static

# %% [markdown]
# In flight, a place that becomes free is taken in the next step:

# %%
inflight = ll.monitor(graph, QUESTIONS, max_tokens=24, max_num_seqs=3, kv_blocks=32)
inflight.run()
inflight

# %%
for panel in (static, inflight):
    filled = sum(step.num_running for step in panel.steps) / len(panel.steps)
    print(f"{panel.trace.batching:9} {len(panel.steps)} steps, {filled:.1f} of 3 places filled")
assert len(inflight.steps) < len(static.steps)
answers = [request["text"] for request in inflight.to_dict()["requests"]]
assert answers == [request["text"] for request in static.to_dict()["requests"]], "only the order differs"

# %% [markdown]
# The same on the engine, with more requests whose answers differ more in length. `record` writes down each step of a core while it does something;
# the monitor replays such a trace.

# %%
lengths = [4, 40, 8, 4, 24, 4, 48, 6, 4, 32, 4, 12, 4, 6, 36, 4]
prompts = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(lengths))]
params = [ll.SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
traces = {}
for batching in ("static", "inflight"):
    with ll.LLM(engine, max_num_seqs=4, batching=batching) as llm:
        llm.generate(prompts[:4], long_answers, progress=False)
        with record(llm.core) as traces[batching]:
            began = time.perf_counter()
            llm.generate(prompts, params, progress=False)
            seconds = time.perf_counter() - began
    print(f"{batching:9} {len(traces[batching].steps):4} steps, {sum(lengths) / seconds:6.0f} tokens/s")
assert len(traces["inflight"].steps) < len(traces["static"].steps)

# %%
ll.monitor(traces["inflight"])

# %% [markdown]
# On ONNX Runtime a KV block is a *slot*: room for one whole sequence. The code of the scheduler is the same.
#
# ## Chunked prefill
#
# A prompt can be computed all at once, which takes long if it is long, and everyone else has to wait for that step. So a step works on a
# limited number of tokens (`max_tokens_per_step`): decodes come first, and what is left goes to prompts, piece by piece. Here a prompt of 60 tokens
# arrives before the third step.

# %%
LONG = list(range(100, 160))  # token ids; what they mean doesn't matter here


def with_a_long_prompt(most):
    panel = ll.monitor(graph, QUESTIONS[:2], max_tokens=24, max_tokens_per_step=most, kv_blocks=48)
    panel.submit([LONG], max_tokens=4, ignore_eos=True, at=2)
    panel.run()
    return panel


at_once, in_chunks = with_a_long_prompt(128), with_a_long_prompt(12)
for panel in (at_once, in_chunks):
    work = [step.prefill_tokens + step.decode_tokens for step in panel.steps]
    print(f"{panel.trace.max_tokens_per_step:3} at most: the largest step has {max(work)} tokens, {len(work)} steps")
in_chunks

# %% [markdown]
# ## The KV cache in blocks, and shared beginnings
#
# Keys and values lie in blocks of a fixed number of tokens, so a sequence takes what it needs and no more, and blocks needn't lie side by side. Full
# blocks are never written again. So two requests that begin alike can own the same block. With the prefix cache on, the scheduler looks for such
# beginnings; blocks of ended requests stay as long as nobody needs the room.

# %%
shared = ll.monitor(graph, QUESTIONS[:1], max_tokens=24, kv_blocks=32, prefix_cache=True)
shared.step(3)
shared.submit([QUESTIONS[0].replace("French", name) for name in ("German", "Spanish")], max_tokens=24)
step = shared.step(2)
print(
    f"{step.shared_blocks} blocks have several owners; counted by the block manager: {sorted({b.references for b in step.blocks})}"
)
assert step.shared_blocks > 0
shared

# %% [markdown]
# ## Preemption
#
# When decoding needs a block and none is left, the youngest request gives its blocks back and waits (X). Later it is computed again: its prompt
# and what it had said so far, as one prefill. Its answer doesn't change.

# %%
tight = ll.monitor(graph, QUESTIONS, max_tokens=24, max_num_seqs=3, kv_blocks=14)
tight.run()
preempted = [i for i, step in enumerate(tight.steps) if step.preemptions]
assert preempted and [request["text"] for request in tight.to_dict()["requests"]] == answers
tight.act("look", str(preempted[0]))
print(f"{len(preempted)} preemptions; {len(tight.steps)} steps instead of {len(inflight.steps)}; the same answers")
tight

# %% [markdown]
# ## The light
#
# After each step the books are checked: every block is free, cached or owned by exactly the sequences that count on it. To see that the light
# can turn red, take a block behind the scheduler's back:

# %%
broken = ll.monitor(graph, QUESTIONS[:1], max_tokens=4, kv_blocks=16)
broken.step()
broken.core.blocks.allocate_one()
broken.step().integrity

# %% [markdown]
# ## Your turn
#
# Some things to try: set *Most sequences* to 1 and compare the number of steps. Take KV blocks away until requests are preempted. Turn the prefix
# cache on and send the same prompt twice. Cancel a request while others wait for its blocks.

# %%
yours = ll.monitor(graph, QUESTIONS, max_tokens=24, prefix_cache=True)
yours.step(6)
yours
