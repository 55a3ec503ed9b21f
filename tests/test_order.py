"The order is checked before anything is trained; a scorecard is paired by question; what was lost is named; both frameworks."

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT

from realign_core.errors import CheckpointError, DataError, GateFailed, ReAlignError
from realign_core.evaluate.calibration import ece
from realign_core.evaluate.metrics import Interval, paired
from realign_core.workflows import order
from realign_core.workflows.order import Kit, Model, Scores, Staged


class Toy:
    "A policy of two numbers, each the share of its questions that it answers right."
    def __init__(self, a=0.2, b=0.2):
        self.a, self.b = a, b

    def save(self, folder):
        folder.mkdir(parents=True)
        (folder / "policy.json").write_text(json.dumps([self.a, self.b]))
        return folder


def answers(share, n=100):
    return (np.arange(n) < share * n).astype(float).tolist()


def kit(log=None, **more):
    "Stage `a` teaches the first skill, `b` the second at the price of half the first, `idle` nothing."
    def a(m): return Model(Toy(0.9, m.policy.b), m.scales)
    def b(m): return Model(Toy(m.policy.a / 2, 0.9), {"t": [0.5, 0.0]})
    def noted(name, do):
        def stage(m):
            (log if log is not None else []).append(name)
            return do(m)
        return stage
    stages = {name: noted(name, do) for name, do in (("a", a), ("b", b), ("idle", lambda m: m))}
    return Kit(**{**dict(
        stages=stages, start=lambda: Model(Toy()), measure=lambda m: Scores({"A": answers(m.policy.a), "B": answers(m.policy.b)}),
        mine={"a": "A", "b": "B", "idle": "A"}, reopen=lambda folder: Toy(*json.loads((folder / "policy.json").read_text()))),
        **more})


# The order

@pytest.mark.parametrize(("asked", "said"), [
    ((), "wanted names of stages"), ("sft", "wanted names of stages"), (("sft", "rlhf"), "no stage 'rlhf'"),
    (("sft", "dpo", "sft"), "'sft' stands in the order twice")])
def test_an_order_that_cannot_be(asked, said):
    with pytest.raises(ReAlignError, match=said):
        order.check_order(asked, order.ORDER)


def test_both_orders_have_all_stages_and_a_measure_for_each():
    assert sorted(order.ORDER) == sorted(order.CHANGED) == sorted(order.MINE)
    order.check_order(order.ORDER, order.ORDER)


def test_it_is_checked_before_anything_is_done(tmp_path):
    log = []
    with pytest.raises(ReAlignError, match="no stage 'c'; wanted one of a, b, idle"):
        order.workflow(("a", "c"), kit(log))
    assert not log


def test_a_stage_that_is_there_for_nothing():
    with pytest.raises(ReAlignError, match="nothing says what stage 'b' is there for"):
        kit(mine={"a": "A", "idle": "A"})


def test_unknown_settings_of_a_tiny_stage():
    with pytest.raises(ReAlignError, match="no stage 'ppo'"):
        order.tiny_kit(settings={"ppo": {}})


# The run

def test_each_stage_goes_on_from_the_one_before_and_what_it_took_is_seen(tmp_path):
    outputs = order.workflow(("a", "b"), kit()).run(tmp_path / "run", progress=False).outputs
    start, first, second = order.lines(outputs)
    assert [line["stage"] for line in (start, first, second)] == ["start", "a", "b"] and not start["changes"]
    assert first["scores"]["A"].value == 0.9 and first["changes"]["A"].value == pytest.approx(0.7)
    assert second["changes"]["A"].value == pytest.approx(-0.45) and second["changes"]["A"].high < 0
    assert outputs["b"].scales == {"t": [0.5, 0.0]} and outputs["b"].gate.passed
    gate = order.kept(outputs, kit().mine)
    assert [f.name for f in gate.figures] == ["A, kept since a"] and not gate.passed
    assert gate.figures[0].measured.value == pytest.approx(0.5)


def test_the_other_way_round_nothing_is_lost(tmp_path):
    outputs = order.workflow(("b", "a"), kit()).run(tmp_path / "run", progress=False).outputs
    assert order.kept(outputs, kit().mine).passed and outputs["a"].card.row()["A"].value == 0.9
    assert outputs["a"].scales == {"t": [0.5, 0.0]}  # how probabilities are read is handed on


