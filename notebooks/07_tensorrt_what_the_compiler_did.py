# %% [markdown]
# # TensorRT: what the compiler did
#
# TensorRT takes a graph and gives back a plan: kernels that it chose or wrote itself, with nodes fused in ways that no file tells. This
# notebook builds tinychat with TensorRT-RTX, which compiles on a machine without a GPU, and looks at what became of each node of the
# serving graph: for steps of one token and for prompts, in float16, int8 and int4, and with attention inside the plan or beside it.
# It takes about a minute on two cores. Where an NVIDIA GPU is that the plans fit, the last part runs them.

# %%
from pathlib import Path

import llmlab as ll
from llmlab.build_tensorrt import kernels_for

FOLDER = Path("engines/07")
graph = ll.optimize(ll.export("tinychat", progress=False))
graph

# %% [markdown]
# ## A build, watched
#
# Attention is not TensorRT's own here: `PagedAttention` runs as a plugin that launches kernels of llmlab, compiled ahead of time for
# the GPU that is named. `watch_build` builds in a thread of its own and says what takes how long. In a live notebook its Stop button
# ends the build, and nothing half-written stays.

# %%
ADA = {"compute_capabilities": ((8, 9),), "max_batch": 8, "max_tokens_per_step": 256}
config = ll.BuildConfig(attention="plugin", **ADA)
building = ll.watch_build(
    graph, FOLDER / "float16", target="tensorrt-rtx", config=config, max_seq_len=512, overwrite=True
)
float16 = building.result()
building

# %% [markdown]
# ## One token at a time
#
# The builder lists the layers of each plan with the ONNX nodes that each came from, and the build has written down which nodes of the
# serving graph became those. Together they say where every node is now. Unfold a row to see its nodes. Layers that are alike in
# all transformer layers are one row.

# %%
view = ll.inspect(float16)
view

# %% [markdown]
# These are the kernels of a decode step, the plan's first optimization profile: one row of numbers. A matrix times one row is a sum
# over rows (`MulSum`), so TensorRT wrote kernels for that, and put neighbours into them: look for `SiluMulReshMulSumAdd`. It is
# the activation, the product with the gate, `down_proj` and the sum with the residual, all in one kernel. RMS norms take the residual's
# sum along, and the lookup of the token's embedding is part of the first norm.

# %%
for layer in view.measured[0].layers:
    if layer.layer == "model.layers.2" and "decode" in layer.phases:
        print(f"{layer.name}: {', '.join(layer.kernels)}")
        for node in layer.nodes:
            print(f"    {node}")

# %% [markdown]
# ## Prompts
#
# The last profile is for prompts. Now there are many rows, the tensor cores pay, and the same nodes are cut differently: products are
# `gemm` and `runtime_fusion`, the activation is a kernel by itself.

# %%
view.act("phase", value="prefill")
view

# %% [markdown]
# ## Precisions, layer by layer
#
# The same model with int4 weights, with int8 weights and activations, and with fp8 on both sides. Kernels that multiply are compiled with llmlab's own once,
# and given to each build.

# %%
kernels = kernels_for(graph, config)
made = {"float16": float16}
for recipe in ("int4_rtn", "int8_w8a8", "fp8"):
    calibration = None if recipe == "int4_rtn" else "tinychat"
    quantized = ll.quantize(graph, recipe, calibration=calibration)
    made[recipe] = ll.build(
        quantized,
        FOLDER / recipe,
        target="tensorrt-rtx",
        config=config,
        kernels=kernels,
        max_seq_len=512,
        overwrite=True,
    )
ll.inspect(made["float16"], made["int4_rtn"])

# %% [markdown]
# Two engines are laid beside each other by the serving nodes that their layers compute, not by names: where one fused what the other
# kept apart, the row is the smallest group that both have. Without a GPU there are no times, and so nothing is won or lost; the precisions
# can be read. Weights of int4 are unpacked inside the product (`ReplCastMulCastFc`): no other kernel sees them. The head stays in
# float16, since it is tied to the embedding.

# %%
ll.inspect(made["float16"], made["int8_w8a8"])

# %% [markdown]
# With int8 on both sides, products are integer products (`int8 × int8`), and rounding moved into the kernels in front of them: `MinMaxRounCast`
# at the end of a norm's name is the QuantizeLinear behind it.

# %%
ll.inspect(made["int8_w8a8"], made["fp8"])

# %% [markdown]
# fp8 is cut in the same way, into products of `fp8 × fp8`. Where int8 clamps and rounds (`MinMaxRounCast`), it has one cast.
#
# How many kernels a decode step launches, and how many bytes it moves:


# %%
def row(name, engine):
    found = ll.layers(engine)
    mine = [layer for layer in found.layers if "decode" in layer.phases]
    launches = sum(len(layer.kernels) for layer in mine)
    return f"{name:12} {launches:4} kernels  {found.bytes('decode') / 1e6:6.2f} MB  {found.flops('decode') / 1e6:6.1f} M operations"


for name, engine in made.items():
    print(row(name, engine))

# %% [markdown]
# ## Attention beside the plan
#
# A TensorRT without Python plugins (8.6) gets the same model in pieces: the graph is cut at attention and at large products, llmlab's
# kernels run between the pieces, and identical pieces share one plan. What is left for TensorRT is little: lookups and gathers. The view
# shows kernels of ours and of TensorRT in the order in which a step runs them.

# %%
piecewise = ll.BuildConfig(attention="piecewise", **ADA)
made["piecewise"] = ll.build(
    graph, FOLDER / "piecewise", target="tensorrt-rtx", config=piecewise, max_seq_len=512, overwrite=True
)
ll.inspect(made["piecewise"])

# %%
print(row("piecewise", made["piecewise"]))

# %% [markdown]
# ## On a GPU
#
# Plans run on GPUs of the compute capability that they were built for. There the same view has times, and `ll.LLM` answers.

# %%
from llmlab.tensorrt.gpu import visible_gpu

gpu = visible_gpu()
if gpu is not None and gpu.compute_capability == (8, 9):
    with ll.LLM(made["piecewise"]) as llm:
        print(llm.generate("How do I count to nine in French?", ll.SamplingParams(max_tokens=32)).text)
else:
    print(f"these plans are for compute capability 8.9; here is {gpu.name if gpu else 'no NVIDIA GPU'}")
