"""Tokenizer, incremental detokenization, stop strings and chat templates, against tokenizers and transformers."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmlab.errors import InputError, LlmlabError
from llmlab.text import chat_template, template_sandbox
from llmlab.text.chat_template import ChatTemplate
from llmlab.text.detokenizer import Detokenizer, StopStrings
from llmlab.text.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat",
    "naïve café, déjà vu",
    "你好，世界！ 👋🏽 ありがとう",
    "x = [1, 2, 3]\n\treturn  x",
] * 5
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with BOS added by its post-processor, special and plain added tokens, and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>", "日本"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


# Encoding


def test_encode_adds_bos_as_the_post_processor_does(folder: Path, tokenizer: Tokenizer) -> None:
    reference = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("the cat") == reference.encode("the cat").ids
    assert tokenizer.encode("the cat")[0] == 0
    assert tokenizer.encode("the cat", add_special_tokens=False) == tokenizer.encode("the cat")[1:]
    assert tokenizer.decode(tokenizer.encode("你好 the cat")) == "你好 the cat"


def test_a_length_limit_stored_in_the_file_is_not_applied(folder: Path, tmp_path: Path) -> None:
    limited = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat " * 3
    assert Tokenizer(tmp_path).encode(text) == Tokenizer(folder).encode(text)


def test_chat_prompt_has_one_bos_and_equals_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": " the cat "},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "?"},
    ]
    text, ids = tokenizer.encode_chat(messages)
    assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(0) == 1


def test_missing_and_damaged_files_are_input_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json: give token ids"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(InputError, match="not a readable tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    plain = Tokenizer(tmp_path)
    assert not plain.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object"):
        Tokenizer(tmp_path)


def test_text_that_is_not_unicode_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="can't be tokenized"):
        tokenizer.encode("\ud800")


# Incremental detokenization


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_full_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random ids: broken UTF-8 everywhere, special tokens, added tokens, ids that the vocabulary doesn't have."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=60))
    detokenizer = Detokenizer(tokenizer)
    pieces = []
    while ids:
        take = data.draw(st.integers(1, 4))
        head, ids = ids[:take], ids[take:]
        pieces.append((head, detokenizer.push(head)))
    text = "".join(piece for _, piece in pieces) + detokenizer.finish()
    assert text == tokenizer.decode([i for head, _ in pieces for i in head])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_half_characters_are_shown(tokenizer: Tokenizer, text: str) -> None:
    detokenizer, shown = Detokenizer(tokenizer), ""
    for token_id in tokenizer.encode(text):
        shown += detokenizer.push([token_id])
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


def test_a_character_over_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙", add_special_tokens=False)
    assert len(ids) > 1, "the corpus must not hold this character"
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["🦙"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]) == "" and detokenizer.finish() == "�"


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The decoder of Llama 2 and Mistral: ▁ for spaces, byte fallback, the first space stripped."""
    folder = tmp_path_factory.mktemp("metaspace")
    words = ["<unk>", "▁the", "▁cat", "s", "▁", "a", "▁mat"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = HFTokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(["the", "cat", "s", " ", "a", "mat", "é", "好", "👋"]), max_size=30))
def test_byte_fallback_tokenizers_stream_valid_text(metaspace: Tokenizer, parts: list[str]) -> None:
    assert not metaspace.byte_level
    words = {"the": [1], "cat": [2], "s": [3], " ": [4], "a": [5], "mat": [6]}
    ids = [i for part in parts for i in words.get(part) or [7 + byte for byte in part.encode()]]
    detokenizer, shown, full = Detokenizer(metaspace), "", metaspace.decode(ids)
    for token_id in ids:
        shown += detokenizer.push([token_id])
        assert full.startswith(shown)
    assert shown + detokenizer.finish() == full


def test_byte_fallback_with_broken_bytes_does_not_wait_for_ever(metaspace: Tokenizer) -> None:
    detokenizer = Detokenizer(metaspace)
    shown = "".join(detokenizer.push([7 + 0x80]) for _ in range(50))
    assert len(shown) >= 40
    assert detokenizer.push([1]).endswith("the")


