"""Labels: nothing duplicated, nothing lost uncounted, and the weights are those that TRL accepts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_core.data import unpaired as u
from realign_core.errors import DataError


def rows(good, bad):
    return [{"prompt": f"q{i}", "completion": f"c{i}", "label": i < good} for i in range(good + bad)]


def group(*answers, **more):
    return {"prompt": "q", "responses": [{"text": t, "score": s} for t, s in answers], **more}


def test_every_answer_is_a_row_or_is_counted():
    made = u.labelled([group(("a", 1.0), ("a", 1.0), ("b", 0.79), ("", 0.0), licence="mine")])
    assert [(r["completion"], r["label"], r["licence"]) for r in made] == [("a", True, "mine"), ("b", False, "mine")]
    assert sum(made.counts.values()) == 4 and made.counts["repeats, left out"] == 1
    assert len(u.labelled([group(("a", 1.0), ("a", 1.0))], unique=False)) == 2


def test_verifiable_rows_and_messages_are_read():
    answers = [{"text": "a", "correct": True}, {"text": "b", "correct": False}]
    made = u.labelled([{"problem": "p", "responses": answers, "verify": {}}])
    assert [(r["prompt"], r["label"], "verify" in r) for r in made] == [("p", True, True), ("p", False, True)]
    turns = [{"role": "user", "content": "hi"}]
    assert u.labelled([{**group(("a", 1.0)), "prompt": turns}])[0]["completion"] == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"prompt": "", "responses": []}, group(("a", None)), group(("a", float("nan"))),
                                 group((None, 1.0)), {"prompt": "q", "responses": ["a"]}, group(("a", "1"))])
def test_an_answer_without_a_verdict_is_a_data_error(row):
    with pytest.raises(DataError):
        u.labelled([row])


def test_an_answer_labelled_both_ways_stops():
    with pytest.raises(DataError, match="both ways"):
        u.labelled([group(("a", 1.0)), group(("a", 0.0))])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.3, 0.5, 0.6, 0.65, 0.7]), st.integers(0, 3))
def test_a_draw_has_the_share_and_no_copies(good, bad, positive, seed):
    data = rows(good, bad)
    try:
        found = u.draw(data, positive, seed=seed)
    except DataError:
        assert min(good, bad) < 3
        return
    assert sum(found.counts.values()) == good + bad
    assert len({r["completion"] for r in found}) == len(found)
    assert [r for r in data if r in found] == list(found)
    share = sum(r["label"] for r in found) / len(found)
    assert abs(share - positive) <= 1 / len(found) + 1e-9
    assert sum(r["label"] for r in found) == good or len(found) - sum(r["label"] for r in found) == bad


def test_a_draw_of_n_is_exact_or_refused():
    found = u.draw(rows(100, 100), 0.6, n=50)
    assert (found.counts["good"], found.counts["bad"]) == (30, 20)
    assert u.draw(rows(100, 100), 0.6, n=50, seed=1) != found and u.draw(rows(100, 100), 0.6, n=50) == found
    for n in (0, 200, -1):
        with pytest.raises(DataError):
            u.draw(rows(100, 100), 0.6, n=n)


def test_thirty_percent_negatives_too_many_are_found():
    right = u.balance(rows(65, 35))
    assert right.ok
    for bad in (round(35 * 1.3) + 1, 65):
        found = u.balance(rows(65 if bad < 65 else 35, bad))
        assert not found.ok and found.surplus_bad > 0 and "too many" in found._repr_markdown_()
    assert u.balance(rows(90, 10)).surplus_good > 0


@pytest.mark.parametrize("good, bad", [(1, 9), (30, 70), (50, 50), (57, 43), (65, 35), (90, 10)])
def test_removing_the_surplus_mends_the_balance(good, bad):
    found = u.balance(rows(100 * good, 100 * bad))
    assert u.Balance(found.good - found.surplus_good, found.bad - found.surplus_bad).ok


@pytest.mark.parametrize("data", [[], rows(3, 0), rows(0, 3), [{"label": 1}], [{"label": "true"}], [{}]])
def test_labels_that_are_none_are_refused(data):
    with pytest.raises(DataError):
        u.balance(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_weights_obey_the_rule_that_trl_checks(good, bad):
    w = u.weights(good, bad)
    assert 1 - 1e-9 <= w.desirable_weight * good / (w.undesirable_weight * bad) <= 4 / 3 + 1e-9
    assert min(w.desirable_weight, w.undesirable_weight) == 1
    if good != bad:  # as in trl/trainer/kto_trainer.py
        low, high = round(bad * w.undesirable_weight / good, 2), round(bad * w.undesirable_weight / good * 1.33, 2)
        under, over = round(good * w.desirable_weight / bad / 1.33, 2), round(good * w.desirable_weight / bad, 2)
        assert low <= w.desirable_weight <= high or under <= w.undesirable_weight <= over


def test_mixed_prompts_find_labels_that_follow_the_prompt():
    follows = [{"prompt": f"q{i}", "label": i % 2 == 0} for i in range(6) for _ in range(2)]
    assert u.mixed_prompts(follows) == (0, 6)
    assert u.mixed_prompts([{"prompt": "q", "label": x} for x in (True, False)] + [{"prompt": "r", "label": True}]) == (1, 1)
