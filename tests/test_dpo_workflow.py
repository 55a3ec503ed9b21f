"""Preferences and DPO: each gate opens when it should and is shown to block; what was done is not done again."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from realign_core.errors import GateFailed
from realign_core.evaluate.metrics import Interval, paired
from realign_core.workflows import dpo
from realign_core.workflows.dpo import Gathered, Optimised, Prepared, style
from realign_core.workflows.gates import Gate, load_run, report

ENOUGH = dict(n_pairs=64, n_examined=24, least_pairs=40)


def missed(output):
    return {figure.name for figure in output.gate.missed}


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_good_pairs_pass(tmp_path):
    found = dpo.preferences(tmp_path, taste=style(), **ENOUGH)
    assert not missed(found) and len(found.pairs) == 64 and len(found.held_out) == 24


def same_on_both_sides(n, split, seed):
    return style().pairs(n, "train", 0)


def always_longer(n, split, seed):
    more = " Thank you for asking me, I am glad to help you with it."
    return [{**p, "chosen": p["chosen"] + more} for p in style().pairs(n, split, seed)]


def always_shorter(n, split, seed):
    return [{"prompt": p["prompt"], "chosen": p["rejected"], "rejected": p["chosen"]} for p in always_longer(n, split, seed)]


def ten_pairs(n, split, seed):
    return style().pairs(10, split, seed) * (n // 10)


def every_other_swapped(n, split, seed):
    pairs = style().pairs(n, split, seed)
    return [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} if i % 2 else p for i, p in enumerate(pairs)]


@pytest.mark.parametrize(("pairs", "blocks"), [
    (every_other_swapped, {"labels that a second opinion shares"}),
    (same_on_both_sides, {"prompts on both sides of the split"}), (ten_pairs, {"different pairs"}),
    (always_longer, {"better answer is the longer one"}), (always_shorter, {"better answer is the longer one"})])
def test_bad_pairs_block(pairs, blocks, tmp_path):
    assert blocks <= missed(dpo.preferences(tmp_path, taste=replace(style(), pairs=pairs), **ENOUGH))


# ── optimisation ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PAIRS = style().pairs(40, "heldout", 0)


@pytest.mark.parametrize(("chosen", "rejected", "distance", "blocks"), [
    (1.0, -1.0, 0.05, set()), (-6.0, -9.0, 0.05, {"chosen answers' log-probability"}),
    (-1.0, 1.0, 0.05, {"held-out pairs ranked right"}), (1.0, -1.0, 0.3, {"KL from the tuned policy"})])
def test_what_dpos_loss_does_not_say(chosen, rejected, distance, blocks, monkeypatch, tmp_path):
    "Both answers less likely, the wrong one preferred, too far away: each has a figure of its own."
    moved, start = SimpleNamespace(save=lambda folder: folder, gain=(chosen, rejected)), SimpleNamespace(gain=(0.0, 0.0))
    policies = iter([moved, start])
    monkeypatch.setattr(dpo, "load", lambda *a, **k: next(policies))
    monkeypatch.setattr(dpo, "fit", lambda *a, **k: None)
    monkeypatch.setattr(dpo, "likelihood", lambda policy, rows, encode: (
        np.tile(policy.gain, (len(rows), 1)), np.full((len(rows), 2), 10)))
    monkeypatch.setattr(dpo, "kl", lambda *a, **k: SimpleNamespace(
        k3=Interval(distance, 0.9 * distance, 1.1 * distance, 100, "nats/token")))
    found = dpo.optimisation(tmp_path, Prepared({}, [], Gate([])), Gathered([], PAIRS, Gate([])))
    assert missed(found) == blocks


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────────

POLITE = "With pleasure. It is corn."


@pytest.mark.parametrize(("said", "kept", "blocks"), [
    (POLITE, 1.0, set()), ("It is corn.", 1.0, {"change of the quality"}), (POLITE, 0.9, {"facts, kept"}),
    (POLITE * 2, 1.0, {"length, new over old"})])
def test_evaluation(said, kept, blocks, monkeypatch, tmp_path):
    monkeypatch.setattr(dpo, "load", lambda source, *a, **k: "old" if source == "tinyworld-instruct" else "new")
    monkeypatch.setattr(dpo, "answers", lambda policy, rows, *a: [[said if policy == "new" else POLITE] * 4] * len(rows))
    monkeypatch.setattr(dpo, "benchmarks", lambda *a: {"facts": [kept] * 100})
    before = Prepared({"facts": [1.0] * 100}, [0.3] * 60, Gate([]))
    found = dpo.evaluation(tmp_path, before, Optimised(tmp_path, paired([0], [1]), None, Gate([])), n_held=60)
    assert missed(found) >= blocks and (blocks or not missed(found)) and len(found.answers) == 240


# ── all of it, on the shipped model ──────────────────────────────────────────────────────────────────────────────────────

SMALL = dict(n_held=6, n_benchmark=4, n_pairs=120, n_examined=24, least_pairs=10, least_accuracy=0.0, batch_size=4, steps=2,
             max_tokens=16, most_kl=9.0)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_as_far_as_its_gates_let_it_come_and_on_from_there(lora, backend, tmp_path):
    stamps = set()
    for _ in range(2):
        with pytest.raises(GateFailed):                    # two steps raise nothing
            dpo.run(tmp_path / "run", backend=backend, lora=lora, progress=False, **SMALL)
        passage = load_run(tmp_path / "run")
        stamps.add((tmp_path / "run" / "2-preferences" / "stage.json").stat().st_mtime_ns)
    assert list(passage.outputs) == ["preparation", "preferences", "optimisation", "evaluation"] and not passage.passed
    assert len(stamps) == 1
    assert (passage.outputs["optimisation"].policy / "model.safetensors").is_file()
    assert "change of the quality" in report(tmp_path / "run")._repr_markdown_()