def test_cost_of_a_token_does_not_grow(tokenizer: Tokenizer, metaspace: Tokenizer) -> None:
    for one, token_id in ((tokenizer, 50), (metaspace, 5)):
        detokenizer = Detokenizer(one)
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(400):
                detokenizer.push([token_id])
            seconds.append(time.perf_counter() - started)
        assert min(seconds[-3:]) < 5 * min(seconds[:3])


# Stop strings


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(end, -len(stop)) for end in range(1, len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    expected = text[: min(ends)[0] + min(ends)[1]] if ends else text
    finder, shown, rest, stopped = StopStrings(stops), "", text, False
    for cut in cuts:
        piece, rest = rest[:cut], rest[cut:]
        safe, stopped = finder.push(piece)
        shown += safe
        assert expected.startswith(shown), "shown text is never taken back"
        if stopped:
            break
    if not stopped:
        shown += finder.finish()
    assert (shown, stopped) == (expected, bool(ends))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["\n\nUser:"])
    assert finder.push("hello\n") == ("hello", False)
    assert finder.push("world\n\nUs") == ("\nworld", False)
    assert finder.push("ed") == ("\n\nUsed", False)
    assert finder.push("\n\nUser: hi") == ("", True)


# Chat templates

QWEN_LIKE = """
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" %}{%- set ns.multi_step = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' ~ content }}
        {%- if message.tool_calls %}{%- for call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {{- call.name ~ ' ' ~ (call.arguments | tojson(indent=2)) }}{{- ',' if not loop.last }}
        {%- endfor %}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "skipped" %}{%- continue %}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA_LIKE = """
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set loop_messages = messages[1:] %}
{%- else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{{ bos_token }}{% if system %}<<SYS>>{{ system }}<</SYS>>{% endif %}
{% for m in loop_messages %}
    {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
    {%- else %}{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}
    {%- endif %}
{% endfor %}
{{ {'a': [1, 2.5, none, true], 'é': '<&>'} | tojson }}{{ messages | map(attribute='role') | join(', ') }}
{%- macro shout(x) %}{{ x | upper }}!{% endmacro %}{{ shout('ok') }}{{ "%s-%03d" % ('n', 7) }}{{ "{}:{:>4}".format('k', 1) }}
{{- dict(a=1).items() | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ strftime_now('%Y') }}
{{- 'a b c'.replace(' ', '_') }}{{ 'x' * 3 }}{{ (7 / 2) | round(1) }}{{ ['b', 'a'] | sort | join }}{{ 2 ** 10 }}{{ 5000 * 5000 + 10 ** 9 }}{{ [1] * 3 + [-2] }}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": "naïve <b>"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm\n</think>\nb", "name": None},
        {"role": "user", "content": "c"},
    ],
    [
        {"role": "user", "content": "w"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [1, "é"]}}]},
    ],
]


@pytest.mark.parametrize("template", [QWEN_LIKE, LLAMA_LIKE, TEMPLATE], ids=["qwen", "llama", "chatml"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "tools": [{"type": "function", "name": "f"}]}])
def test_rendering_equals_transformers(folder: Path, template: str, messages: list, variables: dict) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "<|im_end|>"})
    theirs = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    assert ours.render(messages, variables) == theirs


