"What only MLXPolicy can show; what it shares with every policy is in test_policy.py."

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from toys import make_batch

from snapshots import plain_logps

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from realign_core.engine.policy import AdamW, load  # noqa: E402
from realign_core.errors import ModelError  # noqa: E402


def open_policy(folder, **kwargs):
    return load(folder, "mlx", threads=1, **kwargs)


def test_unknown_output_layer_is_refused(snapshot, monkeypatch):
    "When the head alone and the whole model disagree, loading stops."
    from mlx_lm.models.llama import Model
    plain = Model.__call__
    monkeypatch.setattr(Model, "__call__", lambda self, ids, *a: plain(self, ids, *a) * (1.1 if ids.ndim == 2 else 1.0))
    with pytest.raises(ModelError, match="output layer"):
        open_policy(snapshot())


def test_head_is_applied_to_targets_only(snapshot):
    policy, batch, seen = open_policy(snapshot()), make_batch(), []
    head = policy._head
    policy._head = lambda hidden: (seen.append(hidden.shape[1]), head(hidden))[1]
    policy.score(batch)
    assert sum(seen) == batch.targets


def test_adamw_equals_torchs():
    "Ten steps on toy tensors, with weight decay and clipping of the global norm."
    torch = pytest.importorskip("torch")
    from realign_core.engine.mlx_policy import adamw
    settings, rng = AdamW(betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1), np.random.default_rng(0)
    ours = mx.array(rng.standard_normal((5, 3)), dtype=mx.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(np.array(ours)))
    optimizer = torch.optim.AdamW([theirs], betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    moments = mx.zeros((5, 3)), mx.zeros((5, 3))
    for count in range(1, 11):
        gradient, lr = (rng.standard_normal((5, 3)) * 10.0 ** rng.integers(-4, 3)).astype(np.float32), 0.1 / count
        theirs.grad, optimizer.param_groups[0]["lr"] = torch.from_numpy(gradient), lr
        optimizer.step()
        ours, moments = adamw(ours, mx.array(gradient), moments, count, lr, settings)
    assert np.abs(np.array(ours) - theirs.detach().numpy()).max() <= 1e-6


def test_rotary_base_where_transformers_5_writes_it(snapshot, tmp_path):
    "A snapshot with rope_parameters alone scores the same, and is saved so that plain mlx_lm reads it right."
    folder, batch = shutil.copytree(snapshot(), tmp_path / "new"), make_batch()
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config.pop("rope_theta") != 10_000
    (folder / "config.json").write_text(json.dumps(config))
    policy = open_policy(folder)
    assert np.abs(policy.score(batch) - plain_logps(folder, batch)).max() <= 1e-4
    assert np.abs(plain_logps(policy.save(tmp_path / "out"), batch, "mlx_lm") - policy.score(batch)).max() <= 1e-4


def test_close_lets_go_of_the_model(snapshot):
    policy = open_policy(snapshot(), lora=2)
    policy.close()
    assert policy._model is None


@pytest.mark.skipif(mx.default_device().type == mx.gpu, reason="a GPU keeps MLX's own")
def test_exponentials_by_numpy_are_mlxs_own_with_their_gradients():
    from realign_core.engine import mlx_policy as own
    x = mx.array(np.random.default_rng(0).normal(scale=20, size=(3, 7)).astype(np.float32))
    x = mx.concatenate([x, mx.array([[-200.0, 200.0, 0.0, -88.0, 88.0, 1.0, -1.0]])])
    for ours, theirs, at in ((own._cpu_exp, mx.exp, mx.minimum(x, 5)), (own._cpu_sigmoid, mx.sigmoid, x),
                             (own._cpu_softmax, lambda x: mx.softmax(x, axis=-1), x)):
        def slope(f, at=at): return np.array(mx.grad(lambda x: mx.sum(mx.square(f(x)) + f(x)))(at))
        assert np.allclose(np.array(ours(at)), np.array(theirs(at)), rtol=2e-6, atol=1e-7)
        assert np.isfinite(slope(ours)).all() and np.allclose(slope(ours), slope(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("heads", "shape"), [(4, (5, 9)), (4, (2, 1, 5, 9)), (2, (2, 1, 5, 9)), (1, (5, 9))])
def test_attention_is_mlx_lms_for_any_grouping_and_mask(heads, shape):
    from mlx_lm.models.base import scaled_dot_product_attention as plain

    from realign_core.engine.mlx_policy import _attention
    rng = np.random.default_rng(1)
    q, k, v = (mx.array(rng.normal(size=s).astype(np.float32)) for s in ((2, 4, 5, 8), (2, heads, 9, 8), (2, heads, 9, 8)))
    mask = mx.array(np.where(rng.random(shape) < 0.3, np.finfo(np.float32).min, 0).astype(np.float32))
    for settings in (dict(mask=mask), dict(mask=None)):
        found, wanted = (f(q, k, v, cache=None, scale=0.3, **settings) for f in (_attention, plain))
        assert found.shape == wanted.shape and np.abs(np.array(found - wanted)).max() < 1e-5


def test_writing_with_merged_adapters_changes_nothing_in_the_model(snapshot):
    "And what is written has the log-probabilities that scoring gives it."
    from toys import mean_loss

    from realign_core.engine.policy import Batch, LoRA
    policy = open_policy(snapshot(), lora=LoRA(rank=2))
    policy.backward(make_batch(), mean_loss)
    policy.step(3e-2)
    before, state = policy.score(make_batch()), np.array(mx.random.state[0])
    (completion,), = policy.generate([[5, 6, 7]], max_tokens=8)
    assert (policy.score(make_batch()) == before).all() and (np.array(mx.random.state[0]) == state).all()
    ids = np.array([[5, 6, 7, *completion.ids]], np.int32)
    assert np.abs(policy.score(Batch(ids, np.arange(ids.shape[1])[None] > 2))[0, 3:] - completion.logps).max() < 1e-4
