"""PPO: advantages by hand, the objectives against NumPy float64, a critic that is the same on both frameworks, and the loop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_sft import assert_agrees_with_float64, assert_torch_gradient_is_exact

from realign_core import fit, load
from realign_core.data.verifiable import world_tasks
from realign_core.engine.adapters import read_safetensors
from realign_core.engine.logprobs import finite_difference
from realign_core.engine.policy import AdamW, Batch, LoRA
from realign_core.errors import ModelError, ReAlignError, TrainingError
from realign_core.evaluate.tasks import coin
from realign_core.methods import ppo
from realign_core.methods import reward as reward_model
from realign_core.tinyworld import World

rng = np.random.default_rng(3)
B, T = 6, 9
LENGTHS = rng.integers(1, T - 2, B)
MASK = (np.arange(T) >= 2) & (np.arange(T) < 2 + LENGTHS[:, None])


def noise(scale=1.0):
    return np.where(MASK, scale * rng.normal(size=MASK.shape), 0)


LOGPS = np.where(MASK, -rng.exponential(1.5, MASK.shape), 0)
VALUES = noise()
EXACT = Batch(np.zeros(MASK.shape, np.int32), MASK, extras={
    "old_logps": LOGPS + noise(0.4), "ref_logps": LOGPS + noise(0.5), "advantages": noise(), "values": VALUES + noise(0.3),
    "returns": VALUES + noise(0.8)})
BATCH = replace(EXACT, extras={name: value.astype(np.float32) for name, value in EXACT.extras.items()})
OBJECTIVES = {"policy": (ppo.objective, LOGPS), "value": (ppo.value_objective, VALUES),
              "value, unclipped": (partial(ppo.value_objective, clip=0), VALUES)}


# --- advantages ------------------------------------------------------------------------------------------------------

def test_advantages_of_a_table_worked_by_hand():
    """γ = 0.9, λ = 0.5, so each advantage is its own surprise plus 0.45 times the next advantage.

    Three tokens, values 0.5, 0.6, 0.8, reward 1 at the last:
      δ₃ = 1 − 0.8 = 0.2                    A₃ = 0.2
      δ₂ = 0.9 · 0.8 − 0.6 = 0.12           A₂ = 0.12 + 0.45 · 0.2 = 0.21
      δ₁ = 0.9 · 0.6 − 0.5 = 0.04           A₁ = 0.04 + 0.45 · 0.21 = 0.1345
    Two tokens, values 0.4, 0.1, rewards −0.1 and 0:
      δ₂ = −0.1, A₂ = −0.1                  δ₁ = −0.1 + 0.09 − 0.4 = −0.41, A₁ = −0.41 − 0.045 = −0.455
    """
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]], bool)
    values = np.array([[9, 0.5, 0.6, 0.8, 9], [9, 9, 0.4, 0.1, 9]])
    rewards = np.array([[0, 0, 0, 1, 0], [0, 0, -0.1, 0, 0]], float)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    assert np.allclose(advantages, [[0, 0.1345, 0.21, 0.2, 0], [0, 0, -0.455, -0.1, 0]], atol=1e-12)
    assert np.allclose(returns, [[0, 0.6345, 0.81, 1.0, 0], [0, 0, -0.055, 0, 0]], atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)])
def test_advantages_equal_the_double_sum(gamma, lam):
    "Σ_l (γλ)^l δ_{t+l}, with nothing after the last token."
    rewards, values = noise(), noise() + 5 * ~MASK
    found, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for row in range(B):
        at = np.flatnonzero(MASK[row])
        after = np.append(values[row, at][1:], 0.0)
        surprise = rewards[row, at] + gamma * after - values[row, at]
        wanted = [sum((gamma * lam) ** later * s for later, s in enumerate(surprise[t:])) for t in range(len(at))]
        assert np.allclose(found[row, at], wanted, atol=1e-12)
    assert (found[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_looking_to_the_end_the_critic_only_shifts():
    rewards = noise()
    after = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    found, returns = ppo.gae(rewards, VALUES, MASK, gamma=1.0, lam=1.0)
    assert np.allclose(returns, np.where(MASK, after, 0)) and np.allclose(found, np.where(MASK, after - VALUES, 0))


def test_rewards_stand_at_the_last_token_and_the_kl_everywhere():
    mask = np.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool)
    found = ppo.token_rewards(np.array([2.0, 3.0]), mask, np.full((2, 4), 0.5), beta=0.1)
    assert np.allclose(found, [[0, -0.05, 1.95, 0], [0, 0, 0, 0]])


def test_the_step_is_whitened_as_a_whole():
    extras = {"old_logps": BATCH.extras["old_logps"], "ref_logps": BATCH.extras["ref_logps"], "values": BATCH.extras["values"],
              "rewards": rng.normal(size=B)}
    whole = Batch(BATCH.ids, MASK, extras=extras)
    halves = [Batch(BATCH.ids[cut], MASK[cut], extras={k: v[cut] for k, v in extras.items()})
              for cut in (slice(0, 2), slice(2, B))]
    one, two = ppo.prepare(None, [whole], beta=0.1), ppo.prepare(None, halves, beta=0.1)
    flat = one[0].extras["advantages"][MASK]
    assert abs(flat.mean()) < 1e-6 and flat.std() == pytest.approx(1, abs=1e-5)
    for name in ("advantages", "returns"):
        assert np.allclose(np.concatenate([b.extras[name] for b in two]), one[0].extras[name], atol=1e-6)


# --- the objectives --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_agree_with_float64(name, backend):
    objective, at = OBJECTIVES[name]
    gradient = assert_agrees_with_float64(backend, objective, at, BATCH, EXACT)
    assert (gradient[~MASK] == 0).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_torch_float64_gradient_equals_finite_differences(name):
    assert_torch_gradient_is_exact(*OBJECTIVES[name], EXACT)


def test_at_the_first_update_the_ratio_is_one_and_the_gradient_the_plain_one():
    extras = {**EXACT.extras, "old_logps": LOGPS, "ref_logps": LOGPS}
    batch = replace(EXACT, extras=extras)
    _, metrics = ppo.objective(LOGPS, batch)
    slope = finite_difference(lambda x: ppo.objective(x, batch)[0], LOGPS)
    assert metrics["clipped"][0] == metrics["log_ratio"][0] == metrics["kl"][0] == 0
    assert np.allclose(slope, np.where(MASK, -extras["advantages"] / MASK.sum(), 0), atol=1e-7)


@pytest.mark.parametrize("apart", [-60.0, 60.0])
def test_limits_are_finite(apart, backend):
    extras = {**BATCH.extras, "old_logps": np.where(MASK, LOGPS - apart, 0).astype(np.float32)}
    assert_agrees_with_float64(backend, ppo.objective, LOGPS, replace(BATCH, extras=extras), replace(EXACT, extras=extras))


def test_clipping_acts_on_ratios_and_on_values():
    mask, one = np.ones((1, 2), bool), np.ones((1, 2))
    batch = Batch(np.zeros((1, 2), np.int32), mask, extras={"old_logps": 0 * one, "advantages": np.array([[1.0, -1.0]])})
    moved = np.log([[1.5, 1.5]])                                 # the good one has gone far enough, the bad one has not
    slope = finite_difference(lambda x: ppo.objective(x, batch)[0], moved)
    assert np.allclose(slope, [[0, 0.75]], atol=1e-8) and ppo.objective(moved, batch)[1]["clipped"] == (1, 2)
    batch = replace(batch, extras={"values": 0 * one, "returns": one})
    near = np.array([[0.5, -0.5]])          # 0.5 has gone far enough towards 1; −0.5 went away from it, and is called back
    slope = finite_difference(lambda x: ppo.value_objective(x, batch, clip=0.2)[0], near)
    assert np.allclose(slope, [[0, -0.75]], atol=1e-8)
    assert ppo.value_objective(near, batch, clip=0.2)[0] == pytest.approx(0.5 * (0.8**2 + 1.5**2) / 2)
    assert ppo.value_objective(near, batch, clip=0.2)[1]["clipped"] == (1, 2)


# --- the critic ------------------------------------------------------------------------------------------------------

def rows_of(vocab=300, rows=4, width=14, seed=0):
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, vocab, (rows, width)).astype(np.int32)
    ids[1, :4] = ids[0, :4]
    starts, ends = draw.integers(1, 6, (rows, 1)), draw.integers(8, width + 1, (rows, 1))
    mask = (np.arange(width) >= starts) & (np.arange(width) < ends)
    mask[:2, :4] = False
    return Batch(ids, mask)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, targets=("o_proj",))], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"])
def test_a_value_is_the_reward_of_the_text_so_far(family, lora, backend, snapshot):
    "Read at once before every target, or as a reward model that is given each beginning alone."
    folder, batch = snapshot(family, family == "gemma"), rows_of()
    critic, judge = (load(folder, backend, head=head, lora=lora, seed=1) for head in ("value", "reward"))
    values = critic.score(batch)
    assert ((values != 0) == batch.mask).all()
    for row, column in np.argwhere(batch.mask)[::5]:
        begun = Batch(batch.ids[row:row + 1, :column], np.arange(column)[None] == column - 1)
        assert judge.score(begun).sum() == pytest.approx(values[row, column], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_critics_and_their_gradients_agree_between_frameworks(family, snapshot):
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    batch, found = rows_of(), {}
    zeros = np.zeros(batch.ids.shape, np.float32)
    batch = replace(batch, extras={"values": zeros, "returns": zeros + 1})
    for name in ("torch", "mlx"):
        critic = load(snapshot(family, family == "gemma"), name, head="value", seed=2)
        loss, metrics = critic.backward(batch, ppo.value_objective)
        found[name] = critic.score(batch), loss, critic.gradients(), metrics
    (values, loss, gradient, metrics), (values_b, loss_b, gradient_b, metrics_b) = found.values()
    assert np.abs(values - values_b).max() <= 1e-5 and loss == pytest.approx(loss_b, rel=1e-5)
    assert metrics["mean"] == pytest.approx(metrics_b["mean"], rel=1e-4) and gradient.keys() == gradient_b.keys()
    a, b = (np.concatenate([g[k].ravel() for k in sorted(g)]) for g in (gradient, gradient_b))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_shared_prompts_and_company_change_no_value(tiny, backend):
    critic, batch = load(tiny, backend, head="value"), rows_of(rows=6)
    batch.ids[:, :4] = batch.ids[0, :4]
    batch.mask[:, :4] = False
    batch = replace(batch, group=6)
    critic.share = False
    apart = critic.score(batch)
    critic.share = True
    assert critic.can_share and np.abs(critic.score(batch) - apart).max() <= 1e-5
    alone = np.concatenate([critic.score(Batch(batch.ids[i:i + 1], batch.mask[i:i + 1])) for i in range(6)])
    assert np.abs(alone - apart).max() <= 1e-5


def test_a_batch_without_targets_has_no_values(tiny, backend):
    critic, batch = load(tiny, backend, head="value"), rows_of()
    assert (critic.score(replace(batch, mask=np.zeros_like(batch.mask))) == 0).all()


def test_a_reward_model_can_be_the_first_critic(tiny, backend, tmp_path):
    judge = load(tiny, backend, head="reward", seed=5)
    judge.save(tmp_path / "reward")
    ids = np.arange(10, 20)[None].astype(np.int32)
    critic = load(tmp_path / "reward", backend, head="value")
    before = judge.score(Batch(ids[:, :9], np.arange(9)[None] == 8)).sum()
    assert critic.score(Batch(ids, np.arange(10)[None] == 9)).sum() == pytest.approx(before, abs=1e-6)
    critic.save(tmp_path / "critic")
    again = load(tmp_path / "critic", backend, head="value")
    assert (again.score(rows_of()) == critic.score(rows_of())).all()


def test_a_critic_learns(tiny, backend):
    critic, batch = load(tiny, backend, head="value"), rows_of()
    wanted = np.where(batch.ids % 2, 1.0, -1.0).astype(np.float32)   # of the token that is to come: only memory can tell
    batch = replace(batch, extras={"values": np.zeros_like(wanted), "returns": wanted})
    critic.configure(AdamW())
    losses = []
    for _ in range(60):
        losses.append(critic.backward(batch, partial(ppo.value_objective, clip=0))[0])
        critic.step(3e-3, max_norm=1.0)
    assert losses[0] == pytest.approx(0.5, abs=0.1) and losses[-1] < 0.1


def test_what_a_critic_cannot_do_is_refused(tiny, backend):
    critic = load(tiny, backend, head="value")
    with pytest.raises(ModelError, match="writes no text"):
        critic.generate([[5, 6]])
    with pytest.raises(TrainingError, match="this is a critic"):
        fit(critic, reward_model.method(), [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8, steps=1, progress=False)
    with pytest.raises(ReAlignError, match="no scalar head|critic"):
        reward_model.reward(critic, ["a"], ["b"])
    with pytest.raises(ModelError, match="wanted 'reward' or 'value'"):
        load(tiny, backend, head="values")


# --- the loop --------------------------------------------------------------------------------------------------------

ROWS = world_tasks(World(), "arithmetic", 24, seed=1)


def few(backend="torch", critic=None, policy=None, settings=(), **given):
    policy = policy or load("tinyworld-instruct", backend, threads=1)
    method = ppo.method(coin, **{"critic": critic, "max_tokens": 12, "updates": 2, "value_lr": 1e-3, **dict(settings)})
    defaults = dict(held_out=4, steps=3, batch_size=8, lr=1e-4, progress=False, eval_every=3)
    return fit(policy, method, ROWS, **{**defaults, **given})


def test_fit_trains_both_models(backend):
    critic = load("tinyworld-instruct", backend, head="value", threads=1)
    before = critic.score(rows_of())
    steps = [r for r in few(backend, critic).history if "loss" in r]
    watched = {"reward", "kl", "entropy", "length", "clipped", "sampling_gap", "value_loss", "value_clipped", "value_grad_norm"}
    assert len(steps) == 3 and watched <= set(steps[0])
    assert all(r["sampling_gap"] < 1e-4 and r["value_grad_norm"] > 0 for r in steps)
    assert steps[0]["value_lr"] == pytest.approx(1e-3 / 1e-4 * steps[0]["lr"])
    assert np.abs(critic.score(rows_of()) - before).max() > 1e-3


def test_a_critic_of_its_own_follows_the_adapters(tiny):
    policy = load("tinyworld-instruct", "torch", lora=4, threads=1)
    assert [r for r in few(policy=policy, steps=1).history if "value_loss" in r]


def test_micro_batches_give_the_same_step(backend):
    def table(size):
        return [r for r in few(backend, steps=1, micro_batch=size, settings={"updates": 1}).history if "loss" in r][0]
    whole, cut = table(None), table(3)
    for name in ("loss", "value_loss"):
        assert cut[name] == pytest.approx(whole[name], abs=1e-5)
    for name in ("grad_norm", "value_grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-3)


def test_a_stopped_run_goes_on_exactly_with_its_critic(backend, tmp_path):
    critics = [load("tinyworld-instruct", backend, head="value", threads=1) for _ in range(3)]
    whole = few(backend, critics[0], steps=4, out=tmp_path / "whole", save_every=1)

    def stop(record):
        if record["step"] == 2:
            raise RuntimeError("pulled the plug")
    with pytest.raises(RuntimeError, match="plug"):
        few(backend, critics[1], steps=4, out=tmp_path / "cut", save_every=1, track=stop)
    run = few(backend, critics[2], steps=4, out=tmp_path / "cut", save_every=1)
    assert run.history[-1]["value_loss"] == whole.history[-1]["value_loss"]
    for part in ("", "critic"):
        a, b = (read_safetensors(tmp_path / name / "checkpoints" / "step-00000004" / part / "weights.safetensors")
                for name in ("whole", "cut"))
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_a_model_that_is_no_critic_is_refused(tiny):
    for wrong in (load(tiny, "torch", head="reward"), load(tiny, "torch", head="value")):  # the second has another vocabulary
        with pytest.raises(TrainingError, match="cannot be the critic"):
            few(critic=wrong, steps=1)


@pytest.mark.parametrize("settings", [dict(beta=-1), dict(gamma=0), dict(lam=1.5), dict(clip=0), dict(value_clip=-1),
                                      dict(value_lr=0), dict(updates=0), dict(n=0)])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ReAlignError):
        ppo.method(coin, **settings)
