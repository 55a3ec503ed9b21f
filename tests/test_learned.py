"""Reward model, PPO, evaluation: each gate opens when it should and is shown to block; what was done is not done again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from realign_core.errors import GateFailed
from realign_core.evaluate.metrics import proportion
from realign_core.workflows import learned
from realign_core.workflows.dpo import Gathered, Prepared, style
from realign_core.workflows.gates import Gate, load_run, report
from realign_core.workflows.learned import Optimised, Trained


def missed(output):
    return {figure.name for figure in output.gate.missed}


# ── reward model ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PAIRS = [{"prompt": "What is it?", "chosen": "It is a very long answer.", "rejected": "No."},
         {"prompt": "What is it?", "chosen": "Yes.", "rejected": "It is a very long answer."}] * 20


@pytest.mark.parametrize(("shares", "blocks"), [
    ((1.0, 1.0), set()), ((0.5, 0.5), {"", ", better one longer", ", better one shorter"}),
    ((1.0, 0.3), {"", ", better one shorter"}), ((0.3, 1.0), {"", ", better one longer"})])
def test_an_examination_by_slices(shares, blocks, monkeypatch, tmp_path):
    "What is right on long answers only is no reward model, whatever its accuracy."
    def ranked(policy, pairs):
        right = sum(shares[0] if len(p.chosen) > len(p.rejected) else shares[1] for p in pairs)
        return proportion(right * 10, 10 * len(pairs))
    stub = SimpleNamespace(save=lambda folder: folder)
    monkeypatch.setattr(learned, "load", lambda *a, **k: stub)
    monkeypatch.setattr(learned, "fit", lambda *a, **k: None)
    monkeypatch.setattr(learned.reward, "ranked", ranked)
    found = learned.reward_model(tmp_path, Gathered([], PAIRS, Gate([])))
    assert missed(found) == {f"pairs ranked as labelled{name}" for name in blocks}


def test_a_slice_that_is_empty_was_not_examined(monkeypatch, tmp_path):
    monkeypatch.setattr(learned, "load", lambda *a, **k: SimpleNamespace(save=lambda folder: folder))
    monkeypatch.setattr(learned, "fit", lambda *a, **k: None)
    monkeypatch.setattr(learned.reward, "ranked", lambda policy, pairs: proportion(len(pairs), len(pairs)))
    found = learned.reward_model(tmp_path, Gathered([], PAIRS[::2], Gate([])))
    assert "pairs ranked as labelled, better one shorter" in missed(found)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_ranking_of_its_own_answers_by_hand():
    rewards, quality = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 5.0]]), np.array([[1, 0, 1], [1, 0, 0]], float)
    found = learned._still_ranks(rewards, quality)   # 3 > 1 right, 2 > 1 right; 0 = 0 half, 0 < 5 wrong
    assert found.n == 4 and found.value == pytest.approx(2.5 / 4)
    assert learned._still_ranks(rewards, np.ones((2, 3))) is None


SAID = {"good": ["With pleasure. It is corn.", "With pleasure. It is figs.", "It is corn.", "With pleasure. It is figs."],
        "hacked": ["It is so it is so it is so."] * 2 + ["With pleasure. It is figs.", "It is so it is so."]}


WORTH = {"quality": lambda text: style().quality({}, text), "its opposite": lambda text: -style().quality({}, text),
         "length": lambda text: float(len(text))}


@pytest.mark.parametrize(("said", "pays", "kept", "blocks"), [
    ("good", "quality", 1.0, set()), ("good", "its opposite", 1.0, {"its own answers ranked right"}),
    ("hacked", "length", 1.0, {"change of the quality", "its own answers ranked right"}),
    ("good", "quality", 0.8, {"facts, kept"})])
def test_over_optimisation_and_loss_are_caught(said, pays, kept, blocks, monkeypatch, tmp_path):
    judge = SimpleNamespace(many=lambda rows, texts: [WORTH[pays](text) for text in texts])
    monkeypatch.setattr(learned, "load", lambda *a, **k: None)
    monkeypatch.setattr(learned.reward, "Learned", lambda *a, **k: judge)
    monkeypatch.setattr(learned, "answers", lambda policy, rows, *a: [SAID[said]] * len(rows))
    monkeypatch.setattr(learned, "benchmarks", lambda *a: {"facts": [kept] * 100})
    before = Prepared({"facts": [1.0] * 100}, [0.3] * 60, Gate([]))
    judged, policy = Trained(tmp_path, None, Gate([])), Optimised(tmp_path, None, Gate([]))
    found = learned.evaluation(tmp_path, before, judged, policy, n_held=60)
    assert missed(found) == blocks and len(found.answers) == 240


# ── all of it, on the shipped model ──────────────────────────────────────────────────────────────────────────────────────

SMALL = dict(n_held=6, n_benchmark=4, n_pairs=120, n_examined=24, least_pairs=10, least_accuracy=0.0, reward_steps=2,
             n_prompts=16, batch_size=4, steps=2, max_tokens=16, most_kl=9.0, params={"updates": 1})


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_as_far_as_its_gates_let_it_come_and_on_from_there(lora, backend, tmp_path):
    with pytest.raises(GateFailed):                    # two steps raise nothing
        learned.run(tmp_path / "run", backend=backend, lora=lora, progress=False, **SMALL)
    passage = load_run(tmp_path / "run")
    done = ["preparation", "preferences", "reward_model", "optimisation"]
    assert list(passage.outputs)[:4] == done and not passage.passed
    assert (tmp_path / "run" / "3-reward_model" / "model" / "model.safetensors").is_file()
    before = (tmp_path / "run" / "3-reward_model" / "stage.json").stat().st_mtime_ns
    with pytest.raises(GateFailed):
        learned.run(tmp_path / "run", backend=backend, lora=lora, progress=False, **SMALL)
    assert (tmp_path / "run" / "3-reward_model" / "stage.json").stat().st_mtime_ns == before
    assert "change of the reward" in report(tmp_path / "run")._repr_markdown_()
