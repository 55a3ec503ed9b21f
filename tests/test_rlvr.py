"""RL with verifiable rewards: which verifier judges what, what is refused, and that a coin is no teacher."""

from __future__ import annotations

import numpy as np
import pytest

from realign_core import fit, load
from realign_core.data.formats import read
from realign_core.data.verifiable import VERIFIERS, functions, reward, sums
from realign_core.engine.encoding import Encoder
from realign_core.engine.rollout import encode_prompt, scores
from realign_core.errors import DataError, ReAlignError
from realign_core.evaluate.tasks import coin, task_trial
from realign_core.methods import get, names, rlvr
from realign_core.methods.rlvr import Verified
from realign_core.rewards.code import code_reward

DOUBLE = {"name": "code", "entry": "f", "reference": "def f(x): return x * 2", "inputs": [{"int": [-9, 9]}]}


def row(block=None, **more):
    return {"problem": "What is 3 times 2?", "solution": "6", **({"verify": block} if block else {}), **more}


@pytest.fixture(scope="module")
def policy():
    return load("tinyworld-instruct", "torch", threads=1)


def examples(policy, rows):
    encoder = Encoder(policy.tokenizer, policy.max_length)
    return [encode_prompt(each, encoder, 24) for each in read(rows, "online")]


# Which verifier judges

def test_each_row_by_its_own_and_in_its_order():
    blocks = [{"name": "number", "value": 6}, DOUBLE, {"name": "exact", "value": "6"}, DOUBLE, {"name": "number", "value": 7}]
    rows = [row(block) for block in blocks]
    answers = ["It is 6.", "def f(x): return x + x", "It is 6.", "def f(x): return x * 3", "It is 7."]
    assert Verified().many(rows, answers) == [1, 1, 0, 0, 1]
    assert [Verified()(*pair) for pair in zip(rows, answers, strict=True)] == [1, 1, 0, 0, 1]
    assert scores(Verified(), rows, answers)[0] == [1, 1, 0, 0, 1]


def test_it_says_what_the_verifier_says():
    rows = sums(20) + functions(20)
    for answer in ("It is 62.", "def f(x): return x + 3", "", "<think>"):
        assert Verified().many(rows, [answer] * 40) == [reward(each, answer) for each in rows]
    assert Verified().many(rows, [each["solution"] for each in rows]) == [1.0] * 40


def test_code_is_judged_together(monkeypatch):
    calls = []
    monkeypatch.setattr(type(code_reward), "many", lambda self, rows, answers: calls.append(len(rows)) or [1.0] * len(rows))
    assert Verified("code").many([row(DOUBLE)] * 5, ["x"] * 5) == [1.0] * 5 and calls == [5]


@pytest.mark.parametrize("name", ["number", "maths", "exact"])
def test_a_solution_serves_as_reference_when_there_is_no_block(name):
    assert Verified(name).many([row(), row()], ["6", "7"]) == [1, 0]


def test_a_row_whose_reference_cannot_be_used_has_no_reward():
    broken = {**DOUBLE, "reference": "def f(x): raise ValueError"}
    blocks = [{"name": "maths", "value": "\\frac{1}{"}, broken, {"name": "number", "value": "six"}]
    right = {"name": "number", "value": 6}
    assert Verified().many([row(block) for block in (*blocks, right)], ["6"] * 4) == [None, None, None, 1]


@pytest.mark.parametrize(("name", "block", "found"), [
    ("code", {"name": "number", "value": 6}, "number"), (None, None, "wanted exact or"), (None, {"name": "vibes"}, "vibes"),
    (None, {"name": ["number"]}, "number"), ("number", "exact", "exact")])
def test_a_row_for_another_verifier_is_named(name, block, found):
    with pytest.raises(DataError, match=f"(?s)verify.name.*{found}") as caught:
        Verified(name)(row(block, row=7), "6")
    assert "row 7" in str(caught.value)


# The record

