"""The training loop: accumulation, schedules, evaluation, guards, the run that comes back."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
from toys import VOCAB, Chatty, examples, method, objective

from realign_core.engine.batching import collate, micro_batches
from realign_core.engine.encoding import Encoder, encode_rows
from realign_core.engine.history import Run
from realign_core.engine.policy import LoRA, load
from realign_core.engine.tracking import Progress, tracker
from realign_core.engine.training import BigramPolicy, accumulate, evaluate, fit, learning_rate
from realign_core.errors import BackendError, CheckpointError, DataError, TrainingError
from realign_core.methods import dpo, sft
from snapshots import make_snapshot

PAIRS = [{"prompt": f"What is {i} plus {j}?", "chosen": str(i + j), "rejected": f"I think {i + j + 1}, friend."}
         for i in range(6) for j in range(6)]
ROWS = [{"instruction": p["prompt"], "output": p["chosen"] if i % 2 else p["rejected"]} for i, p in enumerate(PAIRS)]


# ── accumulation ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(parts):
    rows, whole, split = examples(8), BigramPolicy(VOCAB), BigramPolicy(VOCAB)
    loss, metrics = accumulate(whole, method(), [collate(rows)])
    again, more = accumulate(split, method(), [collate(part) for part in micro_batches(rows, 8 // parts)])
    assert math.isclose(loss, again, rel_tol=1e-12) and math.isclose(metrics["nll"], more["nll"], rel_tol=1e-12)
    np.testing.assert_allclose(split.gradients()["table"], whole.gradients()["table"], atol=1e-8)


@pytest.mark.parametrize("make,rows", [(sft.method, ROWS), (dpo.method, PAIRS)], ids=["sft", "dpo"])
def test_accumulation_is_exact_on_the_policies(backend, tiny, make, rows):
    from realign_core.data.formats import read
    from realign_core.engine.training import with_reference
    policy, chosen = load(tiny, backend), make()
    encoded = encode_rows(read(rows[:8], chosen.format), chosen.encode, Encoder(policy.tokenizer))
    if chosen.reference:
        policy.freeze_reference()
        encoded = with_reference(policy, encoded, [range(8)], progress=False)
    gradients = []
    for parts in (1, 2, 4):
        accumulate(policy, chosen, [collate(part) for part in micro_batches(encoded, 8 // parts)])
        gradients.append(policy.gradients())
        policy.step(0.0)
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(other[name], value, atol=1e-6 * scale, rtol=0, err_msg=name)


def test_bigram_gradient_is_the_analytic_one():
    policy, batch = BigramPolicy(VOCAB), collate(examples(3))
    policy.backward(batch, objective)
    found, expected = policy.gradients()["table"], np.zeros((VOCAB, VOCAB))
    for i in range(VOCAB):
        for j in range(VOCAB):
            ends = []
            for step in (1e-5, -1e-5):
                policy.table[i, j] += step
                ends.append(objective(policy.score(batch), batch)[0])
                policy.table[i, j] -= step
            expected[i, j] = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-8)


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_learning_rates():
    cosine = [learning_rate(s, 100, 2.0) for s in range(100)]
    assert cosine[0] == 0.2 and cosine[9] == cosine[10] == 2.0 and cosine[10:] == sorted(cosine[10:], reverse=True)
    assert 0 < cosine[-1] < 0.01
    assert learning_rate(55, 100, 2.0, schedule="linear") == pytest.approx(1.0)
    assert learning_rate(99, 100, 2.0, schedule="constant") == 2.0
    assert learning_rate(0, 100, 2.0, warmup=0) == 2.0 and learning_rate(4, 100, 2.0, warmup=5) == 2.0


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": -1}, {"lr": float("nan")}, {"schedule": "square"}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(TrainingError):
        fit(BigramPolicy(VOCAB), method(), examples(), progress=False, **wrong)


def test_unknown_defaults_of_a_method_are_not_ignored():
    with pytest.raises(TrainingError, match="learning_rate"):
        fit(BigramPolicy(VOCAB), method(defaults={"learning_rate": 1.0}), examples(), progress=False)


def test_epochs_and_steps():
    data = examples(60)
    assert fit(BigramPolicy(VOCAB), method(), data, held_out=0, progress=False).summary["steps"] == 8
    assert fit(BigramPolicy(VOCAB), method(), data, held_out=0, epochs=0.5, progress=False).summary["steps"] == 4
    thrice = method(defaults={"epochs": 3})
    assert fit(BigramPolicy(VOCAB), thrice, data, held_out=0, steps=5, progress=False).summary["steps"] == 5
    short = method(defaults={"steps": 3, "batch_size": 8})
    assert fit(BigramPolicy(VOCAB), short, data, held_out=0, epochs=1, progress=False).summary["steps"] == 8


# ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_evaluation_does_not_depend_on_the_batches():
    policy, data = BigramPolicy(VOCAB), examples(20)
    one = evaluate(policy, method(), [collate(data)])
    many = evaluate(policy, method(), [collate(data[:3]), collate(data[3:4]), collate(data[4:])])
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-12) and one["nll"] == pytest.approx(many["nll"], rel=1e-12)


def test_accuracy_is_of_pairs_and_never_a_mean_of_batch_means():
    def accuracy(logps, batch):
        right = logps.sum(1)[0::2] > logps.sum(1)[1::2]
        return -logps.sum() / batch.examples, {"accuracy": (right.sum(), batch.examples)}
    pairs = method(objective=accuracy, weight=lambda batch: batch.examples)
    policy, data = BigramPolicy(VOCAB, seed=3), examples(31, group=2)
    policy.table *= 10
    one = evaluate(policy, pairs, [collate(data)])["accuracy"]
    uneven = evaluate(policy, pairs, [collate(data[:1]), collate(data[1:])])["accuracy"]
    assert 0 < one < 1 and one == pytest.approx(uneven)


def test_held_out_rows_are_never_trained_on():
    trained = set()
    class Noting(BigramPolicy):
        def backward(self, batch, objective, scale=1.0):
            trained.update(batch.rows)
            return super().backward(batch, objective, scale)
    run = fit(Noting(VOCAB), method(), examples(100), held_out=10, epochs=2, progress=False)
    assert run.summary["held_out"] == 10 and run.summary["examples"] == 90 and len(trained) == 90


def test_history_begins_with_an_evaluation_and_ends_with_one():
    run = fit(BigramPolicy(VOCAB), method(), examples(100), steps=23, eval_every=5, progress=False)
    assert [r["step"] for r in run.history if "eval_loss" in r] == [0, 5, 10, 15, 20, 23]
    assert run.summary["eval_loss_start"] == run.history[0]["eval_loss"]


def test_eval_data_of_its_own():
    run = fit(BigramPolicy(VOCAB), method(), examples(40), eval_data=examples(7, seed=9), progress=False)
    assert run.summary["held_out"] == 7 and run.summary["examples"] == 40


# ── data of all kinds ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_every_kind_of_data_gives_the_same_run(tmp_path):
    import datasets
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    kinds = [ROWS, path, str(path), datasets.Dataset.from_list(ROWS)]
    tables = []
    for data in kinds:
        policy = Chatty()
        fit(policy, sft.method(), data, steps=3, lr=0.1, batch_size=4, progress=False)
        tables.append(policy.table)
    assert all((t == tables[0]).all() for t in tables)


def test_an_endless_iterable_is_read_as_far_as_needed():
    def rows():
        number = 0
        while True:
            number += 1
            yield {"instruction": "Count on.", "output": str(number)}
    run = fit(Chatty(), sft.method(), rows(), steps=5, batch_size=4, lr=0.1, progress=False)
    assert run.summary["steps"] == 5 and run.summary["examples"] >= 20
    with pytest.raises(DataError, match="steps="):
        fit(Chatty(), sft.method(), rows(), progress=False)


def test_packing_trains_the_same():
    runs = []
    for packing in (False, True):
        policy = BigramPolicy(VOCAB)
        fit(policy, method(), examples(40), steps=10, packing=packing, progress=False)
        runs.append(policy.table)
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-6)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    tables = []
    for seed in (0, 0, 1):
        policy = BigramPolicy(VOCAB)
        fit(policy, method(), examples(), seed=seed, progress=False)
        tables.append(policy.table)
    assert (tables[0] == tables[1]).all() and (tables[0] != tables[2]).any()


# ── guards ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_and_saves_the_batch(tmp_path, bad):
    from safetensors.numpy import load_file
    def poisoned(logps, batch):
        return (bad if 17 in batch.rows else -logps.sum() / batch.targets), {}
    policy = BigramPolicy(VOCAB)
    with pytest.raises(TrainingError, match="the loss is (nan|inf)") as caught:
        fit(policy, method(objective=poisoned), examples(), held_out=0, out=tmp_path / "run", micro_batch=4, progress=False)
    (folder,) = (tmp_path / "run").glob("failed-step-*")
    assert str(folder) in str(caught.value) and np.isfinite(policy.table).all()
    assert 17 in [row["row"] for row in json.loads((folder / "rows.json").read_text())]
    assert load_file(folder / "batch.safetensors")["ids"].ndim == 2


def test_a_gradient_that_is_no_number_stops(tmp_path):
    class Exploding(BigramPolicy):
        def step(self, lr, max_norm=None):
            super().step(lr, max_norm)
            return float("nan")
    with pytest.raises(TrainingError, match="gradient norm"):
        fit(Exploding(VOCAB), method(), examples(), out=tmp_path / "run", progress=False)


def test_clipping_limits_the_step():
    policy = BigramPolicy(VOCAB)
    steep = method(objective=lambda logps, batch: (-1000 * logps.sum() / batch.targets, {}))
    run = fit(policy, steep, examples(), steps=3, progress=False)
    assert max(r["grad_norm"] for r in run.history if "grad_norm" in r) > 100, "the log shows the norm before clipping"


def test_ctrl_c_leaves_a_checkpoint_and_the_same_call_goes_on(tmp_path):
    def interrupt(record):
        if record["step"] == 7:
            signal.raise_signal(signal.SIGINT)
    whole = BigramPolicy(VOCAB)
    fit(whole, method(), examples(), steps=20, progress=False)
    policy = BigramPolicy(VOCAB)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7 of 20"):
        fit(policy, method(), examples(), steps=20, out=tmp_path / "run", track=interrupt, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
    run = fit(policy, method(), examples(), steps=20, out=tmp_path / "run", progress=False)  # same object, same process
    assert (policy.table == whole.table).all() and len(run.history) == 21


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_reference_is_scored_once_and_reused(tmp_path):
    class Counting(BigramPolicy):
        scored = 0
        def score(self, batch, *, reference=False):
            self.scored += reference * batch.examples
            return super().score(batch, reference=reference)
    def tied(logps, batch):
        gap = np.where(batch.mask, logps - batch.extras["ref_logps"], 0.0)
        return (gap**2).sum() / batch.targets - logps.sum() / batch.targets, {}
    chosen, policy = method(objective=tied, reference=True), Counting(VOCAB)
    fit(policy, chosen, examples(50), held_out=5, epochs=3, out=tmp_path / "run", progress=False)
    assert policy.scored == 50
    again = Counting(VOCAB)
    fit(again, chosen, examples(50), held_out=5, epochs=3, out=tmp_path / "run", progress=False)
    assert again.scored == 0, "read back from the run's folder"


@pytest.mark.parametrize("lora", [None, 4])
def test_dpo_starts_at_zero_margin_and_raises_it(backend, tiny, lora):
    policy = load(tiny, backend, lora=lora)
    run = fit(policy, dpo.method(), PAIRS, steps=12, batch_size=8, lr=3e-3, held_out=8, progress=False)
    first, second = run.history[:2]
    assert first["eval_margin"] == second["margin"] == 0 and first["eval_accuracy"] == second["accuracy"] == 0.5
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.summary["eval_margin_end"] > 0.1


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_run_shows_itself_and_is_loaded_again(tmp_path):
    run = fit(BigramPolicy(VOCAB), method(), examples(100), epochs=3, out=tmp_path / "run", progress=False)
    assert "<table>" in run._repr_html_() and "data:image/png" in run._repr_html_()
    assert "| steps |" in run._repr_markdown_()
    figure = run.plot("loss", "eval_loss", "lr")
    assert [a.get_ylabel() for a in figure.axes] == ["loss (nats)", "learning rate"] and figure.axes[0].get_xlabel() == "step"
    loaded = Run.load(tmp_path / "run")
    assert loaded.history == run.history and loaded.summary == json.loads(json.dumps(run.summary)) and loaded.policy is None
    assert loaded.series("loss") == run.series("loss")
    with pytest.raises(CheckpointError, match="no run here"):
        Run.load(tmp_path)


def test_a_loaded_run_gives_its_policy_back(tmp_path, backend):
    folder = make_snapshot(tmp_path / "m")
    policy = load(folder, backend, lora=LoRA(rank=4, alpha=8.0))
    fit(policy, sft.method(), ROWS, steps=3, batch_size=4, lr=1e-2, out=tmp_path / "run", progress=False)
    batch = collate(examples(4))
    again = Run.load(tmp_path / "run").load_policy()
    np.testing.assert_allclose(again.score(batch), policy.score(batch), atol=1e-6)


def test_summary_has_its_figures():
    rows = [*ROWS, {"instruction": "Who? " * 20, "output": "No."}]
    run = fit(Chatty(max_length=24), sft.method(), rows, steps=3, progress=False)
    assert run.summary["rows_dropped"] == run.report.counts["dropped"] >= 1
    assert run.summary["tokens"] > 0 and run.summary["seconds"] > 0 and run.summary["peak_memory_gib"] > 0


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(BigramPolicy(VOCAB), method(), examples(), progress=False)
    assert run.folder is None and not list(tmp_path.iterdir())


def test_the_loop_itself_costs_little():
    class Idle(BigramPolicy):
        def backward(self, batch, objective, scale=1.0):
            return 1.0, {}
    run = fit(Idle(VOCAB), method(), examples(), steps=300, held_out=0, progress=False)
    steps = sorted(b["seconds"] - a["seconds"] for a, b in zip(run.history, run.history[1:], strict=False))
    assert steps[len(steps) // 2] < 1e-3, "the median step, so that a busy machine does not decide"


# ── progress and trackers ───────────────────────────────────────────────────────────────────────────────────────────────

def test_no_progress_lines_in_a_file(capsys):
    fit(BigramPolicy(VOCAB), method(), examples(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_progress_in_a_terminal_is_one_line(capsys, monkeypatch):
    bar = Progress(10, "demo")
    bar.screen = "terminal"
    for done in range(1, 11):
        bar.update(done, f"loss {done}", force=True)
    bar.close(10, "end")
    assert capsys.readouterr().err.count("\n") == 1


def test_trackers_by_name(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("wandb", "trackio"):
            monkeypatch.setitem(sys.modules, name, None)
            with pytest.raises(BackendError, match=f"pip install {name}"):
                tracker(name, "run")
    with pytest.raises(BackendError, match="unknown tracker"):
        tracker("notebook", "run")


def test_a_tracker_gets_every_record(monkeypatch):
    calls = []
    fake = ModuleType("trackio")
    fake.init = lambda **settings: calls.append(("init", settings["name"]))
    fake.log = lambda values, step: calls.append((step, values.get("loss")))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run = fit(BigramPolicy(VOCAB), method(), examples(), steps=4, track="trackio", progress=False)
    assert calls[0] == ("init", "nll") and calls[-1] == "finish"
    assert calls[1:-1] == [(r["step"], r.get("loss")) for r in run.history]
