# %% [markdown]
# # Attention and the KV cache, from scratch
#
# What does an engine do when a token attends to those before it? This notebook writes it six times, each time one step
# closer to what runs: in NumPy, in tiles, with a cache, with a cache in blocks, as a kernel in Triton's interpreter, and
# last the node `PagedAttention` of the engine. All six get the queries, keys and values of tinychat as it reads a real
# sentence, and each is held against the one before. Less than a minute, without a GPU.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels run as Python on the CPU; it is read when triton is imported

import numpy as np
from IPython.display import HTML

import llmlab as ll
from llmlab import zoo
from llmlab.widgets.markup import h


def compare(found, expected):
    """The largest difference, which also ends the notebook if it is more than rounding."""
    error = float(np.abs(found - expected).max())
    assert error < 1e-4, error
    return f"max error {error:.1e}"


# %% [markdown]
# ## Queries, keys and values of a real model
#
# `observe` runs the graph and keeps the tensors that it is asked for. In this model six query heads share two heads of keys
# and values (grouped-query attention), and q and k are not turned by their position yet (RoPE): the node does that.

# %%
from llmlab.quant.calibrate import observe
from llmlab.text.tokenizer import Tokenizer

graph = ll.optimize(ll.export("tinychat"))
tokenizer = Tokenizer(zoo.path("tinychat"))
said = [
    {"role": "user", "content": "How do I count to nine in French?"},
    {"role": "assistant", "content": "Un, deux, trois, quatre, cinq, six, sept, huit, neuf."},
    {"role": "user", "content": "And in English?"},
]
ids = np.array(tokenizer.encode_chat(said)[1])
node = next(n for n in graph.surgeon.nodes if n.op == "PagedAttention" and "layers.3." in n.name)


class Keep:
    """Keeps all rows of one tensor."""

    def add(self, rows):
        self.rows = rows.copy()


kept = {name: Keep() for name in ("q", "k", "v", "out")}
tensors = [*(t.name for t in node.inputs[:3]), node.outputs[0].name]
observe(graph, [ids], dict(zip(tensors, kept.values(), strict=True)))
heads, kv_heads, dim, scale = (node.attrs[name] for name in ("num_heads", "kv_num_heads", "head_dim", "scale"))
cos, sin = (next(t.values for t in node.inputs if t.name == name) for name in ("rope.cos", "rope.sin"))
print(node.name, {name: keep.rows.shape for name, keep in kept.items()})
print(f"{heads} heads of {dim} channels read {kv_heads} heads of keys and values; scores are scaled by {scale}")

# %% [markdown]
# ## 1 · Attention in NumPy
#
# Channel i and channel i + 32 of a head are a pair, which is turned by an angle that grows with the token's position. Then
# each token's query meets the keys of all tokens up to it, the scores become weights by a softmax, and the weights mix the
# values.