def test_a_stage_that_does_nothing_blocks(tmp_path):
    with pytest.raises(GateFailed, match="change of A"):
        order.workflow(("a", "idle"), kit()).run(tmp_path / "run", progress=False)


def test_it_goes_on_where_it_stopped_and_not_with_another_order_or_other_settings(tmp_path):
    log = []
    order.workflow(("a", "b"), kit(log)).run(tmp_path / "run", until="a", progress=False)
    order.workflow(("a", "b"), kit(log)).run(tmp_path / "run", progress=False)
    assert log == ["a", "b"]
    with pytest.raises(CheckpointError, match="another workflow"):
        order.workflow(("b", "a"), kit(log)).run(tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match="other settings"):
        order.workflow(("a", "b"), kit(log, fingerprint="other")).run(tmp_path / "run", progress=False)
    assert log == ["a", "b"]


# Scores

def test_changes_are_paired_by_question():
    before, after = Scores({"A": [0, 1, 1, 0]}), Scores({"A": [1, 1, 1, 0]})
    assert after.against(before)["A"] == paired([0, 1, 1, 0], [1, 1, 1, 0], unit="points")
    assert after.against(before)["ECE"] is None and after.row()["ECE"] is None


@pytest.mark.parametrize("values", [{}, {"A": []}])
def test_nothing_measured(values):
    with pytest.raises(DataError, match="nothing was measured"):
        Scores(values)


@pytest.mark.parametrize(("other", "said"), [
    ({"B": [1.0]}, "not the same measures"), ({"A": [1.0, 0.0]}, "not the same prompts")])
def test_other_questions_are_not_compared(other, said):
    with pytest.raises(DataError, match=said):
        Scores({"A": [1.0]}).against(Scores(other))


def test_the_calibration_error_is_that_of_what_was_claimed():
    rng = np.random.default_rng(0)
    c, h = rng.random(200), (rng.random(200) < 0.3).astype(float)
    claims = {"confidence": [*c, None, None], "right": [*h, None, None]}
    one = Scores({"A": [1.0]}, claims)
    assert one.row()["ECE"].value == pytest.approx(ece(c, h))
    sure = Scores({"A": [1.0]}, {"confidence": [*np.full(200, 0.3), None, None], "right": [*h, None, None]})
    change = sure.against(one)["ECE"]
    assert change.value == pytest.approx(ece(np.full(200, 0.3), h) - ece(c, h)) and change.high < 0
    assert one.against(one)["ECE"].value == 0 and not one.against(one)["ECE"].excludes(0)


def staged(values, confidence=(), right=()):
    claims = {"confidence": list(confidence), "right": list(right)}
    return Staged(None, {}, {"values": values, "claims": claims, "kl": None}, {}, None)


def test_what_is_kept_of_a_measure_that_should_be_small():
    h = [1.0, 0.0] * 100
    good, bad = {"made up": answers(0.1, 200)}, {"made up": answers(0.8, 200)}
    gate = order.kept({"honesty": staged(good, [0.5] * 200, h), "calibration": staged(good, [0.5] * 200, h),
                       "grpo": staged(bad, [0.9] * 200, h)}, order.MINE)
    names = {f.name: f for f in gate.missed}
    assert set(names) == {"not made up, kept since honesty", "ECE, change since calibration"}
    assert names["not made up, kept since honesty"].measured.value == pytest.approx(0.2 / 0.9)
    assert names["ECE, change since calibration"].measured.value == pytest.approx(0.4)


def test_scales_are_by_topic_and_leave_silence_alone():
    model = Model(None, {"animal": [0.0, 0.0], "sum": [1.0, 0.0]})
    found = model.confidence(np.array([0.9, 0.9, np.nan, 0.9]), ["animal", "sum", "sum", "market"])
    assert found[:2] == pytest.approx([0.5, 0.9]) and np.isnan(found[2]) and found[3] == pytest.approx(0.9)
    assert Model(None).confidence(np.array([0.9, np.nan]), ["sum", "sum"])[0] == 0.9


