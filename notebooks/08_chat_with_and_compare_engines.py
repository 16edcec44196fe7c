# %% [markdown]
# # Chat with engines and compare them
#
# A quantized engine is smaller and faster, and numbers say how near it is to the original. But what does the difference *feel* like? This notebook
# talks to tinychat in float32, int8 and int4: two engines answer the same prompt side by side, and where they part one sees how sure each of
# them was. About a minute.

# %%
import llmlab as ll

graph = ll.optimize(ll.export("tinychat", progress=False))
engines = {
    "float32": ll.build(graph, "engines/chat-float32", overwrite=True),
    "int8": ll.build(ll.quantize(graph, "int8"), "engines/chat-int8", overwrite=True),
    "int4": ll.build(ll.quantize(graph, "int4_rtn"), "engines/chat-int4", overwrite=True),
}
for name, engine in engines.items():
    print(f"{name:8} {engine.size / 1e6:5.1f} MB")
engines["int4"]

# %% [markdown]
# ## One engine
#
# `ll.chat` opens a panel: type, press Enter, and the answer streams in. **Stop** ends it before its next token. Any message can be edited and any answer
# asked for again. Point at a token (or walk with the arrow keys) to see how likely it was and what could have come instead; click for a
# table. Tokens to which the engine gave less than even odds are underlined with dots.
#
# `ask` does from Python what typing does:

# %%
single = ll.chat(engines["float32"], system="You are tinychat, a small and friendly assistant.")
single.ask("Who are you?")
single.ask("What is 17 plus 25?")
single

# %% [markdown]
# The conversation is data, with all that the panel shows:

# %%
last = single.to_dict()["turns"][-1]["answers"][0]
print(single.messages[-1])
for token in last["tokens"]:
    print(f"{token['label']:12} {token['probability']:.4f}")

# %% [markdown]
# ## Two engines, one prompt
#
# With two engines both answer each message. The first token in which they differ is marked (≠) and said in words; the table at the bottom shows what each
# of them could have said there.

# %%
pair = ll.chat(engines["float32"], engines["int4"], names=["float32", "int4"])
pair.ask("How do I count to nine in French?")
turn = pair.ask("What is the capital of Italy?")
assert turn.first_difference is None
pair

# %% [markdown]
# What tinychat was trained on, int4 says token for token alike. Now something that it was *not* trained on. It can turn short words
# round, but was never asked like this, nor for words of this length:

# %%
apart = ll.chat(engines["float32"], engines["int4"], names=["float32", "int4"])
turn = apart.ask("Spell backwards: precision")
apart

# %%
place = turn.first_difference
print(turn.comparison())
if place is not None:
    for answer in turn.answers:
        shares = {choice.label: choice.probability for choice in answer.tokens[place].top}
        print(f"{answer.engine:8}", ", ".join(f"{label} {share:.0%}" for label, share in shares.items()))

# %% [markdown]
# That is how engines part: quantization moves probabilities a little everywhere, and that shows where two tokens were nearly as likely.
# From the first different token on the two read different texts, so all later differences follow from it. How unsure float32
# itself was before and at that place:

# %%
reference = turn.answers[0]
for index, token in enumerate(reference.tokens):
    mark = " ≠" if index == place else ""
    print(f"{index + 1:3} {token.label:10} {token.probability:7.1%}  {'█' * round(40 * token.probability)}{mark}")

# %% [markdown]
# ## Sampling
#
# At temperature 0 the most likely token always wins. With a temperature tokens are drawn; with the same seed both engines draw the same numbers. So
# they mostly say the same as long as their probabilities are nearly the same, but a number that falls near the edge between two tokens can go either
# way, however near the two engines are:

# %%
drawn = ll.chat(
    engines["float32"],
    engines["int8"],
    names=["float32", "int8"],
    params=ll.SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=40),
)
drawn.ask("Spell backwards: precision")
drawn.ask("Tell me something about the sea.")
drawn

# %% [markdown]
# ## In numbers
#
# One prompt is an anecdote. `ll.compare` asks many held-out chats and measures how far apart the distributions are (KL), how often the answers are exactly
# alike, what each engine costs, and how sure one can be of it:

# %%
comparison = ll.compare(["int8", "int4_rtn"], graph=graph, samples=11, rounds=1)
comparison

# %% [markdown]
# What was opened is closed again:

# %%
for panel in (single, pair, apart, drawn):
    panel.close()
