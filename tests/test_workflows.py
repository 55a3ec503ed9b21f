"""Every gate opens when it should and is shown to block; a run that is killed goes on, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from realign_core import fit, load
from realign_core.data.verifiable import verify
from realign_core.engine.encoding import Encoder
from realign_core.engine.policy import Completion
from realign_core.errors import CheckpointError, GateFailed, ReAlignError
from realign_core.evaluate.metrics import Interval, proportion
from realign_core.methods import sft
from realign_core.workflows import rlvr
from realign_core.workflows.gates import Figure, Gate, Workflow, load_run, report

# ── figures and gates ───────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = Interval(0.5, 0.4, 0.6, 90)


@pytest.mark.parametrize(("measured", "limit", "direction", "holds"), [
    (WIDE, 0.4, "≥", True), (WIDE, 0.4, ">", False), (WIDE, 0.45, "≥", False), (WIDE, 0.6, "≤", True), (WIDE, 0.6, "<", False),
    (WIDE, 0.55, "≤", False), (3, 3, "≥", True), (3, 3, "<", False), (0, 0, "≤", True), (None, 0, "≥", False),
    (None, 1, "<", False), (float("nan"), 1, "<", False), (Interval(0.5, float("nan"), float("nan"), 1), 0.4, "≥", False)])
def test_a_figure_holds_when_its_whole_interval_does(measured, limit, direction, holds):
    assert Figure("x", measured, limit, direction).holds is holds


def test_a_closed_gate_says_figure_limit_and_advice():
    gate = Gate([Figure("fine", 1, 0), Figure("false positives", proportion(9, 90), 0.05, "<", "strengthen it"),
                 Figure("lost", None, 1)])
    with pytest.raises(GateFailed) as caught:
        gate.check("verification")
    text = str(caught.value)
    assert "verification: blocked by 2 of 3" in text and "false positives: 10.0 % [" in text and "n = 90; wanted < 5 %" in text
    assert "strengthen it" in text and "lost: not measured; wanted ≥ 1" in text and "fine" not in text
    Gate([Figure("fine", 1, 0)]).check()


# ── the machinery, on stages that take no time ──────────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Out:
    value: int
    rows: list[dict]
    made: Path
    share: Interval
    gate: Gate


CALLS: list[str] = []


def first(folder: Path, *, n: int = 3, most: int = 10) -> Out:
    CALLS.append("first")
    (folder / "policy").mkdir(exist_ok=True)
    return Out(n, [{"i": i, "share": WIDE, "text": "a\u2028b"} for i in range(n)], folder / "policy", WIDE,
               Gate([Figure("n", n, most, "≤", "fewer")]))


def second(folder: Path, first: Out, *, factor: int = 2, stop: bool = False, helper: object = None) -> Out:
    CALLS.append("second")
    if stop:
        raise KeyboardInterrupt
    return Out(first.value * factor, first.rows, first.made, first.share, Gate([]))


def third(folder: Path, second: Out, first: Out) -> Out:
    CALLS.append("third")
    return Out(second.value + first.value, [], first.made, WIDE, Gate([]))


FLOW = Workflow("toy", (first, second, third))


def go(folder, **settings):
    CALLS.clear()
    return FLOW.run(folder, progress=False, **settings)


def test_outputs_come_back_as_they_were_and_nothing_is_done_twice(tmp_path):
    done = go(tmp_path / "a")
    assert CALLS == ["first", "second", "third"] and done.passed and done.outputs["third"].value == 9
    assert done.outputs["second"].rows == [{"i": i, "share": WIDE, "text": "a\u2028b"} for i in range(3)]
    again = go(tmp_path / "a")
    assert CALLS == [] and again.outputs == done.outputs
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = go(tmp_path / "b")
    assert CALLS == [] and moved.outputs["third"].made == tmp_path / "b" / "1-first" / "policy"


def test_a_closed_gate_blocks_at_once_until_it_is_mended(tmp_path):
    for calls in (["first"], []):
        with pytest.raises(GateFailed, match="1-first .*\n- n: 20; wanted ≤ 10. fewer"):
            go(tmp_path, n=20)
        assert CALLS == calls
    assert load_run(tmp_path).missing == ["second", "third"] and not load_run(tmp_path).passed
    assert go(tmp_path, n=4).outputs["third"].value == 12 and CALLS == ["first", "second", "third"]


def test_changed_settings_of_a_finished_stage_are_refused(tmp_path):
    go(tmp_path)
    with pytest.raises(CheckpointError, match=r"1-first: .*n was 3, is 4; give another folder, or again='first'"):
        go(tmp_path, n=4)
    with pytest.raises(CheckpointError, match="helper was None, is 'go'"):
        go(tmp_path, helper=go)
    assert CALLS == [] and load_run(tmp_path).outputs["first"].value == 3
    assert go(tmp_path, n=4, again="first").outputs["third"].value == 12 and CALLS == ["first", "second", "third"]
    assert go(tmp_path, n=4, factor=3, again="second").outputs["third"].value == 16 and CALLS == ["second", "third"]


def test_an_interrupted_stage_goes_on_and_one_with_other_settings_begins_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, stop=True)
    (tmp_path / "2-second" / "half").touch()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, stop=True)
    assert CALLS == ["second"] and (tmp_path / "2-second" / "half").exists()  # the same: what is there may be of use
    assert go(tmp_path).passed and not (tmp_path / "2-second" / "half").exists()


def test_what_does_not_belong_is_refused(tmp_path):
    with pytest.raises(ReAlignError, match="no setting 'm'; it has factor, helper, most, n, stop"):
        go(tmp_path, m=1)
    with pytest.raises(ReAlignError, match="no stage 'fourth'; it has first, second, third"):
        go(tmp_path, again="fourth")
    with pytest.raises(ReAlignError, match="'second' reads 'first', which no stage before it has"):
        Workflow("wrong", (second,))
    with pytest.raises(CheckpointError, match="no workflow here"):
        load_run(tmp_path / "nowhere")
    go(tmp_path, until="first")
    assert CALLS == ["first"]
    with pytest.raises(CheckpointError, match="holds another workflow"):
        Workflow("other", (first,)).run(tmp_path)
    (tmp_path / "1-first" / "rows.jsonl").unlink()
    with pytest.raises(CheckpointError, match="1-first: a finished stage that cannot be read"):
        go(tmp_path)


def test_report_of_a_blocked_run(tmp_path):
    with pytest.raises(GateFailed):
        go(tmp_path, n=20)
    shown = report(tmp_path)
    assert "**blocks**: fewer" in shown._repr_markdown_() and "blocked at first" in (tmp_path / "report.md").read_text()
    assert "<td>≤ 10</td>" in (tmp_path / "report.html").read_text() and "not done" in shown._repr_html_()


# ── RLVR: a policy that says what it is told to ─────────────────────────────────────────────────────────────────────────

SUMS = rlvr.maths()
TASKS, HELD = SUMS.tasks(120, "train", 0), SUMS.tasks(60, "heldout", 1)


def right(row, i):
    return f"It is {row['truth']['answer']}."


def wrong(row, i):
    return f"It is {row['truth']['answer'] + 1}."


def hedge(row, i):
    return f"It is {row['truth']['answer'] + 1} or {row['truth']['answer']}."


def half(row, i):
    return (right if (row["truth"]["answer"] + i) % 2 else wrong)(row, i)


class Scripted:
    "Stands in for a policy: answers by a function of row and sample, and is as near to any reference as can be."
    backend, source, lora, max_length, cut = "torch", "scripted", None, 512, False

    def __init__(self, script, rows, tokenizer):
        self.script, self.tokenizer = script, tokenizer
        encoder = Encoder(tokenizer, self.max_length)
        self.rows = {tuple(encoder.prompt(row["problem"])): row for row in rows}

    def generate(self, prompts, *, n=1, **settings):
        return [[Completion((1,), np.zeros(1, np.float32), not self.cut, self.script(self.rows[tuple(p)], i)) for i in range(n)]
                for p in prompts]

    def score(self, batch, *, reference=False):
        return np.zeros(batch.ids.shape, np.float32)

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load("tinyworld-instruct", "torch", threads=1).tokenizer


@pytest.fixture
def says(monkeypatch, tokenizer):
    "Let every policy that a stage loads speak by this script."
    def use(script, rows=(), cut=False):
        policy = Scripted(script, [*TASKS, *HELD, *rows], tokenizer)
        policy.cut = cut
        monkeypatch.setattr(rlvr, "load", lambda *_, **__: policy)
    return use


def domain(**changes) -> rlvr.Domain:
    "Sums without benchmarks, so that a script can answer everything."
    return replace(SUMS, **{"tasks": lambda n, split, seed: (TASKS if split == "train" else HELD)[:n],
                            "benchmarks": lambda n, seed: {}, **changes})


def missed(output) -> list[str]:
    return [figure.name for figure in output.gate.missed]


DESIGNED = rlvr.Designed(TASKS, HELD[:30], HELD[30:], [], Gate([]))
PREPARED = rlvr.Prepared(Path("base"), {}, WIDE, Gate([]))


@pytest.mark.parametrize(("script", "cut", "blocks"), [
    (half, False, []), (wrong, False, ["pass rate before training"]), (half, True, ["answers that end by themselves"])])
def test_preparation(says, tmp_path, script, cut, blocks):
    said = {"prompt": "Say it.", "problem": "Say it.", "truth": {"answer": 4}}
    says(script, [said], cut)
    def verdict(row, text): return SimpleNamespace(ok=bool(text))
    further = {"of a harness": [1.0, 0.0]}
    subject = domain(benchmarks=lambda n, seed: {"kept": [said]}, check=verdict, measure=lambda policy: further)
    made = rlvr.preparation(tmp_path, domain=subject, sft_steps=0)
    assert missed(made) == blocks and made.baseline == {"kept": [1.0], **further}


def test_a_benchmark_without_baseline_blocks(says, tmp_path):
    said = {"prompt": "Say it.", "problem": "Say it.", "truth": {"answer": 4}}
    says(half, [said])
    subject = domain(benchmarks=lambda n, seed: {"kept": [said]}, check=lambda row, text: SimpleNamespace(ok=False))
    assert missed(rlvr.preparation(tmp_path, domain=subject, sft_steps=0)) == ["benchmarks with a baseline"]


def broken(n, split, seed):
    "One reference in three says nothing."
    rows = (TASKS if split == "train" else HELD)[:n]
    return [{**row, "verify": {"name": "maths", "value": ""}} if i % 3 == 0 else row for i, row in enumerate(rows)]


def test_low_verifiability_is_caught_where_tasks_are_designed(tmp_path):
    few = dict(n_tasks=100, n_validation=20, n_test=20)
    good = rlvr.design(tmp_path, domain=domain(), **few)
    assert missed(good) == [] and (len(good.tasks), len(good.validation), len(good.test)) == (100, 20, 20)
    bad = rlvr.design(tmp_path, domain=domain(tasks=broken), **few)
    assert missed(bad) == ["verifiability"] and len(bad.tasks) == 66 and len(bad.rejected) == 34 + 14
    assert all(row["verify"]["value"] for row in bad.tasks + bad.validation + bad.test)
    with pytest.raises(GateFailed, match="verifiability: .*wanted ≥ 80 %. redesign tasks, improve the verification system"):
        bad.gate.check("design")


def lenient(row, answer):
    "Pays as soon as the right number is among those in the answer."
    return float(row["verify"]["value"] in answer.replace(".", " ").split())


def slow(row, answer):
    time.sleep(0.002)
    return float(verify(row, answer))


@dataclass
class Moody:
    "Changes its mind."
    asked: int = 0

    def __call__(self, row, answer):
        self.asked += 1
        return float(verify(row, answer)) if self.asked % 50 else 1.0 - verify(row, answer)


def silent(row, answer):
    "Cannot judge one answer in five."
    return float(verify(row, answer)) if row["truth"]["answer"] % 5 else None


@pytest.mark.parametrize(("script", "reward", "settings", "blocks"), [
    (half, rlvr.correct, {}, []),
    (lambda row, i: (right if row["truth"]["answer"] % 4 == 0 else hedge)(row, i), lenient, {},
     ["false positives, its own answers", "false positives, spoilt solutions"]),
    (half, lenient, {}, ["false positives, spoilt solutions"]),  # the policy does not hedge, and yet the hole is found
    (half, slow, {"most_seconds": 0.001}, ["slowest answer (s)"]),
    (half, silent, {}, ["coverage"]),
    (right, rlvr.correct, {}, ["false positives, its own answers", "coverage"]),  # nothing wrong to be tried on
    (half, rlvr.correct, {"n_answers": 40}, ["false positives, its own answers"])])  # too few wrong ones to know
def test_verification(says, tmp_path, script, reward, settings, blocks):
    says(script)
    found = rlvr.verification(tmp_path, PREPARED, rlvr.Designed(TASKS + HELD, [], [], [], Gate([])),
                              domain=domain(reward=reward), **{"n_changed": 30, **settings})
    assert missed(found) == blocks
    if reward is lenient:
        assert "hedged" in {m["kind"] for m in found.mistakes} and not any(m["right"] for m in found.mistakes)


def test_a_verdict_that_changes_is_caught(says, tmp_path):
    says(half)
    found = rlvr.verification(tmp_path, PREPARED, DESIGNED, domain=domain(reward=Moody()))
    assert "same verdict twice" in missed(found)


@pytest.mark.parametrize(("script", "changes", "settings", "blocks"), [
    (half, {}, {}, []),
    (half, {}, {"least_tasks": 1000}, ["different tasks"]),
    (half, {"tasks": TASKS + HELD[:1]}, {}, ["tasks on both sides of the split"]),
    (half, {"tasks": TASKS[:50] + TASKS[:50]}, {}, ["different tasks"]),
    (right, {}, {}, ["tasks solved now and then"]), (wrong, {}, {}, ["tasks solved now and then"]),
    (half, {"tasks": [{**row, "difficulty": {"digits": 2}} for row in TASKS]}, {}, ["share of the commonest level"])])
def test_data(says, tmp_path, script, changes, settings, blocks):
    says(script)
    found = rlvr.data(tmp_path, PREPARED, replace(DESIGNED, **changes), domain=domain(), **{"least_tasks": 100, **settings})
    assert missed(found) == blocks
    assert all(0 <= level["pass@1"].value <= level["pass@4"].value <= 1 for level in found.levels)


def span(value, half=0.01): return Interval(value, value - half, value + half, 100)


@pytest.mark.parametrize(("change", "apart", "verdict"), [
    (span(0.05), span(0.02), "better"), (span(0.005), span(0.02), "flat"), (span(-0.005), span(0.02), "flat"),
    (span(-0.05), span(0.02), "worse"), (span(0.05), span(0.095), "worse")])
def test_better_goes_on_flat_evaluates_worse_rolls_back(change, apart, verdict):
    assert rlvr.decide(change, apart) == verdict


@pytest.mark.parametrize(("verdicts", "kept", "rounds"), [
    (["better", "better", "better"], "round-4", 4), (["better", "flat"], "round-2", 3), (["worse"], "first", 2),
    (["better", "worse"], "round-2", 3), (["flat"], "first", 2)])
def test_iteration_keeps_the_best(monkeypatch, tmp_path, verdicts, kept, rounds):
    level = {"better": 0.3, "flat": 0.0, "worse": -0.3}
    values, made = [0.1] * 50, []

    def further(folder, plan, base, start, rows, tasks, seed):
        made.append((start.name, plan.seed))
        return folder, [v + level[verdicts[len(made) - 1]] for v in made_from[start.name]], span(0.02)
    made_from = {"first": values}
    def keep(*args):
        found = further(*args)
        made_from[found[0].name] = found[1]
        return found
    monkeypatch.setattr(rlvr, "_further", keep)
    started = rlvr.Optimised(Path("first"), [0.0] * 50, values, span(0.1), span(0.02), Gate([]))
    found = rlvr.iteration(tmp_path, PREPARED, DESIGNED, rlvr.Gathered(TASKS, [], Gate([])), started, rounds=3)
    assert found.policy.name == kept and len(found.rounds) == rounds and len({seed for _, seed in made}) == len(made)
    assert [line["verdict"] for line in found.rounds] == ["better", *verdicts] and found.gate.passed


def evaluated(says, tmp_path, script, reward=rlvr.correct, **settings):
    says(script)
    tuned = rlvr.Iterated(Path("new"), [], Gate([]))
    designed = replace(DESIGNED, test=HELD[:settings.pop("n", 60)])
    return rlvr.evaluation(tmp_path, PREPARED, designed, tuned, domain=domain(reward=reward), **settings)


def test_gaming_is_caught_on_what_the_new_policy_writes(says, tmp_path):
    gamed = evaluated(says, tmp_path, hedge, lenient)
    assert "paid answers that are wrong" in missed(gamed) and gamed.after.value == 1.0
    with pytest.raises(GateFailed, match="100.0 % .*wanted < 5 %. add diverse test cases, multi-faceted verification"):
        gamed.gate.check()
    assert missed(evaluated(says, tmp_path, right)) == ["change of the pass rate"]  # honest, but no better than before
    assert "paid answers that are wrong" in missed(evaluated(says, tmp_path, right, n=20))  # too few to say


def test_retention_is_paired_and_of_each_benchmark():
    before = [1.0, 0.0, 1.0, 1.0] * 50
    same, worse = rlvr.retention(before, before), rlvr.retention(before, [1.0, 0.0, 1.0, 0.5] * 50)
    assert (same.value, same.low, same.high) == (1, 1, 1) and worse.value == pytest.approx(5 / 6) and worse.high < 0.95
    assert rlvr.retention([0.0, 0.0], [1.0, 0.0]) is None


@pytest.mark.parametrize(("lost", "opens"), [(0.01, True), (0.08, False)])
def test_the_ruler_of_retention_is_finer_than_its_margin(lost, opens):
    "By as many answers as the stages ask for: one right answer in a hundred lost always passes, eight never do."
    n, samples = (rlvr.evaluation.__kwdefaults__[name] for name in ("n_benchmark", "benchmark_samples"))
    limit = rlvr.evaluation.__kwdefaults__["least_kept"]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        easy = rng.beta(2, 0.5, (n, 1))
        before, again, touched, forgot = (rng.random((n, samples)) < p for p in (easy, easy, 0.15, lost))
        after = np.where(touched, again, before) & ~forgot   # 15 % of the answers are drawn anew, some are forgotten
        kept = rlvr.retention(before.mean(axis=1).tolist(), after.mean(axis=1).tolist())
        assert Figure("kept", kept, limit).holds == opens


# ── RLVR: real policies that go wrong ───────────────────────────────────────────────────────────────────────────────────

def functions(n, split, seed):
    "The world's one-line functions, judged without running them, so that nothing here needs the sandbox."
    return [{**row, "verify": {"name": "function", "tests": [[x, y] for (x,), y in row["verify"]["tests"]]}}
            for row in rlvr.code().tasks(n, split, seed)]


QUICK = replace(rlvr.code(), name="functions", tasks=functions, reward=rlvr.correct,
                benchmarks=lambda n, seed: rlvr._kept("facts", "forbidden")(n, seed))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load("tinyworld-instruct", "torch", threads=1).save(tmp_path_factory.mktemp("base") / "policy")


@pytest.fixture(scope="module")
def designed():
    held = functions(70, "heldout", 1)
    return rlvr.Designed(functions(200, "train", 0), held[:40], held[40:], [], Gate([]))


@pytest.mark.parametrize(("settings", "blocks"), [
    ({"lr": 1e-2, "steps": 3, "params": {"beta": 0.0}}, "KL from the tuned policy"), ({"lr": 1e-9, "steps": 1}, "change of the")])
def test_drift_and_standstill_are_caught_after_optimisation(base, designed, tmp_path, settings, blocks):
    made = rlvr.optimisation(tmp_path, replace(PREPARED, policy=base), designed, rlvr.Gathered(designed.tasks, [], Gate([])),
                             domain=QUICK, backend="torch", batch_size=8, samples=1, max_tokens=32, **settings)
    with pytest.raises(GateFailed, match=blocks):
        made.gate.check("optimisation")
    assert "learning rate" not in str(missed(made)) and (made.policy / "model.safetensors").is_file()


def test_capability_loss_is_caught_by_each_benchmark(base, designed, tmp_path):
    policy = load(base, "torch", threads=1)
    prepared = replace(PREPARED, policy=base, baseline=rlvr._benchmarks(policy, QUICK, 60, 1, 32, 0))
    rows = [{"prompt": row["problem"], "completion": row["solution"]} for row in designed.tasks]
    fit(policy, sft.method(), rows, steps=12, lr=2e-3, batch_size=16, held_out=0, progress=False)  # code and nothing else
    spoilt = rlvr.Iterated(policy.save(tmp_path / "spoilt"), [], Gate([]))
    settings = dict(domain=QUICK, backend="torch", n_benchmark=60, benchmark_samples=1, max_tokens=32, most_kl=9.0)
    found = rlvr.evaluation(tmp_path, prepared, designed, spoilt, **settings)
    assert "facts, kept" in missed(found) and found.retained["facts"].high < 0.95 and found.change.low > 0
    same = rlvr.evaluation(tmp_path, prepared, designed, replace(spoilt, policy=base), **settings)
    assert {k: v.value for k, v in same.retained.items()} == {"facts": 1.0, "forbidden": 1.0}


def test_adapters_stay_on_the_tuned_policy(base, designed, backend, tmp_path):
    prepared, gathered = replace(PREPARED, policy=base), rlvr.Gathered(designed.tasks, [], Gate([]))
    few = dict(domain=QUICK, backend=backend, lora=4, batch_size=4, samples=1, max_tokens=32, most_kl=9.0)
    made = rlvr.optimisation(tmp_path / "5", prepared, designed, gathered, steps=2, lr=1e-3, **few)
    more = rlvr.iteration(tmp_path / "6", prepared, designed, gathered, made, steps=1, lr=1e-3, rounds=1, **few)
    further = tmp_path / "6" / "round-2" / "policy"
    for place in (made.policy, further):
        assert (place / "adapter_config.json").is_file() and not (place / "model.safetensors").exists()
    assert 0 < made.kl.value and len(more.rounds) == 2 and more.policy in (made.policy, further)


def test_only_online_methods_and_known_domains(base, designed, tmp_path):
    prepared, gathered = replace(PREPARED, policy=base), rlvr.Gathered(designed.tasks, [], Gate([]))
    with pytest.raises(ReAlignError, match="unknown domain 'poetry'; wanted maths or code"):
        rlvr.design(tmp_path, domain="poetry")
    with pytest.raises(TypeError):
        rlvr.optimisation(tmp_path, prepared, designed, gathered, domain=QUICK, backend="torch", method="dpo")


# ── killed, and gone on ─────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = dict(domain=QUICK, backend="torch", sft_steps=1, n_benchmark=20, benchmark_samples=1, samples=1, n_tasks=120,
             n_validation=30, n_test=40, n_answers=80, n_changed=20, n_tried=30, tries=2, least_tasks=100, steps=4,
             lr=5e-4, batch_size=8, rounds=1, most_kl=5.0, least_kept=0.3, most_false=0.2, max_tokens=32)
PLACES = ["preparation", "design", "verification", "data", "optimisation", "middle of optimisation", "iteration",
          "middle of iteration", "evaluation"]


def killing(at: str, log: Path) -> Workflow:
    "The workflow, with a kill -9 where it says, and a note of each stage that begins."
    def marked(stage):
        @wraps(stage)
        def begin(*args, **settings):
            with log.open("a") as file:
                file.write(stage.__name__ + "\n")
            if stage.__name__ == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if at == f"middle of {stage.__name__}":
                _kill_after_steps(2)
            return stage(*args, **settings)
        return begin
    return Workflow("rlvr", tuple(marked(stage) for stage in rlvr.RLVR.stages))


def _kill_after_steps(n):
    "Die in the middle of training, in the step after the n-th."
    from realign_core.engine import rollout
    scores, calls = rollout.scores, []

    def counted(*args):
        calls.append(1)
        if len(calls) > n:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores(*args)
    rollout.scores = counted


def chain(folder: Path, log: Path) -> None:
    "One process that is killed after another, each at its place, and a last one that is left alone."
    load("tinyworld-instruct", "torch", threads=1)  # so that the framework is imported once, not in every child
    for at in [*PLACES, ""]:
        child = os.fork()
        if not child:
            killing(at, log).run(folder, progress=False, **SMALL)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) if at else status == 0, (at, status)


def plain(folder: Path) -> dict:
    "Everything that a run found, but how long it took."
    found = {}
    for path in sorted(folder.glob("*/stage.json")):
        record = json.loads(path.read_text())
        gate = record["output"]["gate"]["figures"]
        record["output"]["gate"]["figures"] = [f for f in gate if "(s)" not in f["name"]]
        found[path.parent.name] = {k: v for k, v in record.items() if k != "seconds"}
    return found


@pytest.mark.seconds(60)
def test_killed_at_every_stage_it_ends_like_a_run_that_was_not(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest; from pathlib import Path\n" \
           f"from test_workflows import chain; chain(*map(Path, {[str(tmp_path / name) for name in ('killed', 'log')]!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    whole = rlvr.run(tmp_path / "whole", progress=False, **SMALL)
    assert whole.passed and load_run(tmp_path / "killed").passed
    assert plain(tmp_path / "killed") == plain(tmp_path / "whole")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    files = [p.relative_to(whole) for p in [*whole.rglob("*.jsonl"), *whole.rglob("model.safetensors")] if p.name != "log.jsonl"]
    assert len(files) > 8 and [path for path in files if (killed / path).read_bytes() != (whole / path).read_bytes()] == []
    begun = (tmp_path / "log").read_text().split()
    assert Counter(begun) == dict.fromkeys(rlvr.RLVR.places(""), 2) | {"optimisation": 3, "iteration": 3}
    shown = report(tmp_path / "killed")
    assert list(shown.pictures)[0] == "rlvr" and "all gates are open" in (tmp_path / "killed" / "report.md").read_text()
