"""The generators: answers against independent oracles, splits that never meet, the same text in every process."""

from __future__ import annotations

import ast
import hashlib
import operator as operators
import os
import re
import subprocess
import sys

import pytest

from llmlab.errors import InputError
from llmlab.zoo.tasks import SPLITS, TASKS, Example, canonical, examples, split_of
from llmlab.zoo.tasks.capitals import CAPITALS
from llmlab.zoo.tasks.numbers import LANGUAGES, number_word
from llmlab.zoo.tasks.opposites import OPPOSITES


def turns_of(example: Example) -> list[str]:
    return [message["content"] for message in example.messages if message["role"] != "system"]


def digest(found: list[Example]) -> str:
    return hashlib.sha256(repr([(e.task, e.messages, e.answer) for e in found]).encode()).hexdigest()


def test_same_arguments_give_the_same_examples_in_every_process() -> None:
    code = (
        "from llmlab.zoo.tasks import examples; import hashlib;"
        "found = examples('train', 220, seed=3) + examples('held-out', 44, seed=3);"
        "print(hashlib.sha256(repr([(e.task, e.messages, e.answer) for e in found]).encode()).hexdigest())"
    )
    here = digest(examples("train", 220, seed=3) + examples("held-out", 44, seed=3))
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here
    assert digest(examples("train", 220, seed=4)) != digest(examples("train", 220, seed=3))


def test_more_examples_begin_with_the_same_ones() -> None:
    assert examples("held-out", 60)[:33] == examples("held-out", 33)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_two_splits(task: str) -> None:
    """Over large samples of several seeds; every chat counts with each of its earlier turns."""
    asked: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, count in (("train", 2000), ("calibration", 60), ("held-out", 150)):
        for seed in (0, 1):
            for example in examples(split, count, seed=seed, task=task):
                turns = turns_of(example)
                assert split_of(turns) == split
                asked[split] |= {canonical(turns[:end]) for end in range(1, len(turns) + 1, 2)}
    assert not asked["held-out"] & asked["train"]
    assert not asked["held-out"] & asked["calibration"]
    assert not asked["calibration"] & asked["train"]
    assert len(asked["held-out"]) >= 150


def test_the_split_ignores_case_spacing_and_closing_marks_only() -> None:
    one = split_of(["What is 3 + 4?"])
    assert one == split_of(["  what IS 3 +  4"])
    assert canonical(["What is 3 + 4?"]) != canonical(["What is 3 + 5?"])
    assert {split_of([f"prompt {n}"]) for n in range(200)} == set(SPLITS)


def test_outside_training_no_prompt_comes_twice() -> None:
    prompts = [canonical(turns_of(example)) for example in examples("held-out", 2200)]
    assert len(set(prompts)) == 2200


def test_all_tasks_in_turn() -> None:
    assert [example.task for example in examples("train", 2 * len(TASKS))] == [*TASKS, *TASKS]
    assert all(example.messages[-1]["role"] == "user" for example in examples("train", 500))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "test", "count": 1}, "held-out"),
        ({"split": "train", "count": 1, "task": "poetry"}, "counting"),
        ({"split": "train", "count": -1}, "-1"),
    ],
)
def test_wrong_arguments_are_one_line_that_says_what_is_expected(arguments: dict, named: str) -> None:
    with pytest.raises(InputError) as caught:
        examples(**arguments)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_more_distinct_prompts_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "opposites", lambda rng: ([f"Opposite of {rng.randrange(300)}?"], "none"))
    assert len(examples("held-out", 10, task="opposites")) == 10
    with pytest.raises(InputError, match="too few distinct opposites prompts for count=100: ask for fewer"):
        examples("held-out", 100, task="opposites")


def test_number_words_that_are_easy_to_get_wrong() -> None:
    expected = {
        "French": {21: "vingt et un", 71: "soixante et onze", 80: "quatre-vingts", 81: "quatre-vingt-un", 99: None},
        "German": {1: "eins", 16: "sechzehn", 17: "siebzehn", 21: "einundzwanzig", 30: "dreißig"},
        "Spanish": {16: "dieciséis", 22: "veintidós", 31: "treinta y uno", 100: "cien"},
        "Italian": {21: "ventuno", 23: "ventitré", 28: "ventotto", 88: "ottantotto"},
        "English": {0: "zero", 13: "thirteen", 40: "forty", 85: "eighty-five"},
    }
    expected["French"][99] = "quatre-vingt-dix-neuf"
    for language, words in expected.items():
        for number, word in words.items():
            assert number_word(number, language) == word
    for language in LANGUAGES:
        assert len({number_word(n, language) for n in range(101)}) == 101