# %%
def turn(x, positions):
    """RoPE of x [T, heads, dim]."""
    a, b = np.split(x, 2, -1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


T = len(ids)
q = turn(kept["q"].rows.reshape(T, heads, dim), np.arange(T))
k = turn(kept["k"].rows.reshape(T, kv_heads, dim), np.arange(T))
v = kept["v"].rows.reshape(T, kv_heads, dim)


def attention(q, k, v, start=0):
    """Tokens start, start + 1, … with queries q [T, heads, dim] attend to all keys [S, kv_heads, dim] up to them."""
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * scale
    later = np.arange(len(k)) > start + np.arange(len(q))[:, None]
    scores = np.where(later, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v), weights


plain, weights = attention(q, k, v)
print(plain.shape, "weights", weights.shape, "each row sums to", weights.sum(-1).min().round(6))

# %% [markdown]
# Where each head looks: a row is a token, a column one that it attends to. Above the diagonal lies the future.

# %%
pieces = [tokenizer.decode([int(i)]) for i in ids]


def pattern(head, size=6):
    """The weights of one head as a picture."""
    cells = [
        h("rect", x=s * size, y=t * size, width=size, height=size, fill="#0072b2", fill_opacity=f"{w:.2f}")
        for t, row in enumerate(weights[head])
        for s, w in enumerate(row[: t + 1])
        if w > 0.01
    ]
    edge = h("path", d="M0 0" + "".join(f"h{size}v{size}" for _ in range(T)) + "H0Z", fill="none", stroke="#888")
    label = f"head {head}: the last token attends most to {pieces[int(weights[head, -1].argmax())]!r}"
    picture = h("svg", h("title", label), edge, cells, width=T * size + 2, height=T * size + 2, role="img")
    return h("figure", picture, h("figcaption", label), style="display: inline-block; width: 300px; margin: 8px")


HTML(str(h("div", [pattern(head) for head in range(heads)])))

# %% [markdown]
# ## 2 · In tiles, with an online softmax
#
# For 32,000 tokens the matrix of scores has a billion entries a head, and no GPU wants to write it down. It need not: take
# the keys a tile at a time, keep the largest score so far, the sum and the mixed values, and rescale these when a larger
# score comes along (Milakov and Gimelshein, 2018; FlashAttention: Dao et al., 2022).


# %%
def tiled(q, k, v, start=0, tile=8):
    """As `attention`; of the scores only `tile` columns exist at a time."""
    group = heads // kv_heads
    most = np.full((len(q), heads, 1), -np.inf, np.float32)
    total, mixed = np.zeros_like(most), np.zeros_like(q)
    at = start + np.arange(len(q))
    for first in range(0, len(k), tile):
        keys, values = (np.repeat(x[first : first + tile], group, axis=1) for x in (k, v))
        scores = np.einsum("thd,shd->ths", q, keys) * scale
        scores[(first + np.arange(len(keys)) > at[:, None])[:, None].repeat(heads, 1)] = -np.inf
        larger = np.maximum(most, scores.max(-1, keepdims=True))
        part, rescale = np.exp(scores - larger), np.exp(most - larger)
        total = total * rescale + part.sum(-1, keepdims=True)
        mixed = mixed * rescale + np.einsum("ths,shd->thd", part, values)
        most = larger
    return mixed / total


for tile in (1, 8, 64):
    print(f"tiles of {tile:2}: {compare(tiled(q, k, v, tile=tile), plain)}")

# %% [markdown]
# ## 3 · The KV cache
#
# To write token after token, the keys and values of the past are needed again and again, and they never change: a key
# depends on its own token and those before it. So they are kept. The prompt goes in at once (*prefill*), then one token a
# step (*decode*), and nothing is computed twice. Here the first 12 tokens are the prompt:

# %%
cache_k, cache_v = np.zeros_like(k), np.zeros_like(v)
steps, filled = [], 0
for new in (12, *[1] * (T - 12)):
    rows = slice(filled, filled + new)
    cache_k[rows], cache_v[rows] = k[rows], v[rows]
    filled += new
    steps.append(tiled(q[rows], cache_k[:filled], cache_v[:filled], start=rows.start))
cached = np.concatenate(steps)
print(f"one prefill, {len(steps) - 1} decodes: {compare(cached, plain)}")

again, once = (sum(2 * heads * dim * n for n in lengths) for lengths in ([n * n for n in range(12, T + 1)], [T * T]))
print(f"{again / once:.0f} times the products without a cache, for {T} tokens")

# %% [markdown]
# ## 4 · The cache in blocks
#
# How long an answer gets is known when it ends. A cache with room for the longest answer of each sequence is mostly empty;
# one that grows must move. So an engine cuts it into blocks of 16 tokens that lie anywhere in a pool, and a *block table*
# says where (PagedAttention: Kwon et al., 2023). Two sequences that begin alike can even share blocks. Here is our sequence
# beside a shorter one that starts with the same 16 tokens, in a pool whose blocks were handed out in disorder:

# %%
BLOCK = 16
count = -(-T // BLOCK)
short = BLOCK + 3
pool = np.full((2, 8, kv_heads, BLOCK, dim), np.nan, np.float32)  # what nobody wrote must not be read
free = [5, 2, 7, 0, 4, 1]
table = np.full((2, count), -1, np.int32)
table[0] = free[:count]
table[1, :2] = table[0, 0], free[count]
lengths = np.array([T, short], np.int32)


def write(sequence, position, key, value):
    block = table[sequence, position // BLOCK]
    pool[0, block, :, position % BLOCK], pool[1, block, :, position % BLOCK] = key, value


def read(sequence):
    """The keys and values of a sequence [length, kv_heads, dim], gathered by its block table."""
    position = np.arange(lengths[sequence])
    return pool[:, table[sequence, position // BLOCK], :, position % BLOCK].swapaxes(0, 1)


for sequence, length in enumerate(lengths):
    for position in range(length):
        write(sequence, position, k[position], v[position])
paged = [attention(q[:n], *read(b))[0] for b, n in enumerate(lengths)]
print("whole sequence:", compare(paged[0], plain), "· the one that shares a block:", compare(paged[1], plain[:short]))


# %%
def pool_picture():
    """The pool's blocks, in the order in which they lie in memory; a dot is a token."""
    colours, parts = ("#0072b2", "#e69f00"), []
    for block in range(pool.shape[1]):
        owners = [b for b in range(2) if block in table[b]]
        filled = max((min(BLOCK, lengths[b] - BLOCK * list(table[b]).index(block)) for b in owners), default=0)
        name = " and ".join("AB"[b] for b in owners) or "free"
        x, y = 8 + block % 4 * 150, 26 + block // 4 * 78
        parts.append(h("text", f"block {block}: {name}", x=x, y=y - 6, font_size=12, fill="#888"))
        parts.append(h("rect", x=x, y=y, width=136, height=36, fill="none", stroke="#888", rx=4))
        for n in range(BLOCK):
            colour = colours[owners[n % len(owners)]] if n < filled else "#8886"
            parts.append(h("circle", cx=x + 12 + n % 8 * 16, cy=y + 11 + n // 8 * 14, r=5, fill=colour))
    return h("svg", h("title", "the pool of blocks"), parts, viewBox="0 0 612 150", width=612, role="img")


rows = [
    h("tr", h("td", "AB"[b]), h("td", int(lengths[b])), h("td", str([int(i) for i in table[b] if i >= 0])))
    for b in range(2)
]
head = h("tr", [h("th", name) for name in ("sequence", "tokens", "block table")])
HTML(str(h("div", pool_picture(), h("table", head, rows))))

# %% [markdown]
# ## 5 · A kernel, in Triton's interpreter
#
# The same as a kernel: a program for each head, which walks over the sequence's blocks, looks each one up in the table and
# keeps the running softmax of step 2. Triton compiles this to GPU code; its interpreter runs it here, a block at a time.

# %%
import torch
import triton
import triton.language as tl


@triton.jit
def decode_one(
    out,
    q,
    pool,
    table,
    length,
    half,
    scale,
    GROUP: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    channel, place = tl.arange(0, DIM), tl.arange(0, BLOCK)
    query = tl.load(q + head * DIM + channel)
    most, total = float("-inf"), 0.0
    mixed = tl.zeros([DIM], tl.float32)
    for first in range(0, length, BLOCK):
        block = tl.load(table + first // BLOCK)
        at = ((block * KV + head // GROUP) * BLOCK + place[:, None]) * DIM + channel[None, :]
        seen = first + place < length
        keys = tl.load(pool + at, mask=seen[:, None], other=0.0)
        values = tl.load(pool + half + at, mask=seen[:, None], other=0.0)
        scores = tl.where(seen, tl.sum(keys * query[None, :], 1) * scale, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 0))
        part, rescale = tl.exp(scores - larger), tl.exp(most - larger)
        total = total * rescale + tl.sum(part, 0)
        mixed = mixed * rescale + tl.sum(part[:, None] * values, 0)
        most = larger
    tl.store(out + head * DIM + channel, mixed / total)


def as_torch(x):
    return torch.tensor(np.ascontiguousarray(x))


out = torch.empty(heads, dim)
decode_one[(heads,)](
    out, as_torch(q[-1]), as_torch(pool), as_torch(table[0]), T, pool[0].size, scale,
    GROUP=heads // kv_heads, KV=kv_heads, DIM=dim, BLOCK=BLOCK,
)  # fmt: skip
print("the last token:", compare(out.numpy(), paged[0][-1]))

# %% [markdown]
# The kernels that llmlab ships (`llmlab/kernels/gpu`) do this and more: they turn q and k, write the pool, pack the heads
# that share keys into one tile of the tensor cores, split a long sequence over programs, and know windows, sinks and
# quantized caches. A step of both sequences, each with one new token, by those kernels:

# %%
from llmlab.kernels.gpu import launch
from llmlab.kernels.gpu.geometry import AttentionKind

now = lengths - 1  # the position of each sequence's newest token
inputs = {name: as_torch(keep.rows[now]) for name, keep in kept.items()}
step = launch.Step(
    AttentionKind(heads, kv_heads, dim, BLOCK), scale, inputs["q"], inputs["k"], inputs["v"], as_torch(pool),
    torch.tensor([0, 1, 2], dtype=torch.int32), as_torch(lengths), as_torch(table), as_torch(now.astype(np.int64)),
    as_torch(cos), as_torch(sin),
)  # fmt: skip
turned, found = torch.empty(2, heads * dim), torch.empty(2, heads * dim)
launch.write(step, turned)
launch.decode(step, turned, found, splits=2)
expected = np.stack([paged[b][-1].reshape(-1) for b in range(2)])
print("both sequences:", compare(found.numpy(), expected))

# %% [markdown]
# ## 6 · The engine
#
# In the serving graph all of this is one node, for tokens of any mix of sequences. The engine's result was kept when the
# graph ran at the top. And an engine with that node writes the answer:

# %%
print("the engine's PagedAttention:", compare(kept["out"].rows, plain.reshape(T, -1)))
engine = ll.build(graph, "engines/attention-from-scratch")
with ll.LLM(engine) as llm:
    print(llm.chat(said[:1], ll.SamplingParams(max_tokens=32)).text)
