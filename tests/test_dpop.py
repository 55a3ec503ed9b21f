"""DPO-Positive: against the formula written out in NumPy, against DPO where they agree, and with settings that make no sense."""

from __future__ import annotations

import numpy as np
import pytest
from test_sft import assert_agrees_with_float64, assert_torch_gradient_is_exact

from realign_core.engine.logprobs import finite_difference
from realign_core.engine.policy import Batch
from realign_core.errors import ReAlignError
from realign_core.methods import dpo, dpop, get

rng = np.random.default_rng(3)
P, T = 6, 8
MASK = (np.arange(T) >= 2) & (np.arange(T) < 2 + rng.integers(1, T - 2, 2 * P)[:, None])
LOGPS, REF = (np.where(MASK, -rng.exponential(1.5, MASK.shape), 0) for _ in range(2))
BATCH = Batch(ids=np.zeros(MASK.shape, np.int32), mask=MASK, extras={"ref_logps": REF}, group=2)


def by_hand(beta, penalty):
    "Eq. 3 pair by pair, without the library."
    losses = []
    for i in range(P):
        now, then = ([sum(x[2 * i + side][MASK[2 * i + side]]) for side in (0, 1)] for x in (LOGPS, REF))
        inside = now[0] - then[0] - (now[1] - then[1]) - penalty * max(0.0, then[0] - now[0])
        losses.append(np.log1p(np.exp(-beta * inside)))
    return np.mean(losses)


@pytest.mark.parametrize(("beta", "penalty"), [(0.1, 5.0), (0.3, 50.0), (1.0, 0.5)])
def test_value_is_the_paper_s(beta, penalty):
    value, metrics = dpop.objective(LOGPS, BATCH, beta=beta, penalty=penalty)
    assert value == pytest.approx(by_hand(beta, penalty), rel=1e-12)
    fell = [LOGPS[2 * i].sum() < REF[2 * i].sum() for i in range(P)]
    assert metrics["fallen"] == (sum(fell), P) and 0 < sum(fell) < P  # the data has both kinds


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_value_and_gradient_agree_with_float64(penalty, backend):
    gradient = assert_agrees_with_float64(backend, get("dpop", penalty=penalty).objective, LOGPS, BATCH, BATCH)
    assert (gradient[~MASK] == 0).all()


def test_torch_float64_gradient_equals_finite_differences():
    assert_torch_gradient_is_exact(get("dpop").objective, LOGPS, BATCH)


def test_without_a_penalty_it_is_dpo():
    ours, theirs = dpop.objective(LOGPS, BATCH, 0.2, 0.0), dpo.objective(LOGPS, BATCH, 0.2)
    assert ours[0] == theirs[0]
    assert all(ours[1][name] == theirs[1][name] for name in ("margin", "accuracy", "chosen_change", "rejected_change", "drift"))


def test_it_is_dpo_as_long_as_nothing_falls():
    values = np.array([-9.0, -5.0]), np.array([-20.0, -6.0]), np.array([-10.0, -5.0]), np.array([-10.0, -7.0])
    assert (dpop.loss(*values, penalty=100.0) == dpo.loss(*values)).all()


def test_the_pull_on_a_fallen_answer_is_stronger_by_the_penalty():
    values = [np.array([x]) for x in (-12.0, -20.0, -10.0, -10.0)]
    def slope(f, side, **more):
        def at(x): return f(*[x if i == side else v for i, v in enumerate(values)], **more)[0]
        return finite_difference(at, values[side])[0]
    ratio = slope(dpop.loss, 0, penalty=4.0) / slope(dpop.loss, 1, penalty=4.0)
    assert ratio == pytest.approx(-(1 + 4.0), rel=1e-5)      # DPO pulls both sides alike
    assert slope(dpo.loss, 0) / slope(dpo.loss, 1) == pytest.approx(-1, rel=1e-5)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": -1.0}, {"penalty": -0.1}, {"beta": float("nan")},
                                      {"penalty": float("nan")}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ReAlignError, match="wanted beta > 0 and penalty ≥ 0"):
        dpop.method(**settings)
