# %% [markdown]
# # The precision lab
#
# Fewer bits make an engine smaller and often faster, and its answers a little different. How much smaller, how much faster, how
# different: that depends on the model, the machine and the recipe, so it has to be measured. This notebook does so with
# tinychat: five recipes side by side, where in the model the errors come from, and a search that mixes precisions
# under a byte budget. About a minute and a half on two cores.

# %%
import plotly.io as pio

import llmlab as ll

pio.renderers.default = "plotly_mimetype"  # figures as data, without scripts in the saved notebook
graph = ll.optimize(ll.export("tinychat", progress=False))
graph

# %% [markdown]
# ## A recipe
#
# A recipe says what becomes of weights, activations and the KV cache. It has a name, and a form that one can read and change:

# %%
recipe = ll.Recipe.parse("int4_rtn")
print(recipe)
print(ll.Recipe.parse({"base": "int4_rtn", "layers": {"*.down_proj": "int8"}, "name": "mine"}).to_yaml())

# %% [markdown]
# `quantize` gives the same serving graph with `DequantizeLinear` nodes in front of its products: plain ONNX, which every target
# lowers to what it has. The last entry of its history says what each projection got, and which stayed wide and why.

# %%
ll.quantize(graph, recipe).history[-1]

# %% [markdown]
# ## Five recipes
#
# `compare` builds an engine for each, beside the model as it is, and runs all of them on held-out chats. Logits come from the engines as
# they run. KL is the divergence from the float32 engine's distribution, per token of the answers; every number has a 95 %
# interval, from resampling chats. Costs are measured in a fresh process for each engine.

# %%
RECIPES = ["int8", "int8_dynamic", "int4_rtn", "int4_gptq", "int3_rtn"]
comparison = ll.compare(RECIPES, graph=graph, calibration="tinychat", samples=22, rounds=1, price_per_hour=0.40)
comparison

# %% [markdown]
# tinychat was trained to be sure of its answers, so even int3 gets nearly all of them right. KL tells apart what exact match
# can't.
#
# A row with × is one to forget: another one is no worse in accuracy, speed and size. The same as a figure; markers are as
# large as the engines, further down is more accurate, further right is faster:

# %%
comparison.figure()

# %%
by_name = {row["name"]: row for row in comparison.to_dict()["rows"]}
for name in ("int8", "int4_rtn", "int3_rtn"):
    kl = by_name[name]["accuracy"]["kl"]
    print(f"{name:10} KL {kl['value']:.1e} from {kl['low']:.1e} to {kl['high']:.1e}")
assert by_name["int8"]["accuracy"]["kl"]["value"] < by_name["int3_rtn"]["accuracy"]["kl"]["value"]

# %% [markdown]
# ## Where it comes from
#
# `sensitivity` quantizes one part at a time and leaves all else as it is. Here a part is what one product multiplies by (q, k and v
# share one); `by="projection"`, the default, looks at each by itself and takes longer.

# %%
LAB = {"samples": 11, "cache": "engines/measured"}
sensitivity = ll.sensitivity(graph, "int4_rtn", by="product", **LAB)
sensitivity

# %% [markdown]
# The note below the map compares the sum of all parts with all of them at once. Where the two are near each other,
# errors add up, and a precision can be chosen for each part by itself.
#
# ## A mix under a byte budget
#
# `search` does that: each candidate on each product, then the assignment with the least KL that fits (a multiple-choice knapsack), which is
# built and measured before anyone believes it. The budget here lies halfway between int4 and int8 everywhere.

# %%
sizes = {name: by_name[name]["cost"]["size_bytes"] for name in ("int4_rtn", "int8")}
budget = sum(sizes.values()) // 2
found = ll.search(graph, ["int8", "int4_rtn"], max_bytes=budget, **LAB)
found

# %%
int4 = found.uniform["int4_rtn"]
assert found.measured.size_bytes <= budget and found.measured.kl.value < int4.kl.value
print(f"{int4.kl.value / found.measured.kl.value:.1f} times nearer to float32 than int4 everywhere")

# %% [markdown]
# ## By hand
#
# The same choice as an instrument: the slider is the budget, the map says what each product gets. A click keeps one as you want it, and the
# expected KL and size move along; "Build this" makes the engine. (These are the numbers that `search` measured, from the cache.)

# %%
explorer = ll.explore(graph, [ll.sensitivity(graph, "int8", by="product", **LAB), sensitivity], comparison)
explorer

# %% [markdown]
# What was found is a recipe like any other, and makes an engine like any other:

# %%
engine = ll.build(ll.quantize(graph, found.recipe), "engines/searched", overwrite=True)
with ll.LLM(engine) as llm:
    print(llm.chat([{"role": "user", "content": "How do I count to nine in French?"}]).text)
engine
