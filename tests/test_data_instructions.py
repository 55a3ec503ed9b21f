"""Filters: every input goes somewhere and is counted there; worked answers are right and whole."""

import json
import math

import pytest

from realign_core.data import instructions as ins
from realign_core.data.formats import read
from realign_core.data.generator import Reply
from realign_core.errors import DataError


class Fixed:
    "Gives each prompt its own list of answers."
    name = "fixed"

    def __init__(self, answers, cut=()):
        self.answers, self.cut, self.asked = answers, cut, 0

    def reply(self, requests, seed=0):
        self.asked += len(requests)
        texts = [tuple(self.answers[r.prompt][: r.n]) for r in requests]
        return [Reply(r.key, t, None, tuple(x not in self.cut for x in t), self.name)
                for r, t in zip(requests, texts, strict=True)]


ANSWERS = {"a": ["good", "better"], "b": ["bad", "bad"], "c": ["", " "], "d": ["long", "long"], "e": ["odd", "odd"]}
SCORES = {"good": 0.8, "better": 0.9, "bad": 0.1, "long": 1.0, "odd": None}
ROWS = [{"prompt": p, "licence": "mine"} for p in ANSWERS]


def judge(row, answer):
    return SCORES[answer]


def test_every_input_is_kept_or_has_a_reason():
    made = ins.instructions(ROWS, Fixed(ANSWERS, cut=("long",)), judge, n=2)
    assert made.counts == {"kept": 1, "cut off": 1, "empty": 1, "not scored": 1, "below the threshold": 1}
    assert made[0]["messages"][-1]["content"] == "better" and made[0]["licence"] == "mine" and made[0]["score"] == 0.9
    assert [r["why"] for r in made.rejected] == ["below the threshold", "empty", "cut off", "not scored"]
    assert made.pass_rate == 0.2 and read(list(made), "sft")[0].messages


def test_answers_are_written_before_they_are_judged(tmp_path):
    source = Fixed(ANSWERS)
    with pytest.raises(DataError) as error:
        ins.instructions(ROWS, source, lambda row, answer: 1 / 0, n=2, out=tmp_path / "a.jsonl")
    assert error.value.row == 1 and source.asked == 5
    assert ins.instructions(ROWS, source, judge, n=2, out=tmp_path / "a.jsonl").counts["kept"] == 2
    assert source.asked == 5


@pytest.mark.parametrize("bad", [lambda r, a: "good", lambda r, a: math.nan, lambda r, a: [1], lambda r: 1.0])
def test_a_judge_that_is_not_usable_never_passes_anything(bad):
    with pytest.raises(DataError):
        ins.instructions(ROWS[:1], Fixed(ANSWERS), bad)


def test_a_rubric_decides_for_itself():
    class Rubric:
        def score(self, row, answer):
            return type("Scored", (), {"score": 1.0, "passed": answer == "good"})()
    made = ins.instructions(ROWS[:2], Fixed(ANSWERS), Rubric(), n=2)
    assert [r["messages"][-1]["content"] for r in made] == ["good"]


def test_prompts_that_are_conversations_stay_conversations():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    made = ins.keep_passing([{"prompt": turns, "answers": [{"text": "x", "finished": True}]}], lambda r, a: 1.0)
    assert made[0]["messages"] == [*turns, {"role": "assistant", "content": "x"}] and len(turns) == 2


@pytest.mark.parametrize(("text", "parts"), [
    ("<think>a</think>b", ("a", "b")), (" <think>\na\n</think>\n b ", ("a", "b")), ("<think>a", None),
    ("a</think>b", None), ("b", None), ("", None),
    ("<think> </think>b", None), ("<think>a</think> ", None), ("<think>a</think><answer>b</answer>", ("a", "b"))])
def test_thoughts_are_split_only_where_both_parts_are_there(text, parts):
    assert ins.split_thoughts(text) == parts


def _tried(*texts):
    return {"problem": "p", "verify": {"name": "number", "value": 4}, "licence": "mine",
            "responses": [{"text": t, "correct": True} for t in texts]}


def test_cold_start_verifies_again_and_keeps_the_shortest():
    rows = [_tried("<think>2+2=4 for sure</think>It is 4.", "<think>2+2=4</think>It is 4.", "<think>x</think>It is 5."),
            _tried("<think>x</think>It is 5."), _tried("It is 4."), _tried("<think>quick</think>4")]
    made = ins.cold_start(rows, lambda row, reasoning: "=" in reasoning)
    assert made.counts == {"kept": 1, "never right": 1, "no thoughts": 1, "thoughts not accepted": 1}
    assert made[0]["reasoning"] == "2+2=4" and made[0]["answer"] == "It is 4." and made[0]["licence"] == "mine"
    with_thoughts, without = (ins.worked_messages(made, thoughts)[0]["messages"][1]["content"] for thoughts in (True, False))
    assert with_thoughts == "<think>2+2=4</think>It is 4." and without == "It is 4."
    json.dumps(made)


def test_untried_problems_are_refused():
    with pytest.raises(DataError) as error:
        ins.cold_start([_tried("It is 4."), {"problem": "p", "verify": {"name": "number", "value": 4}}])
    assert error.value.row == 2
