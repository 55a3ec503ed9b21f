"""What every method that learns preferences says of data that cannot teach: the file, the row, the field."""

from __future__ import annotations

import json

import pytest

from realign_core import fit, load
from realign_core.errors import DataError
from realign_core.methods.registry import get

GOOD = {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "Five."}
PAIRS = ("dpo", "orpo", "cpo", "simpo", "reward")


def train(tmp_path, name, rows, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = load("tinyworld-instruct", "torch", head="reward" if name == "reward" else None)
    method = get(name)
    if method.reference:
        policy.freeze_reference()
    return fit(policy, method, file, steps=1, batch_size=2, held_out=0, progress=False, **settings)


@pytest.mark.parametrize("change,field,message", [
    ({"rejected": "Four."}, "rejected", "the same"),
    ({"prompt": " "}, "prompt", "empty"),
    ({"chosen_score": 0.1, "rejected_score": 0.8}, "chosen_score", "contradict"),
    ({"margin": -1.0}, "margin", "contradicts"),
])
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_that_cannot_teach_is_refused_with_its_row(tmp_path, name, change, field, message):
    with pytest.raises(DataError, match=message) as error:
        train(tmp_path, name, [GOOD, GOOD, {**GOOD, **change}, GOOD])
    assert (error.value.row, error.value.field) == (3, field) and "rows.jsonl" in str(error.value)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_longer_than_the_window_is_dropped_and_counted_or_refused(tmp_path, name):
    rows = [GOOD, {**GOOD, "chosen": "four " * 400}, GOOD]
    assert train(tmp_path, name, rows).report.counts["dropped"] == 1
    with pytest.raises(DataError, match="longer than 256 tokens") as error:
        train(tmp_path, name, rows, truncation="error")
    assert error.value.row == 2


def test_kto_wants_both_labels_and_a_prompt(tmp_path):
    rows = [{"prompt": "What is two and two?", "completion": text, "label": True} for text in ("Four.", "It is four.")]
    with pytest.raises(DataError, match="only one class"):
        train(tmp_path, "kto", rows)
    with pytest.raises(DataError, match="prompt is empty") as error:
        train(tmp_path, "kto", [rows[0], {**rows[1], "label": False, "prompt": ""}])
    assert error.value.row == 2
