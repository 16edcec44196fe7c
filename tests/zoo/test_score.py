"""Grading, and the one command that prints the scores."""

from __future__ import annotations

import json

import pytest

from llmlab.errors import InputError
from llmlab.zoo import score
from llmlab.zoo.tasks import TASKS, Message, examples


def test_grading_counts_exact_matches_by_task() -> None:
    chats = examples("held-out", 3 * len(TASKS))
    replies = [example.answer for example in chats]
    assert [s.share for s in score.grade(chats, replies)] == [1.0] * (len(TASKS) + 1)
    replies[0] = f"  {replies[0]}\n"  # blanks are forgiven,
    replies[1] += "!"  # nothing else is
    replies[2] = ""
    scores = {s.task: s for s in score.grade(chats, replies)}
    assert list(scores) == [*TASKS, "all"]
    assert (scores[chats[0].task].right, scores[chats[1].task].right, scores[chats[2].task].right) == (3, 2, 2)
    assert (scores["all"].right, scores["all"].total) == (len(chats) - 2, len(chats))


def test_replies_of_the_neighbour_are_wrong() -> None:
    chats = examples("held-out", 4 * len(TASKS))
    shifted = [example.answer for example in chats[1:] + chats[:1]]
    assert score.grade(chats, shifted)[-1].share < 0.1


def test_a_missing_reply_is_an_error() -> None:
    with pytest.raises(InputError, match="1 replies for 2 examples"):
        score.grade(examples("held-out", 2), ["one"])


def test_the_command_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answerer(*arguments: object) -> tuple[score.Answerer, str]:
        def answer(chats: list[list[Message]]) -> list[str]:
            return ["I don't know."] * len(chats)

        return answer, "a know-nothing"

    monkeypatch.setattr(score, "_answerer", answerer)
    assert score.main(["--count", "22", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["unknown"] == {"right": 2, "total": 2} and scores["all"] == {"right": 2, "total": 22}
    assert score.main(["--count", "22", "--wrong", "1"]) == 0
    printed = capsys.readouterr().out
    assert "a know-nothing" in printed and "9.1%" in printed and "counting: " in printed


def test_wrong_arguments_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert score.main(["--count", "-5"]) == 2
    assert capsys.readouterr().err == "error: count is -5, expected 0 or more\n"
