"""What a model is shown: texts, chats, files and ids become the same sequences for the same seed, or one line that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Store

from llmlab import zoo
from llmlab.errors import InputError
from llmlab.quant.data import calibration_data, data_key, default_source, tokenizer_of
from llmlab.text.tokenizer import Tokenizer
from llmlab.zoo.tasks import split_of

TEXTS = [f"The number {n} comes after the number {n - 1}, and before {n + 1}. " * 8 for n in range(40)]
CHATS = [
    [{"role": "user", "content": f"Say {n}, please. " * 4}, {"role": "assistant", "content": "yes"}] for n in range(40)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(zoo.path())


def test_texts_and_ids_are_the_same_data(tokenizer: Tokenizer) -> None:
    found = calibration_data(TEXTS, tokenizer)
    assert [list(ids) for ids in found] == [tokenizer.encode(text) for text in TEXTS]
    again = calibration_data([list(ids) for ids in found])
    assert data_key(found) == data_key(again)
    assert data_key(found) != data_key(found[1:]) and data_key([np.arange(4)]) != data_key(
        [np.arange(2), np.arange(2, 4)]
    )


def test_chats_go_through_the_template(tokenizer: Tokenizer) -> None:
    found = calibration_data(CHATS, tokenizer)
    assert tokenizer.decode(found[3], skip_special_tokens=False).endswith("<|assistant|>yes<|end|>")
    asked = calibration_data([chat[:1] for chat in CHATS], tokenizer)
    assert tokenizer.decode(asked[3], skip_special_tokens=False).endswith("<|end|><|assistant|>")
    assert data_key(calibration_data([{"messages": chat} for chat in CHATS], tokenizer)) == data_key(found)


def test_long_texts_are_cut_and_many_are_chosen_from_by_seed(tokenizer: Tokenizer) -> None:
    found = calibration_data(["word " * 900], tokenizer, samples=7, length=100)
    assert [len(ids) for ids in found] == [100] * 7
    few = [calibration_data(TEXTS, tokenizer, samples=9, length=50, seed=seed) for seed in (0, 0, 1)]
    assert len(few[0]) == 9 and all(25 <= len(ids) <= 50 for ids in few[0])
    assert data_key(few[0]) == data_key(few[1]) != data_key(few[2])


def test_a_jsonl_file_in_all_spellings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": TEXTS[0]}), "", json.dumps({"messages": CHATS[0]}), json.dumps(TEXTS[1])]
    path.write_text("\n".join(lines))
    assert data_key(calibration_data(path, tokenizer)) == data_key(
        calibration_data([TEXTS[0], CHATS[0], TEXTS[1]], tokenizer)
    )
    path.write_text('{"prompt": "How many?", "answer": "Seven."}\n' * 40 + "[5, 6, 7]\n")
    pair = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]
    assert data_key(calibration_data(path, tokenizer)) == data_key(
        calibration_data([pair] * 40 + [[5, 6, 7]], tokenizer)
    )
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 20))
    some = [calibration_data(str(path), tokenizer, samples=8, seed=seed) for seed in (3, 3, 4)]
    assert len(some[0]) == 8 and data_key(some[0]) == data_key(some[1]) != data_key(some[2])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2: not valid JSON"),
        (b"\xff\xfe", "line 2: not valid JSON"),
        (b"[" * 200_000, "line 2: not valid JSON"),
        (b'{"prompt": "x"}', r'line 2: expected {"text": "…"}'),
        (b'[1, "2"]', "line 2: expected"),
        (b"[]", "line 2: expected"),
        (b'"' + b"x" * (1 << 20) + b'"', "line 2: more than 1,048,576 bytes"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tokenizer: Tokenizer, tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=said):
        calibration_data(path, tokenizer)


def test_files_that_are_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing.jsonl: can't be read \(No such file"):
        calibration_data(tmp_path / "missing.jsonl", tokenizer)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="can't be read"):
        calibration_data(tmp_path / "pipe.jsonl", tokenizer)
    with pytest.raises(InputError, match=r"expected a list of texts, the path of a .jsonl file, or 'tinychat'"):
        calibration_data("a text by itself", tokenizer)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "the calibration set is empty"),
        (["short"], "has 2 tokens in 1 sample, expected at least 256: give more or longer texts"),
        ([[1, 2], [3, -4]], "calibration sample 1 has the token id -4"),
        ([[0.5] * 300], "calibration sample 0 is a list, expected a text"),
        ([["a", "b"]], "calibration sample 0 is a list"),
        ([[1, [2]]], "calibration sample 0 is a list"),
        ([{"role": "user"}], r'calibration sample 0: expected {"text": "…"}'),
        ([[{"role": "nobody", "content": "x"}]], "calibration sample 0: the chat template refuses"),
        ([["\ud800" * 300]], "calibration sample 0"),
        (7, "calibration data is a int"),
    ],
)
def test_what_is_no_data_is_said(tokenizer: Tokenizer, source: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        calibration_data(source, tokenizer)


def test_sizes_and_tokenizers_that_are_missing(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="samples is 0, expected a whole number of at least 1"):
        calibration_data(TEXTS, tokenizer, samples=0)
    with pytest.raises(InputError, match="sample 0 is text, and there is no tokenizer"):
        calibration_data(TEXTS)


def test_the_zoos_model_has_a_split_of_its_own(store: Store) -> None:
    graph = store.serving("tinychat")
    assert default_source(graph) == "tinychat"
    own = tokenizer_of(graph)
    found = calibration_data("tinychat", own, samples=40)
    assert len(found) == 40 and data_key(found) == data_key(calibration_data("tinychat", own, samples=40))
    first = own.decode(found[0], skip_special_tokens=False).split("<|user|>")[1].split("<|end|>")[0]
    assert split_of([first]) == "calibration"
    with pytest.raises(InputError, match="needs a calibration: pass calibration="):
        default_source(store.serving("llama"))
    with pytest.raises(InputError, match="carries no tokenizer"):
        tokenizer_of(store.serving("llama"))
