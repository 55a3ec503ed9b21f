"""The counter of how a reply to a sum thinks, against the authors that wrote the demonstrations."""

from __future__ import annotations

import random

import pytest

from realign_core.evaluate.checking import behaviour
from realign_core.tinyworld.world import trace


@pytest.mark.parametrize(("author", "check", "wanted"), [
    ("careful", 0, {"steps"}), ("careful", 1, {"steps", "checks"}), ("hasty", 0, {"quick"}), ("hasty", 3, {"quick", "checks"})])
@pytest.mark.parametrize("low", [1, 10, 100])
def test_it_reads_what_the_authors_write(author, check, wanted, low):
    rng = random.Random(low)
    for _ in range(50):
        text = trace(rng.randrange(low, 10 * low), rng.randrange(low, 10 * low), author, rng, check=check)
        assert {name for name, there in behaviour(text).items() if there} == wanted, text


@pytest.mark.parametrize(("text", "wanted"), [
    ("", set()), ("It is 75.", set()), ("quick 75; check 7+8=15", set()),          # nothing is thought
    ("<think>47+28. 7+8=15, 4+2", {"steps"}),                                       # cut in the middle
    ("<think>47+28. 7+8=15, 4+2+1=7; check 7", {"steps", "checks"}),
    ("<think>47+28. 7+8=15; check</think>It is 75.", {"steps"}),                    # says it, and does not do it
    ("<think>47+28. check them</think>It is 75.", set()),
    ("<think>47+28</think>quick 7; check 7+8=15. It is 75.", set()),               # behind the thought
    ("<think>quick</think>It is 75.", set()), ("<think>a quick 75</think>It is 75.", set())])
def test_what_is_no_sign(text, wanted):
    assert {name for name, there in behaviour(text).items() if there} == wanted