# The tiny world's questions and stages

def test_no_question_is_in_two_parts():
    made = order.questions(seed=3)
    def told(kind, rows): return {(r["a"], r["b"]) if kind == "sums" else (r["entity"], r["attribute"]) for r in rows}
    for kind in ("known", "unknown", "sums"):
        test, fit = told(kind, made["test"][kind]), told(kind, made["fit"][kind])
        assert len(test) == 130 and len(fit) == 70 and not test & fit, kind
    tuned = told("known", made["tune"]["known"])
    assert not tuned & (told("known", made["test"]["known"]) | told("known", made["fit"]["known"])) and len(tuned) == 420
    strange = {r["entity"] for r in made["tune"]["made-up"]}
    assert not strange & {r["entity"] for part in ("test", "fit") for r in made[part]["unknown"]}
    held = {r["entity"] for r in made["test"]["known"]} - {r["entity"] for r in made["tune"]["known"]}
    assert len(held) == 40  # names that abstaining was not taught with


@pytest.mark.parametrize("n", [0, 12, 131])
def test_not_so_many_questions(n):
    with pytest.raises(DataError, match="wanted 13 to 130"):
        order.questions(n=n)


@pytest.mark.parametrize("rows", [{}, {"known": [{}], "unknown": [{}], "sums": []}])
def test_a_calibration_without_validation_rows(rows):
    with pytest.raises(DataError, match="no questions to fit a calibration with"):
        order.calibration_stage(Model(None), rows, seed=0)


def test_the_whole_order_on_the_shipped_model(backend, tmp_path):
    small = {"dpo": dict(steps=2), "grpo": dict(steps=1), "honesty": dict(steps=2, facts=6, wordings=1)}
    made = order.tiny_kit(backend, n=13, tries=1, settings=small)
    outputs = order.workflow(order.ORDER, made).run(tmp_path / "run", least=-9.0, progress=False).outputs
    rows = {line["stage"]: line["scores"] for line in order.lines(outputs)}
    assert rows["sft"]["known, right"].value > 0.9 > rows["start"]["known, right"].value and rows["sft"]["KL"].value == 0
    assert outputs["calibration"].scales.keys() == {"animal", "sum", "market"} and not outputs["grpo"].scales
    same = [outputs[name].scores["values"] for name in ("grpo", "calibration")]
    assert same[0] == same[1]  # calibration touches no weight
    assert outputs["honesty"].scales == outputs["calibration"].scales
    assert rows["calibration"]["ECE"].value < rows["grpo"]["ECE"].value
    assert order.plot({"toy": order.lines(outputs)}).axes[0].get_title() == "toy"


# The benchmark's record

RECORD = json.loads((ROOT / "benchmarks" / "order.json").read_text())


@pytest.mark.parametrize("backend", RECORD)
def test_the_record_holds_every_stage_of_both_orders(backend):
    record = RECORD[backend]
    assert {"hardware", "date", "framework"} <= set(record) and list(record["each seed"]) == [str(s) for s in record["seeds"]]
    for found in (record["all seeds"], *record["each seed"].values()):
        for name, stages in (("recommended", order.ORDER), ("changed", order.CHANGED)):
            assert [line["stage"] for line in found["lines"][name]] == ["start", *stages]
            assert len(found["kept"][name]) == len(stages) - 1
        same = [[line["scores"] for line in found["lines"][name]][:3] for name in found["lines"]]
        assert same[0] == same[1]  # until the orders part, they are the same run
    every = record["all seeds"], *record["each seed"].values()
    whole, *parts = (found["lines"]["changed"][-1]["scores"]["made up"]["n"] for found in every)
    assert whole == sum(parts)


def test_figures_that_were_kept_can_be_drawn():
    line = {"stage": "start", "scores": {"A": Interval(0.5, 0.4, 0.6, 9, "%"), "KL": None}, "changes": {}}
    moved = {**line, "stage": "a", "changes": {"A": Interval(-0.2, -0.3, -0.1, 9, "points")}}
    shown = [text.get_text() for text in order.plot({"toy": [line, moved]}).axes[0].texts]
    assert shown == ["50", "–", "50 ↓", "–"]