def test_counting_to_nine_in_french() -> None:
    nine = [e for e in examples("train", 3000, task="counting") if re.search(r"to (nine|9) in French", e.prompt)]
    assert nine
    up = "un, deux, trois, quatre, cinq, six, sept, huit, neuf."
    assert {e.answer for e in nine if "from" not in e.prompt or "from one" in e.prompt} == {up}


def test_sums_are_right() -> None:
    solved = 0
    for example in examples("train", 1500, task="arithmetic"):
        found = re.match(r"(\d+) ([-+*/]) (\d+) = (-?\d+)", example.answer)
        if not found:
            a, b = (int(number) for number in re.findall(r"\d+", example.prompt))
            assert example.answer in (f"{max(a, b)} is larger.", f"{min(a, b)} is smaller.")
            continue
        a, operator, b, result = found.groups()
        python = {"+": operators.add, "-": operators.sub, "*": operators.mul, "/": operators.truediv}[operator]
        assert python(int(a), int(b)) == int(result)
        digits = re.findall(r"\d+", example.prompt)
        assert not digits or digits == [a, b]
        solved += 1
    assert solved > 1000


def test_spelled_and_reversed_words_come_from_the_prompt() -> None:
    for example in examples("train", 500, task="spelling"):
        assert example.answer.replace("-", "") in example.prompt
    backwards = 0
    for example in examples("train", 500, task="reversing"):
        if "," in example.answer:
            assert ", ".join(reversed(example.answer.split(", "))) in example.prompt
        else:
            assert example.answer.replace("-", "")[::-1] in example.prompt
            backwards += 1
    assert 200 < backwards < 480


def test_sorted_lists_are_sorted_and_hold_the_same_items() -> None:
    for example in examples("train", 500, task="sorting"):
        items = example.answer.split(", ")
        if items[0].isdigit():
            values = [int(item) for item in items]
            assert values in (sorted(values), sorted(values, reverse=True))
            assert sorted(re.findall(r"\d+", example.prompt)) == sorted(items)
        else:
            assert items == sorted(items)
            assert all(re.search(rf"\b{item}\b", example.prompt) for item in items)


def test_a_recalled_fact_stands_once_in_the_prompt_and_alone_has_its_key() -> None:
    long = 0
    for example in examples("train", 400, task="recall"):
        *notes, question = example.prompt.split("\n")
        lines = [line for note in notes for line in re.split(r"(?<=\.) ", note)]
        assert lines.count(example.answer) == 1
        long += len(example.prompt) > 1200
        key = re.search(r"value of (.+)\?", question) or re.search(r"code of the (.+)\?", question)
        if key:
            begins = (f"{key[1]}: ", f"The code of the {key[1]} is ")
            assert [line for line in lines if line.startswith(begins)] == [example.answer]
    assert long > 60


def test_facts_are_unambiguous() -> None:
    assert len(CAPITALS) > 140 and len(set(CAPITALS.values())) == len(CAPITALS)
    assert len(OPPOSITES) > 300 and all(OPPOSITES[OPPOSITES[word]] == word != OPPOSITES[word] for word in OPPOSITES)


def test_same_question_never_has_two_answers() -> None:
    answers: dict[str, str] = {}
    for task in TASKS:
        for example in examples("train", 3000, task=task):
            key = repr(turns_of(example))
            assert answers.setdefault(key, example.answer) == example.answer, key


def test_the_generators_need_the_core_install_only() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnxruntime=None, numpy=None);"
        "from llmlab.zoo.tasks import examples; print(len(examples('train', 11)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "11"


def test_answers_are_what_python_can_read_back() -> None:
    """No stray control characters, no blanks at the ends: exact match means what it says."""
    for example in examples("train", 1100):
        for text in (*turns_of(example), example.answer):
            assert text == text.strip()
            assert text.replace("\n", " ").isprintable()
            assert ast.literal_eval(repr(text)) == text