def test_the_template_can_refuse() -> None:
    template = ChatTemplate(LLAMA_LIKE, {"bos_token": ""})
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        template.render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "a list of messages, not str"),
        ([], "conversation is empty"),
        (["hi"], "message 0 is 'hi'"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "message 1 is"),
        ([{"role": "user"}], "has no 'content'"),
    ],
)
def test_malformed_messages(messages: list, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ChatTemplate(TEMPLATE).render(messages)


PEEKING = {
    "a class": "{{ ''.__class__ }}",
    "a filter": "{{ '{0.__class__}'.format(messages) }}",
    "map": "{{ [''] | map(attribute='__class__') | join }}",
    "globals of a helper": "{{ raise_exception.__globals__ }}{{ namespace.__init__ }}{{ range.mro }}",
    "the environment": "{{ self._TemplateReference__context }}{{ loop }}{{ cycler }}{{ lipsum }}",
}
HOSTILE = {
    "dunder": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "globals of a helper": "{{ raise_exception.__globals__['sys'] }}",
    "format reaches attributes": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "map reaches attributes": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "mutates the messages": "{{ messages.append(1) }}",
    "private namespace attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.x }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "nested loops in a filter": "{% for a in range(90000) %}{% set x = range(90000) | map('string') | join %}{% endfor %}",
    "endless macros": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "long string": "{{ 'a' * 10**10 }}",
    "long list": "{{ [1] * 10**9 }}",
    "constant folding": "{{ 'a' * 10000000000 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling with tilde": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling with join": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = [n.s, n.s]|join %}{% endfor %}",
    "doubling with replace": "{% set n = namespace(s='aa') %}{% for i in range(99) %}"
    "{% set n.s = n.s.replace('a', 'aa') %}{% endfor %}",
    "doubling with block set": "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "repeating in a block set": "{% set s = 'a' * 10**7 %}{% set x %}{% for i in range(90000) %}{{ s }}{% endfor %}{% endset %}",
    "huge power": "{{ 10 ** 10 ** 9 }}",
    "power of a tower": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "wide padding": "{{ 'x'.ljust(10**10) }}",
    "wide center": "{{ 'x' | center(10**10) }}",
    "wide format": "{{ '{:10000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10**10) }}",
    "wide percent": "{{ '%10000000000d' % 1 }}",
    "star percent": "{{ '%*d' % (10**10, 1) }}",
    "wide indent": "{{ 'a\nb' | indent(10**10) }}",
    "wide json": "{{ [1] | tojson(indent=10**10) }}",
    "huge precision": "{{ 1.5 | round(10**9, 'floor') }}",
    "bytes of an int": "{{ (1).to_bytes(10**10, 'big') }}",
    "long output": "{% for i in range(90000) %}{{ 'a' * 10000 }}{% endfor %}",
    "lorem": "{{ lipsum(n=10**6) }}",
    "syntax": "{% if %}",
    "unfinished": "{% for x in messages %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", PEEKING)
def test_python_is_out_of_sight(name: str) -> None:
    assert ChatTemplate(PEEKING[name]).render([{"role": "user", "content": "x"}]) == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error_soon(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.5)
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LlmlabError) as caught:
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB
    assert "\n" not in str(caught.value)


def test_objects_in_messages_are_not_handed_to_the_template() -> None:
    class Trap:
        def fire(self) -> str:
            raise AssertionError("called")

    template = ChatTemplate("{{ messages[0].content.fire() }}")
    with pytest.raises(InputError):
        template.render([{"role": "user", "content": Trap()}])
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": Trap()}]) == "<Trap>"


def test_variables_can_be_anything_but_the_messages() -> None:
    message = {"role": "user", "content": "x"}
    template = ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}{{ self }}{{ environment }}")
    assert template.render([message], {"messages": 1, "add_generation_prompt": 0, "environment": 2}).startswith("x0")
    loop: list = []
    loop.append(loop)
    with pytest.raises(InputError, match="64 levels"):
        template.render([{**message, "parts": loop}])
    with pytest.raises(InputError, match="64 levels"):
        template.render([message], {"tools": loop})


def test_template_size_is_limited(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the limit is"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARS + 1))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("x" * (5 * chat_template.MAX_TEMPLATE_CHARS))
    with pytest.raises(InputError, match="at most"):
        Tokenizer(tmp_path)


def test_long_conversations_stay_within_the_budget() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(400)]
    text = ChatTemplate(QWEN_LIKE).render(messages)
    assert text.count("<|im_start|>") == 401
