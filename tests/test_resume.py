"""Killed, cut short, mixed up: a run goes on exactly where it was, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toys import VOCAB, examples, method

from realign_core.engine.checkpoints import checkpoint_problem, newest_checkpoint, save_checkpoint
from realign_core.engine.history import Run
from realign_core.engine.policy import LoRA, load
from realign_core.engine.training import BigramPolicy, fit
from realign_core.errors import CheckpointError
from realign_core.methods import dpo, kto, sft

PAIRS = [{"prompt": f"What is {i} plus {j}?", "chosen": str(i + j), "rejected": f"I think {i + j + 1}, friend."}
         for i in range(6) for j in range(6)]
ROWS = [{"instruction": p["prompt"], "output": p["chosen"]} for p in PAIRS]
LABELLED = [{"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(PAIRS)]
STEPS = 24
CASES = {"sft-full": (sft.method, ROWS, None), "dpo-lora": (dpo.method, PAIRS, dict(rank=4, alpha=8.0, dropout=0.1)),
         "kto-lora": (kto.method, LABELLED, dict(rank=4, alpha=8.0, dropout=0.1)), "kto-full": (kto.method, LABELLED, None)}


def train(case: str, backend: str, model: str, out, resume=True):
    "One run of a case; what is trained, and in which order, depends on nothing else."
    make, rows, lora = CASES[case]
    policy = load(model, backend, lora=LoRA(**lora) if lora else None, threads=1)
    run = fit(policy, make(), rows, steps=STEPS, batch_size=8, micro_batch=4, lr=1e-2, save_every=5, eval_every=8, out=out,
              held_out=4, resume=resume, progress=False)
    return policy, run


def state(policy, folder: Path) -> dict[str, np.ndarray]:
    "Everything that `save_state` writes, by file and name."
    from safetensors.numpy import load_file
    folder.mkdir()
    policy.save_state(folder)
    return {f"{p.name}:{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.mark.parametrize("case", CASES)
def test_kill_9_then_resume_equals_the_whole_run(case, backend, tiny, tmp_path):
    whole, run = train(case, backend, str(tiny), tmp_path / "whole")
    step = int(np.random.default_rng([len(case), len(backend), int.from_bytes(os.urandom(4))]).integers(6, STEPS - 4))
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_resume import train; " \
           f"train({case!r}, {backend!r}, {str(tiny)!r}, {str(tmp_path / 'killed')!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
        log = tmp_path / "killed" / "log.jsonl"
        while child.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") > step):
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        error = child.stderr.read().decode()
    assert child.returncode == -9, error
    assert newest_checkpoint(tmp_path / "killed") is not None and len(Run.load(tmp_path / "killed").history) < len(run.history)
    resumed, again = train(case, backend, str(tiny), tmp_path / "killed")
    a, b = state(whole, tmp_path / "a"), state(resumed, tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        if backend == "torch":
            assert np.array_equal(a[name], b[name]), f"{name} differs after a kill at step {step}"
        else:
            np.testing.assert_allclose(a[name], b[name], atol=1e-6, err_msg=name)
    assert [r["step"] for r in again.history] == [r["step"] for r in run.history]
    np.testing.assert_allclose([r.get("loss", 0) for r in again.history], [r.get("loss", 0) for r in run.history], atol=1e-6)


# ── damaged checkpoints, on the policy that is quickest ─────────────────────────────────────────────────────────────────

class Stop(Exception):
    pass


def interrupted(out, at=17, **settings):
    "A run of 20 steps with a checkpoint every 5 that dies at a step."
    def die(record):
        if record["step"] == at:
            raise Stop
    with pytest.raises(Stop):
        fit(BigramPolicy(VOCAB), method(), examples(), steps=20, save_every=5, out=out, track=die, progress=False, **settings)


def finish(out, policy=None, **settings):
    policy = policy or BigramPolicy(VOCAB)
    settings = {"steps": 20, "save_every": 5, **settings}
    return policy, fit(policy, method(), examples(), out=out, progress=False, **settings)


@pytest.fixture
def whole():
    return finish(None)[0].table


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "manifest cut", "file gone", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, whole, damage):
    interrupted(tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-00000015"
    weights, manifest = newest / "state.safetensors", newest / "manifest.json"
    data = bytearray(weights.read_bytes())
    match damage:
        case "cut": weights.write_bytes(data[: len(data) // 2])
        case "flip":
            data[-1] ^= 1
            weights.write_bytes(data)
        case "no manifest": manifest.unlink()
        case "manifest cut": manifest.write_text(manifest.read_text()[:40])
        case "file gone": weights.unlink()
        case "empty": shutil.rmtree(newest), newest.mkdir()
    assert checkpoint_problem(newest)
    with pytest.warns(UserWarning, match="step-00000015: damaged checkpoint"):
        policy, run = finish(tmp_path / "run")
    assert (policy.table == whole).all() and [r["step"] for r in run.history] == list(range(21))
    assert checkpoint_problem(tmp_path / "run/checkpoints/step-00000020") is None


def test_when_all_are_damaged_the_run_begins_again(tmp_path, whole):
    interrupted(tmp_path / "run")
    for weights in (tmp_path / "run/checkpoints").rglob("state.safetensors"):
        weights.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        policy, run = finish(tmp_path / "run")
    assert (policy.table == whole).all() and len(run.history) == 21


def test_two_checkpoints_are_kept_and_drafts_cleared(tmp_path):
    interrupted(tmp_path / "run")
    home = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in home.iterdir()) == ["step-00000010", "step-00000015"]
    (home / ".step-00000020.tmp").mkdir()
    finish(tmp_path / "run")
    assert sorted(p.name for p in home.iterdir()) == ["step-00000015", "step-00000020"]


def test_a_failing_write_leaves_the_earlier_checkpoint(tmp_path):
    class Failing(BigramPolicy):
        def save_state(self, folder):
            (Path(folder) / "state.safetensors").write_bytes(b"half")
            raise RuntimeError("the process dies here")
    save_checkpoint(tmp_path, BigramPolicy(VOCAB), 1, {})
    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, Failing(VOCAB), 2, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_log_that_ran_ahead_or_was_cut_is_put_right(tmp_path):
    interrupted(tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    assert log.read_text().count("\n") == 18
    with log.open("a") as file:
        file.write('{"step": 18, "lo')
    assert len(Run.load(tmp_path / "run").history) == 18
    run = finish(tmp_path / "run")[1]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(21))
    assert Run.load(tmp_path / "run").history == run.history


def test_a_finished_run_is_given_back_at_once(tmp_path, whole):
    finish(tmp_path / "run")
    class Untrainable(BigramPolicy):
        def backward(self, *_):
            raise AssertionError("nothing is left to do")
    policy, run = finish(tmp_path / "run", Untrainable(VOCAB))
    assert (policy.table == whole).all() and run.summary["steps"] == 20


def test_the_same_cell_twice(tmp_path, whole):
    policy, _ = finish(tmp_path / "run")
    finish(tmp_path / "run", policy)
    assert (policy.table == whole).all()


def test_resume_false_begins_again(tmp_path, whole):
    interrupted(tmp_path / "run")
    policy, run = finish(tmp_path / "run", resume=False)
    assert (policy.table == whole).all() and len(run.history) == 21
    policy, run = finish(tmp_path / "run", resume=False, lr=0.01)
    assert run.settings["lr"] == 0.01


@pytest.mark.parametrize("change,said", [({"lr": 0.1}, "lr was 0.05, is 0.1"), ({"steps": 30}, "steps was 20, is 30"),
                                         ({"seed": 3}, "seed was 0, is 3"), ({"batch_size": 4}, "batch_size was 8, is 4")])
def test_other_settings_are_named(tmp_path, change, said):
    interrupted(tmp_path / "run")
    def files(): return sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*") if p.is_file())
    before = files()
    with pytest.raises(CheckpointError, match=said):
        finish(tmp_path / "run", **change)
    assert before == files(), "nothing was touched"


def test_other_data_and_other_weights_are_named(tmp_path):
    interrupted(tmp_path / "run")
    with pytest.raises(CheckpointError, match="data was"):
        fit(BigramPolicy(VOCAB), method(), examples(seed=1), steps=20, out=tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match="began with other weights"):
        finish(tmp_path / "run", BigramPolicy(VOCAB, seed=1))
    with pytest.raises(CheckpointError, match="method was 'nll', is 'other'"):
        fit(BigramPolicy(VOCAB), method(name="other"), examples(), steps=20, out=tmp_path / "run", progress=False)
