"""Rollouts, and `fit` with methods that write their own answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from realign_core import fit, load
from realign_core.data.formats import read
from realign_core.data.verifiable import reward, sums
from realign_core.engine.batching import collate
from realign_core.engine.encoding import Encoder
from realign_core.engine.rollout import Rollout, encode_prompt, scores
from realign_core.errors import CheckpointError, DataError, ReAlignError, TrainingError
from realign_core.methods import grpo, online_dpo, rejection, rloo

ROWS = sums(40)


def coin(row, answer):
    "A reward that depends on the answer's length alone."
    return float(len(answer) % 3 == 0)


@pytest.fixture(scope="module")
def policies():
    found = {}
    def get(backend):
        if backend not in found:
            found[backend] = load("tinyworld-instruct", backend, threads=1)
        return found[backend]
    return get


def prompts(policy, rows=ROWS[:6], max_tokens=24):
    encoder = Encoder(policy.tokenizer, policy.max_length)
    return [encode_prompt(row, encoder, max_tokens) for row in read(rows, "online")]


def test_groups_hold_what_was_sampled(policies, backend):
    policy = policies(backend)
    asked = prompts(policy)
    groups, figures = Rollout(reward, n=3, max_tokens=24)(policy, asked, seed=(5,))
    assert [g.row for g in groups] == [p.row for p in asked] and all(len(g.sequences) == 3 for g in groups)
    for prompt, group in zip(asked, groups, strict=True):
        start = len(prompt)
        for s, old in zip(group.sequences, group.extras["old_logps"], strict=True):
            assert s.ids[:start].tolist() == prompt.sequences[0].ids.tolist()
            assert not s.mask[:start].any() and s.mask[start:].all() and (old[:start] == 0).all() and (old[start:] <= 0).all()
    batch = collate(groups)
    assert batch.extras["rewards"].shape == (18,) and batch.group == 3
    assert np.abs(policy.score(batch) - batch.extras["old_logps"]).max() < 1e-3  # float32: sampling against scoring
    texts = [policy.tokenizer.decode(s.ids[len(p):], skip_special_tokens=True) for p, g in zip(asked, groups, strict=True)
             for s in g.sequences]
    rows = [p.task for p in asked for _ in range(3)]
    assert batch.extras["rewards"].tolist() == [reward(row, text) for row, text in zip(rows, texts, strict=True)]
    assert figures["reward"] == (batch.extras["rewards"].sum(), 18) and figures["length"][0] == batch.mask.sum()
    assert figures["entropy"][0] == pytest.approx(-batch.extras["old_logps"].sum(), rel=1e-5)


def test_seeds_and_batch_size(policies, backend):
    policy = policies(backend)
    asked = prompts(policy)
    def ids(**settings):
        seed = settings.pop("seed", (1, 2))
        groups, _ = Rollout(coin, n=2, max_tokens=12, **settings)(policy, asked, seed=seed)
        return [s.ids.tolist() for g in groups for s in g.sequences]
    assert ids() == ids() == ids(at_once=3) != ids(seed=(1, 3))


def test_equal_groups_are_counted_and_left_out_on_request(policies, backend):
    policy = policies(backend)
    asked = prompts(policy)
    def half(row, answer): return 1.0 if row["problem"] == ROWS[0]["problem"] else float(len(answer) % 2)
    groups, figures = Rollout(half, n=6, max_tokens=24)(policy, asked)
    equal = sum(np.ptp(g.extras["rewards"]) == 0 for g in groups)
    assert len(groups) == 6 and figures["equal"] == (equal, 6) and equal >= 1
    kept, again = Rollout(half, n=6, max_tokens=24, skip_equal=True)(policy, asked)
    assert len(kept) == 6 - equal and again["equal"] == (equal, 6)
    assert all(np.ptp(g.extras["rewards"]) > 0 for g in kept)


def test_other_prompts_take_the_place_of_groups_without_signal(policies):
    policy = policies("torch")
    asked = prompts(policy, ROWS[:12])
    easy = {row["problem"] for row in ROWS[:4]}
    turns = itertools.cycle([0.0, 1.0])
    def half(row, answer): return 1.0 if row["problem"] in easy else next(turns)
    groups, figures = Rollout(half, n=6, max_tokens=24, skip_equal=True, tries=5)(policy, asked[:4], pool=asked)
    assert len(groups) == 4 and all(np.ptp(g.extras["rewards"]) > 0 for g in groups)
    assert figures["equal"][0] >= 4 and figures["equal"][1] > 4


def test_cut_answers_are_not_learned_from_on_request(policies):
    policy = policies("torch")
    asked = prompts(policy, max_tokens=3)
    groups, figures = Rollout(coin, n=2, max_tokens=3, mask_truncated=True)(policy, asked)
    assert figures["truncated"][0] == 12 and not any(s.targets for g in groups for s in g.sequences)
    kept, _ = Rollout(coin, n=2, max_tokens=3)(policy, asked)
    assert all(s.targets == 3 for g in kept for s in g.sequences)


def test_a_row_that_cannot_be_judged_is_left_out_and_counted(policies):
    policy = policies("torch")
    def shy(row, answer): return None if row["problem"] == ROWS[1]["problem"] else coin(row, answer)
    groups, figures = Rollout(shy, n=2, max_tokens=8)(policy, prompts(policy))
    assert [g.row for g in groups] == [1, 3, 4, 5, 6] and figures["unscored"] == (2, 12)


@pytest.mark.parametrize("value,found", [("high", "high"), (float("nan"), "nan"), (float("inf"), "inf"), ([1], "1")])
def test_a_reward_must_be_a_finite_number(value, found):
    with pytest.raises(DataError, match="no finite number") as error:
        scores(lambda row, answer: value, [{"row": 7}], ["x"])
    assert error.value.row == 7 and found in str(error.value)


def test_a_reward_that_fails_names_row_and_answer():
    def broken(row, answer): return row["missing"]
    with pytest.raises(DataError, match="KeyError") as error:
        scores(broken, [{"row": 3}], ["It is 5."])
    assert error.value.row == 3 and "It is 5." in str(error.value)


def test_a_reward_may_judge_many_at_once():
    class Fast:
        def many(self, rows, answers): return [float(len(a)) for a in answers]
    assert scores(Fast(), [{}, {}], ["a", "bbb"]) == ([1.0, 3.0], [])


def test_the_parts_of_a_reward_get_curves_of_their_own(policies):
    from realign_core.rewards.rewards import Combined
    policy = policies("torch")
    both = Combined({"right": (1.0, reward), "coin": (0.5, coin)})
    groups, figures = Rollout(both, n=2, max_tokens=24)(policy, prompts(policy))
    total = figures["reward: right"][0] + 0.5 * figures["reward: coin"][0]
    assert figures["reward"] == (pytest.approx(total), 12) and figures["reward: right"][1] == 12


def test_a_prompt_leaves_room_for_its_answer(policies):
    policy = policies("torch")
    row, = read([{"prompt": "north " * 600}], "online")
    with pytest.raises(DataError, match="no room"):
        encode_prompt(row, Encoder(policy.tokenizer, policy.max_length, "error"), 24)
    made = encode_prompt(row, Encoder(policy.tokenizer, policy.max_length, "left"), 24)
    assert len(made) == policy.max_length - 24


@pytest.mark.parametrize("settings", [dict(n=0), dict(max_tokens=0), dict(tries=0), dict(at_once=0), dict(tries=2),
                                      dict(n=1, skip_equal=True)])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ReAlignError):
        Rollout(coin, **settings)


# With `fit`

def few(method, backend="torch", **settings):
    policy = load("tinyworld-instruct", backend, threads=1)
    given = dict(held_out=4, steps=3, batch_size=4, lr=1e-4, progress=False, eval_every=3)
    return fit(policy, method, ROWS, **{**given, **settings})


@pytest.mark.parametrize("method", [grpo.method(coin, n=4, max_tokens=12, updates=2), rloo.method(coin, n=4, max_tokens=12)],
                         ids=["grpo", "rloo"])
def test_fit_with_an_online_method(method, backend):
    run = few(method, backend)
    steps = [r for r in run.history if "loss" in r]
    watched = {"reward", "kl", "entropy", "length", "equal", "truncated", "clipped", "sampling_gap"}
    assert len(steps) == 3 and watched <= set(steps[0])
    assert all(r["sampling_gap"] < 1e-4 for r in steps)
    assert run.history[0]["eval_reward"] >= 0 and "eval_reward_end" in run.summary
    if method.updates == 1:
        assert steps[0]["log_ratio"] < 1e-4 and steps[0]["kl"] < 1e-6
    else:
        assert steps[0]["log_ratio"] > 1e-4                 # the second update is of a policy that has moved


@pytest.mark.parametrize("method", [rejection.method(coin, n=4, max_tokens=12), online_dpo.method(coin, n=4, max_tokens=12)],
                         ids=["rejection", "online_dpo"])
def test_fit_with_answers_that_are_selected(method, backend):
    run = few(method, backend, batch_size=8)
    steps = [r for r in run.history if "loss" in r]
    assert len(steps) == 3 and all(np.isfinite(r["loss"]) and 0 < r["reward"] < 1 for r in steps)
    if method.reference:
        assert steps[0]["margin"] == pytest.approx(0, abs=1e-4) and steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def group(rewards, targets=(True, True, True, True)):
    from realign_core.engine.encoding import Example, Sequence
    made = tuple(Sequence([7, 8, token], [False, False, target]) for token, target in zip((1, 2, 1, 3), targets, strict=True))
    return Example(made, extras={"rewards": np.array(rewards, float), "old_logps": ()}, row=5)


@pytest.mark.parametrize("rewards,settings,kept", [
    ([1, 1, 1, 0], {}, [1]), ([1, 1, 1, 0], dict(most=3), [1, 2]), ([0, 0, 0, 0], {}, []),
    ([0.2, 0.9, 0.2, 0.5], dict(threshold=0.5, most=9), [2, 3])])
def test_what_rejection_sampling_keeps(rewards, settings, kept):
    found = rejection.keep(group(rewards), **settings)
    assert [e.sequences[0].ids[-1] for e in found] == kept and all(e.row == 5 and not e.extras for e in found)


@pytest.mark.parametrize("rewards,targets,pair", [
    ([0, 1, 0, 0], (True,) * 4, [2, 1]), ([1, 1, 1, 1], (True,) * 4, None), ([3, 2, 1, 0], (True, True, True, False), None)])
def test_what_online_dpo_compares(rewards, targets, pair):
    found = online_dpo.pair(group(rewards, targets))
    assert [s.ids[-1] for s in found[0].sequences] == pair if pair else not found


def test_an_interrupted_run_goes_on_with_the_same_answers(tmp_path, backend):
    method = grpo.method(coin, n=4, max_tokens=12)
    whole = few(method, backend, steps=4)
    with pytest.raises(KeyboardInterrupt):
        def stop(record):
            if record["step"] == 2:
                raise KeyboardInterrupt
        few(method, backend, steps=4, out=tmp_path / "run", save_every=1, track=stop)
    run = few(method, backend, steps=4, out=tmp_path / "run", save_every=1)
    assert [r.get("reward") for r in run.history] == [r.get("reward") for r in whole.history]
    assert run.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-4, abs=1e-6)


def test_another_reward_is_another_run(tmp_path):
    few(grpo.method(coin, n=2, max_tokens=6), steps=1, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="params"):
        few(grpo.method(reward, n=2, max_tokens=6), steps=1, out=tmp_path / "run")


def test_a_step_without_signal_changes_nothing():
    policy = load("tinyworld-instruct", "torch", threads=1)
    before = policy.model.lm_head.weight.detach().clone()
    method = grpo.method(lambda row, answer: 1.0, n=2, max_tokens=6, skip_equal=True)
    run = fit(policy, method, ROWS, held_out=4, steps=2, batch_size=4, lr=1e-2, progress=False)
    assert (policy.model.lm_head.weight == before).all() and run.history[1]["equal"] == 1.0 and "loss" not in run.history[1]


def test_packing_is_refused():
    with pytest.raises(TrainingError, match="packing"):
        few(grpo.method(coin), packing=True)


def test_micro_batches_give_the_same_step(backend):
    def table(size):
        run = few(grpo.method(coin, n=4, max_tokens=12, kind="dapo"), backend, steps=1, micro_batch=size)
        return [r for r in run.history if "loss" in r][0]
    whole, cut = table(None), table(1)
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_many_answers_are_learned_from_in_parts_and_the_step_is_the_same(tmp_path):
    "Where `fit` is not told how many, the policy says how many tokens it takes at once."
    pytest.importorskip("torch")
    found = []
    for most in (None, 300):
        policy, sizes = load("tinyworld-instruct", "torch", threads=1), []
        policy.at_once, backward = most, policy.backward
        policy.backward = lambda batch, *a, sizes=sizes, backward=backward: (sizes.append(batch.examples), backward(batch, *a))[1]
        run = fit(policy, grpo.method(coin, n=4, max_tokens=12), ROWS, held_out=0, steps=1, batch_size=6, lr=1e-5, seed=3,
                  progress=False)
        found.append((sizes, run.history[-1]))
    (whole, one), (parts, other) = found
    assert whole == [6] and len(parts) > 1 and sum(parts) == 6 and max(parts) - min(parts[:-1]) <= 1
    for name in ("grad_norm", "reward", "kl", "log_ratio"):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
