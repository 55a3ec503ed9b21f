"""The online benchmark's record has all that its page shows, and both sides start and take a step. Nothing is timed."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
from argparse import Namespace

import nbformat
import pytest
from conftest import ROOT

RECORD = json.loads((ROOT / "benchmarks" / "online.json").read_text())
RESULTS = RECORD["results"]


@pytest.fixture
def benchmark(monkeypatch):
    "Modules of the benchmark, by name."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    def get(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return get


@pytest.mark.parametrize("key", RESULTS)
def test_a_result_is_whole_and_of_the_same_work(key, benchmark):
    r, online = RESULTS[key], benchmark("online")
    assert key == f"{r['size']} {r['peer']} {r['variant']}"
    assert {name: r[name] for name in online.SETTINGS} == online.SETTINGS
    assert r["prompts"] == online.SIZES[r["size"]]["prompts"] and r["completions"] == r["prompts"] * r["n"]
    assert len(r["ratios"]) == r["pairs_timed"] == r["rounds"] * (r["steps"] - 1) > 0
    assert r["ratio"] == statistics.median(r["ratios"]) and r["ratio_low"] == min(r["ratios"])
    assert r["ratios"] == [y / x for a, b in zip(r["ours"]["seconds"], r["theirs"]["seconds"], strict=True)
                           for x, y in zip(a[1:], b[1:], strict=True)]
    assert r["memory_ratio"] == r["ours"]["peak_mib"] / r["theirs"]["peak_mib"]
    for side in (r["ours"], r["theirs"]):
        for curve in ("seconds", "losses", "rewards", "lengths"):
            assert [len(run) for run in side[curve]] == [r["steps"]] * r["rounds"]
        assert all(abs(run[0]) < 1e-5 for run in side["losses"])  # the policy is the reference, the advantages add up to 0
        assert side["seconds_per_step"] == statistics.median(t for run in side["seconds"] for t in run[1:])
        assert side["completions_per_second"] == r["completions"] / side["seconds_per_step"]
        assert sum(side["parts"].values()) == pytest.approx(side["seconds_per_step"], rel=0.15)  # medians of parts
        if r["size"] == "large":
            assert {length for run in side["lengths"] for length in run} == {r["max_tokens"]}


def test_every_peer_is_measured_on_both_models_and_has_a_target(benchmark):
    online = benchmark("online")
    assert {(r["size"], r["peer"]) for r in RESULTS.values() if r["variant"] == "tuned"} == {
        (size, peer) for size in online.SIZES for peer in online.TARGETS}
    assert RECORD["targets"] == {peer: {m: {"speed": speed, "memory": memory} for m, (speed, memory) in methods.items()}
                                 for peer, methods in online.TARGETS.items()}


def test_the_reward_by_hand(benchmark):
    benchmark("peers_sides")
    reward = benchmark("online_sides").reward
    assert reward("<think>9+8=17</think>It is 17.", "17") == 1 and reward("It is 17, or 18.", "17") == 0
    assert reward("", "17") == 0 and reward("w2 w4 w5 w7", "") == 0.5 and reward("", "") == 0


def test_parts_of_a_step_do_not_overlap(benchmark, monkeypatch):
    benchmark("peers_sides")
    sides, now = benchmark("online_sides"), [0.0]
    monkeypatch.setattr(sides.time, "perf_counter", lambda: now[0])
    clock = sides.Clock()
    def work(seconds): now[0] += seconds
    inner = clock.part("inner", work)
    def both():
        work(2.0)
        inner(3.0)
    clock.part("outer", both)()
    clock.part("never", work, unless=lambda seconds: True)(1.0)
    assert clock.read() == {"inner": 3.0, "outer": 2.0} and clock.read() == {}


def test_both_sides_take_steps_on_the_planned_prompts(benchmark, tmp_path):
    "Ours checks that `fit` took the planned rows, and ends in an error otherwise."
    online = benchmark("online")
    plan = online.make_plan(tmp_path, "small", "trl", 0, Namespace(steps=2, threads=1, variant="tuned"))
    plan |= {"n": 2, "max_tokens": 2}
    (tmp_path / "small-trl" / "plan.json").write_text(json.dumps(plan))
    for side in online.one_round(plan, "trl", sys.executable, stock=False):
        assert len(side["reward"]) == len(side["loss"]) == 2 and max(side["length"]) <= 2
        assert side["peak_mib"] > side["loaded_mib"] > 0
        assert {"writing", "reward", "reference", "learning"} <= side["parts"][0].keys()


def test_the_page_shows_the_record():
    page = nbformat.read(ROOT / "nbs" / "hardware" / "01_online.ipynb", as_version=4)
    text = "\n".join(o["data"].get("text/markdown", "") for c in page.cells for o in c.get("outputs", []) if "data" in o)
    for r in RESULTS.values():
        assert f"**{r['ratio']:.2f}** | {r['ratio_low']:.2f} to {r['ratio_high']:.2f}" in text, f"{r['size']}, {r['peer']}"
        assert f"{r['ours']['peak_mib']:,.0f}, {r['theirs']['peak_mib']:,.0f}" in text
    code = "\n".join(c.source for c in page.cells if c.cell_type == "code")
    assert not re.search(r"import time|perf_counter|subprocess|realign_core import (load|fit)", code)
