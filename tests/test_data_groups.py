"""Groups: what is lost is counted, what a score function does wrong is named, and nothing is invented."""

import json
import math

import numpy as np
import pytest

from realign_core.data import groups as g
from realign_core.data.generator import Reply
from realign_core.data.rubric import Criterion, Rubric
from realign_core.errors import DataError, OutputError


class Counting:
    "Answers 0, 1, 2, … to each prompt."
    name = "counting"

    def reply(self, requests, seed=0):
        return [Reply(r.key, tuple(str(i) for i in range(r.n)), None, (True,) * r.n, self.name) for r in requests]


ROWS = [{"prompt": f"p{i}", "licence": "mine", "value": i} for i in range(5)]


def test_groups_keep_fields_order_and_scores():
    made = g.groups(ROWS, Counting(), lambda row, answer: float(answer) + row["value"], n=3)
    assert [r["prompt"] for r in made] == [f"p{i}" for i in range(5)] and all(r["licence"] == "mine" for r in made)
    assert [x["score"] for x in made[4]["responses"]] == [4, 5, 6]


def test_a_rubric_scores_groups_and_a_file_is_not_continued_under_another_one(tmp_path):
    def rubric(weight):
        return Rubric([Criterion("odd", "Is it odd?", weight, function=lambda row, answer: int(answer) % 2 == 1),
                       Criterion("small", "Is it below 3?", function=lambda row, answer: int(answer) < 3)])
    made = g.groups(ROWS, Counting(), rubric(1.0), n=4, out=tmp_path / "g.jsonl")
    assert [x["score"] for x in made[0]["responses"]] == [0.5, 1.0, 0.5, 0.5]
    assert g.groups(ROWS, Counting(), rubric(1.0), n=4, out=tmp_path / "g.jsonl") == made
    with pytest.raises(OutputError):
        g.groups(ROWS, Counting(), rubric(3.0), n=4, out=tmp_path / "g.jsonl")


def test_an_answer_without_a_score_is_counted_not_lost():
    made = g.groups(ROWS, Counting(), lambda row, answer: None if answer == "1" else 1.0, n=3)
    assert all(len(r["responses"]) == 2 and r["unscored"] == 1 for r in made)
    assert g.report(made).unscored == 5 and "5 answers" in g.report(made)._repr_markdown_()


@pytest.mark.parametrize("score", [lambda r, a: 1 / 0, lambda r, a: float("nan"), lambda r, a: float("inf"), lambda r, a: "good",
                                   lambda r, a: [1], lambda r: 1.0])
def test_a_bad_score_function_is_named_with_its_row(score):
    with pytest.raises(DataError) as error:
        g.groups(ROWS, Counting(), score)
    assert error.value.row == 1


def test_a_reward_that_crashes_on_the_empty_string_is_found():
    found = {c["case"]: c["ok"] for c in g.probe_score(lambda row, answer: float(answer[0] == "I"), ROWS[:2])}
    assert found["empty"] is False and found["code"] is True
    assert all(c["ok"] for c in g.probe_score(lambda row, answer: float(answer[:1] == "I"), ROWS))
    assert not any(c["ok"] for c in g.probe_score(lambda row, answer: math.nan, ROWS[:1]))


def test_a_score_that_fails_on_one_row_only_is_found():
    cases = g.probe_score(lambda row, answer: 1.0 / row["value"], ROWS)
    assert not any(c["ok"] for c in cases) and "ZeroDivisionError" in cases[0]["outcome"]


def test_a_file_is_not_continued_under_another_score(tmp_path):
    def first(row, answer): return 0.0
    def second(row, answer): return 1.0
    made = g.groups(ROWS, Counting(), first, out=tmp_path / "g.jsonl")
    assert g.groups(ROWS, Counting(), first, out=tmp_path / "g.jsonl") == made
    with pytest.raises(OutputError):
        g.groups(ROWS, Counting(), second, out=tmp_path / "g.jsonl")


def test_rubrics_are_scores_too():
    class Rubric:
        def score(self, row, answer):
            return type("Scored", (), {"score": float(answer), "passed": True})()
    assert [x["score"] for x in g.groups(ROWS[:1], Counting(), Rubric(), n=2)[0]["responses"]] == [0, 1]
    with pytest.raises(DataError):
        g.scorer("a string")


@pytest.mark.parametrize("rows", [[{}], [{"prompt": ""}], [{"prompt": 3}], [{"problem": None}]])
def test_nothing_to_ask_is_a_data_error(rows):
    with pytest.raises(DataError):
        g.groups(rows, Counting(), lambda r, a: 1.0)
    with pytest.raises(DataError):
        g.groups(ROWS, Counting(), lambda r, a: 1.0, n=1)


def test_advantages_are_centred_scale_free_and_zero_without_spread():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=8)
        a = g.advantages(scores)
        assert abs(a.sum()) < 1e-9 and np.allclose(a, g.advantages(1000 * scores + 5), atol=1e-2)
        assert (np.argsort(a) == np.argsort(scores)).all()
    for scores in ([], [1.0], [0.1] * 7, [1e9] * 4):
        assert not np.round(g.advantages(scores), 6).any() and g.no_signal(scores)


@pytest.mark.parametrize("row", [{}, {"responses": "x"}, {"responses": [{"text": "a"}]}, {"responses": ["a"]},
                                 {"responses": [{"text": "a", "score": "x"}]}, {"responses": [{"text": "a", "score": math.nan}]}])
def test_report_and_best_of_refuse_what_is_no_group(row):
    with pytest.raises(DataError) as error:
        g.report([{"responses": []}, row])
    assert error.value.row == 2
    with pytest.raises(DataError):
        g.best_of([{"prompt": "p", **row}])
    with pytest.raises(DataError):
        g.report([])


def test_best_of_leaves_out_groups_without_a_best_and_keeps_messages():
    def group(prompt, *scores): return {"prompt": prompt, "x": 1, "responses": [{"text": str(s), "score": s} for s in scores]}
    turns = [{"role": "user", "content": "hi"}]
    made = g.best_of([group("a", 1, 1), group("b", 0, 1, 1), group(turns, 0, 2), group("d")])
    assert made == [{"prompt": "b", "x": 1, "completion": "1", "score": 1},
                    {"prompt": turns, "x": 1, "completion": [{"role": "assistant", "content": "2"}], "score": 2}]
    json.dumps(made)


def test_report_by_level_counts_all_zero_groups():
    def group(level, *scores): return {"difficulty": {"task": level}, "responses": [{"text": "", "score": s} for s in scores]}
    rows = {r["level"]: r for r in g.report([group("a", 0, 0), group("a", 0, 1), group("b", 1, 1)]).rows}
    assert rows["a"]["without signal"].value == 0.5 and rows["a"]["of which all zero"] == 1
    assert rows["b"]["of which all zero"] == 0
