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
