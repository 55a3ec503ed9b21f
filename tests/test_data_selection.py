"""What is selected, against rules written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from realign_core.data.formats import read
from realign_core.data.selection import best, difficulty, diverse_order, features, ifd_scores, mine, probability_scores
from realign_core.errors import DataError

ROWS = [{"prompt": f"question number {i}", "completion": f"the answer is {i}"} for i in range(12)]


@pytest.mark.parametrize("seed", range(5))
def test_best_takes_the_highest_and_never_what_has_no_value(seed):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(50) < 0.3, np.nan, rng.integers(0, 6, 50))
    eligible = [i for i in range(50) if not np.isnan(values[i])]
    wanted = sorted(sorted(eligible, key=lambda i: (-values[i], i))[:12])
    assert best(values, 12).tolist() == wanted
    assert best(values, 12, lowest=True).tolist() == sorted(sorted(eligible, key=lambda i: (values[i], i))[:12])
    assert best(values, 500).tolist() == eligible


@pytest.mark.parametrize(("values", "number"), [([1.0], 0), ([[1.0]], 1)])
def test_best_refuses(values, number):
    with pytest.raises(DataError):
        best(values, number)


def test_diversity_takes_one_of_each_kind_first():
    kinds = {"a": "tell me the colour of the old grey heron by the lake", "b": "sing a song of the sea for my little sister now",
             "c": "which seven numbers stand between forty and ninety nine please"}
    rows = [{"prompt": f"{text} {i}", "kind": k} for k, text in kinds.items() for i in range({"a": 30, "b": 5, "c": 1}[k])]
    order = np.argsort(diverse_order(rows))
    assert sorted(diverse_order(rows)) == list(range(36))
    assert [rows[i]["kind"] for i in order[:3]] == ["a", "b", "c"] and [rows[i]["kind"] for i in order[3:5]] == ["a", "b"]
    best_first = np.argsort(diverse_order(rows, scores=range(36)))
    assert best_first[:3].tolist() == [29, 34, 35]
    assert len(diverse_order([])) == 0


def test_a_rule_finds_the_weights_it_was_made_from():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 500))
    rule = mine({"a": x[0], "b": 10 * x[1], "never": np.ones(500)}, 3 * x[0] - x[1] + 0.1 * rng.normal(size=500))
    assert np.allclose([rule.weights["a"], rule.weights["b"]], [3, -1], atol=0.25) and abs(rule.weights["never"]) < 1e-6
    assert rule.r2_held.value > 0.95 and rule.r2_held.low <= rule.r2_held.value <= rule.r2_held.high
    predicted = rule.predict({"a": x[0], "b": 10 * x[1], "never": np.ones(500)})
    assert np.corrcoef(predicted, 3 * x[0] - x[1])[0, 1] > 0.99
    with pytest.raises(DataError, match="never"):
        rule.predict({"a": x[0], "b": x[1]})


def test_the_fit_is_reported_on_rows_it_has_not_seen():
    rng = np.random.default_rng(1)
    noise = {str(k): rng.normal(size=60) for k in range(20)}
    rule = mine(noise, rng.normal(size=60), ridge=1e-9)
    assert rule.r2 > 0.3 and rule.r2_held.value < 0.1, "twenty features fit forty rows of noise, and nothing else"


@pytest.mark.parametrize(("columns", "quality"), [({"a": [1, 2, 3]}, [1, 2, 3]), ({"a": range(50)}, [1] * 50),
                                                  ({"a": [float("nan")] * 50}, range(50)), ({"a": range(50)}, range(40))])
def test_nothing_to_fit(columns, quality):
    with pytest.raises(DataError):
        mine(columns, quality)


def test_the_same_rows_in_any_format_measure_the_same(tiny):
    from realign_core import load
    policy = load(tiny, backend="torch")
    formats = [ROWS, [{"instruction": r["prompt"], "output": r["completion"]} for r in ROWS], read(ROWS),
               [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
                for r in ROWS]]
    found = [difficulty(policy, rows).scores for rows in formats]
    assert all(np.allclose(found[0], other, rtol=1e-4) for other in found)
    scores, ratio = ifd_scores(policy, ROWS), found[0]
    assert (np.isnan(scores) == (ratio > 1)).all() and np.allclose(scores[ratio <= 1], ratio[ratio <= 1], rtol=1e-4)
    assert (probability_scores(policy, ROWS) < 0).all()
    assert set(features(ROWS)) < set(features(ROWS, policy))


@pytest.mark.parametrize("rows", [[], [{"prompt": "x"}], [{"prompt": "", "completion": "x"}], [{"text": ""}], [7]])
def test_rows_that_cannot_be_measured(rows):
    with pytest.raises(DataError):
        difficulty(None, rows)