def test_every_online_method_can_be_paid_by_a_verifier():
    assert set(rlvr.online()) == {name for name in names() if name != "rlvr" and get(name).rollout}
    assert {"grpo", "rloo", "online_dpo", "rejection"} <= set(rlvr.online())
    for name in rlvr.online():
        made, under = rlvr.method("number", under=name, n=4, max_tokens=24), get(name, n=4, max_tokens=24)
        assert made.name == "rlvr" and made.rollout.reward == Verified("number") and made.card == rlvr.CARD
        for kept in ("reference", "updates", "watch", "defaults", "format"):
            assert getattr(made, kept) == getattr(under, kept)
        assert {**under.params, "reward": "number", "under": name} == made.params


def test_the_settings_are_those_of_the_method_under_it():
    assert rlvr.method(kind="dapo", skip_equal=True, tries=2).params["kind"] == "dapo"
    with pytest.raises(ReAlignError, match="n ≥ 2"):
        rlvr.method(n=1)
    with pytest.raises(TypeError, match="kind"):
        rlvr.method(under="rloo", kind="dapo")


@pytest.mark.parametrize("given", [dict(verifier="vibes"), dict(under="dpo"), dict(under="rlvr"), dict(under="ppoo"),
                                   dict(verifier=coin), dict(reward=coin), dict(verifier=3)])
def test_what_is_no_verifier_or_no_online_method_is_refused(given):
    with pytest.raises(ReAlignError, match="verifier|online method"):
        rlvr.method(**given)


def test_a_learned_reward_is_told_where_it_belongs(policy):
    with pytest.raises(ReAlignError, match=r"grpo.method\(reward\)"):
        rlvr.method(policy)
    with pytest.raises(ReAlignError, match=r"grpo.method\(reward\)"):
        rlvr.method(reward=policy)


def test_a_verifier_of_ones_own_joins_by_its_name(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "shouts", lambda answer, sign="!": answer.endswith(sign))
    made = rlvr.method("shouts")
    assert made.rollout.reward.many([row({"name": "shouts"}), row({"name": "shouts", "sign": "?"})], ["yes!", "yes!"]) == [1, 0]


# Before the first step

def test_a_row_that_cannot_be_judged_stops_the_run_before_it_begins(policy, monkeypatch):
    monkeypatch.setattr(policy, "generate", lambda *a, **k: pytest.fail("the model was asked"))
    rows = [*functions(6), row({"name": "number", "value": "six"}), row({"name": "number", "value": "seven"})]
    with pytest.raises(DataError, match="2 of 8 rows cannot be judged.*row 7|row 7.*2 of 8 rows cannot be judged"):
        fit(policy, rlvr.method(), rows, steps=1, held_out=0)


def test_prompts_without_a_verifier_are_refused(policy):
    with pytest.raises(DataError, match="verify.name"):
        fit(policy, rlvr.method(), [{"prompt": "What is 1 + 1?"}] * 4, steps=1, held_out=0)
    assert rlvr.check(examples(policy, functions(3)), Verified()) is None


# Learning

def train(policy, method, rows, **settings):
    return fit(policy, method, rows, steps=4, lr=5e-4, batch_size=12, held_out=0, seed=1, progress=False, **settings)


def accuracy(policy, trial):
    return trial.measure(policy, seed=1, max_tokens=32, tries=4).values["right"].mean()


def test_pass_at_1_of_code_rises_under_a_verifier_on_held_out_functions(backend):
    trial = task_trial(kind="code", n=200, n_test=60)
    start = load("tinyworld-instruct", backend, threads=1)
    before = accuracy(start, trial)
    run = train(start, rlvr.method(n=8, max_tokens=32, beta=0.0), trial.rows)
    assert accuracy(run.policy, trial) > before + 0.15


def test_it_is_the_method_under_it_to_the_last_bit():
    rows = task_trial(kind="code", n=60, n_test=10).rows
    runs = [train(load("tinyworld-instruct", "torch", threads=1, seed=1), method, rows)
            for method in (rlvr.method(beta=0.0, max_tokens=24), get("grpo", beta=0.0, max_tokens=24))]
    losses = [[r["loss"] for r in run.history if "loss" in r] for run in runs]
    assert losses[0] == losses[1] and np.ptp([r["reward"] for r in runs[0].history if "reward" in r]) > 0
