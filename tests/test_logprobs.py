"""The maths of log-probabilities: values and gradients against NumPy float64, on torch and MLX, at extreme inputs too."""

from __future__ import annotations

import numpy as np
import pytest

from realign_core.engine import logprobs as lp

rng = np.random.default_rng(0)
X = np.concatenate([-np.abs(rng.normal(size=10)) - 1e-3, [-5.0, -0.7, -0.69, -1e-2, -15.0]])
MASK = rng.random((3, 5)) < 0.6
FUNCTIONS = {
    "log_sigmoid": lambda x: lp.log_sigmoid(x * 3),
    "log1mexp": lp.log1mexp,
    "log_softmax": lambda x: lp.log_softmax(x.reshape(3, 5)) * lp.log_softmax(x.reshape(3, 5)),
    "entropy": lambda x: lp.entropy(x.reshape(3, 5)),
    "k1": lambda x: lp.k1(x, x * 0.5),
    "k2": lambda x: lp.k2(x, x * 0.5),
    "k3": lambda x: lp.k3(x, x * 0.5),
    "sequence_logps": lambda x: lp.sequence_logps(x.reshape(3, 5), _like(MASK, x), average=True) ** 2,
}


def _like(a, x):
    "A NumPy array in the framework of x."
    if isinstance(x, np.ndarray):
        return a
    if type(x).__module__.startswith("torch"):
        import torch
        return torch.tensor(a)
    import mlx.core as mx
    return mx.array(a)


def value_and_gradient(f, x, backend):
    "Sum of f(x) and its gradient on a backend, float32."
    if backend == "torch":
        import torch
        leaf = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        total = f(leaf).sum()
        total.backward()
        return total.item(), leaf.grad.numpy()
    import mlx.core as mx
    total, gradient = mx.value_and_grad(lambda a: f(a).sum())(mx.array(x.astype(np.float32)))
    return total.item(), np.array(gradient)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient_agree_with_float64(name, backend):
    f = FUNCTIONS[name]
    value, gradient = value_and_gradient(f, X, backend)
    truth, slope = f(X).sum(), lp.finite_difference(lambda x: f(x).sum(), X)
    assert value == pytest.approx(truth, rel=1e-5)
    assert np.abs(gradient - slope).max() <= 1e-5 * np.abs(slope).max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_float64_gradient_equals_finite_differences(name):
    torch = pytest.importorskip("torch")
    leaf = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    FUNCTIONS[name](leaf).sum().backward()
    slope = lp.finite_difference(lambda x: FUNCTIONS[name](x).sum(), X)
    assert np.abs(leaf.grad.numpy() - slope).max() <= 1e-6 * max(1.0, np.abs(slope).max())


def test_log_sigmoid_has_slope_one_half_at_zero(backend):
    value, gradient = value_and_gradient(lp.log_sigmoid, np.zeros(3), backend)
    assert value == pytest.approx(-3 * np.log(2), rel=1e-6) and np.allclose(gradient, 0.5, atol=1e-7)


@pytest.mark.parametrize("f,at,value,slope", [
    (lp.log_sigmoid, -1e4, -1e4, 1.0), (lp.log_sigmoid, 1e4, 0.0, 0.0),
    (lp.log1mexp, -1e4, 0.0, 0.0), (lp.log1mexp, -1e-6, np.log(1e-6), -1e6),
    (lambda x: lp.k3(x, x * 0), 1e4, 1e4 - 1, 1.0), (lambda x: lp.k3(x, x * 0), -1e4, np.expm1(20.0) - 20, 0.0),
    (lambda x: lp.k2(x, x * 0), -1e4, 5e7, -1e4),
])
def test_limits_are_finite(f, at, value, slope, backend):
    got, gradient = value_and_gradient(f, np.array([at]), backend)
    assert np.isfinite([got, gradient[0]]).all()
    assert got == pytest.approx(value, rel=1e-5, abs=1e-30) and gradient[0] == pytest.approx(slope, rel=1e-5, abs=1e-30)


def test_log1mexp_at_zero_is_minus_infinity_not_nan(backend):
    value, gradient = value_and_gradient(lp.log1mexp, np.zeros(1), backend)
    assert value == -np.inf and not np.isnan(gradient).any()


def test_padding_never_leaks_even_when_it_is_infinite_or_nan(backend):
    x = np.array([[-1.0, -2.0, np.inf, np.nan]])
    mask = np.array([[True, True, False, False]])
    value, gradient = value_and_gradient(lambda a: lp.masked_mean(a, _like(mask, a)), x, backend)
    assert value == -1.5 and np.allclose(gradient, [[0.5, 0.5, 0, 0]])


def test_an_empty_mask_gives_zero_not_nan(backend):
    value, gradient = value_and_gradient(lambda a: lp.masked_mean(a, _like(np.zeros((2, 3), bool), a), axis=1),
                                         np.ones((2, 3)), backend)
    assert value == 0 and (gradient == 0).all()


def test_the_mean_weighs_tokens_not_rows():
    logps, mask = np.array([[-1.0, -2, -3], [-4, 0, 0]]), np.array([[1, 1, 1], [1, 0, 0]], bool)
    assert lp.masked_mean(logps, mask) == -2.5
    assert lp.sequence_logps(logps, mask).tolist() == [-6, -4]
    assert lp.sequence_logps(logps, mask, average=True).tolist() == [-2, -4]


def test_entropy_limits_and_ruled_out_tokens(backend):
    logits = np.array([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [0, 0, -1e9, -1e9]])
    values = np.array([np.log(4), 0, np.log(2)])
    got, gradient = value_and_gradient(lp.entropy, logits, backend)
    assert got == pytest.approx(values.sum(), rel=1e-6) and np.isfinite(gradient).all()
    assert np.allclose(lp.entropy(np.array([[0.0, -np.inf]])), 0)


def test_kl_estimators_are_pinned_to_the_analytic_kl():
    policy, reference = lp.log_softmax(rng.normal(size=200)), lp.log_softmax(rng.normal(size=200))
    p = np.exp(policy)
    exact = (p * (policy - reference)).sum()
    assert (p * lp.k1(policy, reference)).sum() == pytest.approx(exact, abs=1e-12)
    assert (p * lp.k3(policy, reference)).sum() == pytest.approx(exact, abs=1e-12)
    assert (lp.k3(policy, reference) >= 0).all() and (lp.k2(policy, reference) >= 0).all()
    near = lp.log_softmax(policy + 1e-3 * rng.normal(size=200))  # to second order all three are the same
    exact = (p * (policy - near)).sum()
    assert (p * lp.k2(policy, near)).sum() == pytest.approx(exact, rel=0.01)


def test_k3_keeps_its_precision_where_exp_minus_one_has_none(backend):
    value, gradient = value_and_gradient(lambda x: lp.k3(x, x * 0), np.array([1e-4]), backend)
    assert value == pytest.approx(0.5e-8, rel=1e-2) and gradient[0] == pytest.approx(1e-4, rel=1e-3)


def test_every_function_used_exists_in_all_three_namespaces():
    import inspect
    import re

    import mlx.core as mx
    import torch
    from array_api_compat import array_namespace

    from realign_core.methods import dpo, lora, sft
    used = {n for module in (lp, dpo, sft, lora) for n in re.findall(r"\bxp\.(\w+)", inspect.getsource(module))}
    assert "logaddexp" in used
    for space in (array_namespace(np.zeros(1)), array_namespace(torch.zeros(1)), array_namespace(mx.zeros(1))):
        assert {name for name in used if not hasattr(space, name)} == set()
