"""Pairs are of one form and length, use each prompt once, and say what still differs."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_core.data import contrast as c
from realign_core.errors import DataError
from realign_core.tinyworld import World, contrast_rows


def length(text):
    return len(text.split())


WORDS = st.lists(st.sampled_from("what name the fox owl food poison 3 ?".split()), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=20), st.lists(WORDS, max_size=30), st.integers(0, 2))
def test_pairs_obey_length_form_and_single_use(harmful, harmless, tolerance):
    bad, good = ([{"prompt": t, "id": i} for i, t in enumerate(side)] for side in (harmful, harmless))
    try:
        found = c.match(bad, good, length, tolerance=tolerance)
    except DataError:
        return
    for pair in found:
        a, b = pair["harmful"]["prompt"], pair["harmless"]["prompt"]
        assert abs(length(a) - length(b)) <= tolerance and c.form(a) == c.form(b) and a != b
    for side in ("harmful", "harmless"):
        assert len({pair[side]["id"] for pair in found}) == len(found)
    assert found.counts["pairs"] + found.counts["harmful without a partner"] == len(harmful)
    assert found.counts["pairs"] + found.counts["harmless not used"] == len(harmless)


def test_no_pair_is_left_that_could_be_made():
    rng = random.Random(0)
    bad, good = ([" ".join(rng.choices(["what", "fox", "owl"], k=rng.randint(1, 5))) + "?" for _ in range(40)] for _ in range(2))
    found = c.match(bad, good, length)
    left = [list(side) for side in (bad, good)]
    for pair in found:
        left[0].remove(pair["harmful"])
        left[1].remove(pair["harmless"])
    assert not any(length(a) == length(b) and c.form(a) == c.form(b) and a != b for a in left[0] for b in left[1])


@pytest.mark.parametrize("bad", ["", " ", None, 3, {"prompt": ""}, {"text": "x"}])
def test_rows_without_prompt_are_named(bad):
    for sides in ((["a b", bad], ["c"]), (["a"], ["c d", bad])):
        with pytest.raises(DataError) as error:
            c.match(*sides, length)
        assert error.value.row == 2


def test_nothing_to_pair_is_an_error():
    for sides in (([], []), (["what is it?"], ["name it now."])):
        with pytest.raises(DataError, match="no pair"):
            c.match(*sides, length)


def test_auc_is_the_exhaustive_count_with_an_interval_that_holds_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(5, 12, (2, 30))
        found = c.length_auc(a, b)
        wins = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
        assert found.value == pytest.approx(wins) and found.low <= found.value <= found.high
    assert c.length_auc([9] * 20, [8] * 20).excludes(0.5) and not c.length_auc([9] * 20, [9] * 20).excludes(0.5)
    for sides in (([], []), ([1], [1, 2])):
        with pytest.raises(DataError):
            c.length_auc(*sides)


def test_the_interval_covers_chance_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [not c.length_auc(*rng.integers(5, 20, (2, 60)), seed=i).excludes(0.5) for i in range(100)]
    assert 0.88 <= np.mean(covered) <= 1.0


def test_a_planted_length_difference_is_in_the_report():
    pairs = [{"harmful": f"name the poison of a{i} now please", "harmless": f"name the food of a{i}"} for i in range(40)]
    report = {row["what"]: row["value"] for row in c.Matched(pairs, length).report}
    assert report["AUC of length alone"].excludes(0.5) and report["length, harmful − harmless"].low > 0
    assert "poison +100%" in report["words that give the side away"] and "food −100%" in report["words that give the side away"]


def test_the_tiny_worlds_own_pairs_differ_in_one_word():
    pairs = c.Matched(contrast_rows(World(), 60), length)
    report = {row["what"]: row["value"] for row in pairs.report}
    assert report["AUC of length alone"].value == 0.5 and report["pairs of one form"].value == 1.0


def test_a_contrast_set_keeps_fields_and_partners():
    made = c.contrast_set([{"harmful": {"prompt": "a", "x": 1}, "harmless": "b"}, {"harmful": "c", "harmless": "d"}])
    assert made[0] == {"prompt": "a", "x": 1, "harmful": True, "pair": 0}
    assert made[1] == {"prompt": "b", "harmful": False, "pair": 0}
    assert [row["pair"] for row in made] == [0, 0, 1, 1]
