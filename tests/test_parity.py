"torch and MLX say the same: scores, losses, gradients, training runs, text and adapters."

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from snapshots import KINDS

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
peft = pytest.importorskip("peft")

from realign_core.engine.adapters import convert_adapter, read_safetensors  # noqa: E402
from realign_core.engine.policy import AdamW, Batch, LoRA, load  # noqa: E402
from realign_core.methods import dpo, sft  # noqa: E402

torch.set_num_threads(1)
LINEAR = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}


def both(folder, **kwargs):
    return load(folder, "torch", threads=1, **kwargs), load(folder, "mlx", threads=1, **kwargs)


def make_batch(seed=0, rows=6, width=18, vocab=300):
    "Pairs of right-padded rows with reference log-probabilities."
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row in range(rows):
        length = int(rng.integers(width // 2 + 2, width + 1))
        ids[row, :length], mask[row, width // 2: length] = rng.integers(6, vocab, length), True
    ref = -np.abs(rng.standard_normal((rows, width))).astype(np.float32) * mask * 6
    return Batch(ids, mask, extras={"ref_logps": ref}, group=2, rows=tuple(range(1, rows // 2 + 1)))


SMOOTHING = {"cdpo": 0.1, "robust": 0.1}
OBJECTIVES = {"sft": sft.objective, "dpo-average-nll": partial(dpo.objective, average=True, nll=0.5),
              **{f"dpo-{kind}": partial(dpo.objective, kind=kind, smoothing=SMOOTHING.get(kind, 0.0)) for kind in dpo.KINDS}}


def distance(a, b):
    "Largest difference, relative to the largest entry."
    return np.abs(a - b).max() / (np.abs(b).max() + 1e-12)


# --- scores and generation -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_scores_entropies_and_states_agree(snapshot, family, tied):
    (a, b), batch = both(snapshot(family, tied)), make_batch()
    assert np.abs(a.score(batch) - b.score(batch)).max() <= 1e-4
    assert np.abs(a.entropy(batch) - b.entropy(batch)).max() <= 1e-4
    assert np.abs(a.hidden_states(batch) - b.hidden_states(batch)).max() <= 1e-4
    assert a.max_length == b.max_length and a.stops == b.stops


def test_same_seed_samples_the_same_text(snapshot):
    prompts = [[int(x) for x in np.random.default_rng(i).integers(6, 300, 2 + i)] for i in range(8)]
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}):
        a, b = ([[c.ids for c in cs] for cs in policy.generate(prompts, n=4, max_tokens=16, seed=3, **settings)]
                for policy in both(snapshot()))
        same = np.mean([x == y for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)])
        assert same >= 0.9  # a draw within rounding of a boundary may fall on either side


def test_greedy_text_of_the_shipped_model_is_identical():
    "200 prompts cut from the model's own samples."
    a, b = both("tinyworld-instruct")
    start = [[a.tokenizer.bos_token_id if a.tokenizer.bos_token_id is not None else a.tokenizer.eos_token_id]]
    texts = a.generate(start, n=200, max_tokens=24, seed=1)[0]
    prompts = [[*start[0], *c.ids[:4 + i % 12]] for i, c in enumerate(texts)]
    prompts = [p[:-1] if p[-1] in a.stops else p for p in prompts]
    left, right = (policy.generate(prompts, max_tokens=24, temperature=0) for policy in (a, b))
    assert np.mean([x[0].ids == y[0].ids for x, y in zip(left, right, strict=True)]) >= 0.99


# --- losses and gradients --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, targets=("q_proj", "v_proj", "down_proj")), LoRA(rank=4, dora=True)],
                         ids=["full", "lora", "dora"])
def test_losses_metrics_and_gradients_agree(snapshot, tmp_path, name, lora):
    "Within 1e-5, with adapters that are no longer zero."
    batch, adapter = make_batch(), None
    if lora is not None:
        policy = load(snapshot(), "torch", lora=lora, threads=1)
        policy.backward(batch, sft.objective)
        policy.step(1e-2)
        adapter = policy.save(tmp_path / "adapter")
    found = [(*policy.backward(batch, OBJECTIVES[name]), policy.gradients()) for policy in both(snapshot(), adapter=adapter)]
    (loss, metrics, grads), (loss_b, metrics_b, grads_b) = found
    assert loss == pytest.approx(loss_b, rel=1e-5)
    assert metrics.keys() == metrics_b.keys() and grads.keys() == grads_b.keys()
    for key, pair in metrics.items():
        assert pair == pytest.approx(metrics_b[key], rel=1e-4, abs=1e-5)
    joined, joined_b = (np.concatenate([g[k].ravel() for k in sorted(g)]) for g in (grads, grads_b))
    assert np.linalg.norm(joined - joined_b) <= 1e-5 * np.linalg.norm(joined)


def numpy_llama(weights, config, ids, mask):
    "Token log-probabilities of a Llama in NumPy float64, written from the paper's formulas (arXiv 2302.13971)."
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    rows, length = ids.shape
    def norm(x, name): return weights[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
    angles = np.arange(length)[:, None] * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    def split(x, n): return x.reshape(rows, length, n, size).transpose(0, 2, 1, 3)
    def rotate(x):
        (left, right), cos, sin = np.split(x, 2, -1), np.cos(angles), np.sin(angles)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = {k: weights[f"model.layers.{i}.{k}.weight"].T for k in (
            *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))}
        x = norm(h, f"model.layers.{i}.input_layernorm.weight")
        q = rotate(split(x @ w["self_attn.q_proj"], heads))
        k, v = (np.repeat(split(x @ w[f"self_attn.{p}_proj"], groups), heads // groups, 1) for p in "kv")
        scores = q @ rotate(k).swapaxes(-1, -2) / np.sqrt(size) + np.triu(np.full((length, length), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out = scores / scores.sum(-1, keepdims=True) @ v
        h = h + out.transpose(0, 2, 1, 3).reshape(rows, length, -1) @ w["self_attn.o_proj"]
        x = norm(h, f"model.layers.{i}.post_attention_layernorm.weight")
        gate = x @ w["mlp.gate_proj"]
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj"])) @ w["mlp.down_proj"]
    logits = norm(h, "model.norm.weight") @ weights["lm_head.weight"].T
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    picked = np.take_along_axis(logps[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return np.pad(picked, ((0, 0), (1, 0))) * mask


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_agree_with_numpy_in_float64(snapshot, name):
    "Loss, and the gradient along random directions by central differences of a float64 forward pass."
    folder, batch, rng = snapshot(), make_batch(seed=4), np.random.default_rng(1)
    config = json.loads((folder / "config.json").read_text())
    weights = {k: v.astype(np.float64) for k, v in read_safetensors(folder / "model.safetensors").items()}
    exact = replace(batch, extras={"ref_logps": batch.extras["ref_logps"].astype(np.float64)})
    def loss(step, way):
        moved = {k: w + step * way[k] for k, w in weights.items()}
        return float(OBJECTIVES[name](numpy_llama(moved, config, batch.ids, batch.mask), exact)[0])
    # One direction at random, one along the gradient itself, where nothing cancels.
    for policy in both(folder):
        found, _ = policy.backward(batch, OBJECTIVES[name])
        grads = policy.gradients()
        assert found == pytest.approx(loss(0.0, {k: 0 for k in weights}), rel=1e-5)
        size = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        along = {k: grads[k].astype(np.float64) / size for k in weights}
        noise = {k: rng.standard_normal(w.shape) / np.sqrt(sum(x.size for x in weights.values())) for k, w in weights.items()}
        for way in (along, noise):
            slope = sum((grads[k].astype(np.float64) * way[k]).sum() for k in weights)
            numeric = (8 * (loss(1e-3, way) - loss(-1e-3, way)) - (loss(2e-3, way) - loss(-2e-3, way))) / 12e-3
            assert abs(slope - numeric) <= 1e-5 * size
        policy.step(0.0)


# --- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sft", "dpo-sigmoid"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=4), LoRA(rank=4, dora=True)], ids=["full", "lora", "dora"])
def test_twenty_steps_give_the_same_curve(snapshot, lora, name):
    curves = []
    for policy in both(snapshot(), lora=lora, seed=3):
        policy.configure(AdamW(weight_decay=0.01))
        curve = []
        for step in range(20):
            curve.append(policy.backward(make_batch(seed=step % 4), OBJECTIVES[name])[0])
            policy.step(2e-3 * (1 - step / 20), max_norm=1.0)
        curves.append(curve)
    a, b = np.array(curves)
    assert distance(a, b) <= 1e-3 and np.abs(a / b - 1).max() <= 1e-3
    assert a[-4:].mean() < a[:4].mean()


# --- adapters --------------------------------------------------------------------------------------------------------

PROMPTS = [[int(x) for x in np.random.default_rng(i).integers(6, 300, 3 + i)] for i in range(6)]


def greedy(policy):
    return [c[0].ids for c in policy.generate(PROMPTS, max_tokens=8, temperature=0)]


def score_peft(base, adapter, batch):
    "The same batch in plain peft."
    from transformers import AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        return pick(model(torch.from_numpy(batch.ids).long()).logits.numpy(), batch)


def score_mlx_lm(base, adapter, batch):
    "The same batch in plain mlx_lm."
    import mlx_lm
    model, _ = mlx_lm.load(str(base), adapter_path=str(adapter) if adapter else None)
    return pick(np.array(model(mx.array(batch.ids)).astype(mx.float32)), batch)


def pick(logits, batch):
    logps = torch.from_numpy(logits).log_softmax(-1).numpy()
    return np.pad(np.take_along_axis(logps[:, :-1], batch.ids[:, 1:, None], -1)[..., 0], ((0, 0), (1, 0))) * batch.mask


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("trained_on", ["torch", "mlx"])
def test_adapters_cross_over(snapshot, tmp_path, family, dora, trained_on):
    "Trained on one backend: read by the other, by plain peft, by plain mlx_lm, and converted; fused it says the same."
    folder, batch = snapshot(family), make_batch()
    targets = LINEAR.get(family, ("q_proj", "up_proj"))
    policy = load(folder, trained_on, lora=LoRA(rank=3, alpha=7.0, targets=targets, dora=dora), threads=1)
    for seed in range(4):
        policy.backward(make_batch(seed), sft.objective)
        policy.step(2e-2)
    scores, text = policy.score(batch), greedy(policy)
    own, other = ("peft", "mlx") if trained_on == "torch" else ("mlx", "peft")
    written = {own: policy.save(tmp_path / "own"), "again": policy.save(tmp_path / "again", other)}
    written[other] = convert_adapter(written[own], tmp_path / "converted", other)
    assert read_bytes(written["again"]) == read_bytes(written[other])
    assert np.abs(score_peft(folder, written["peft"], batch) - scores).max() <= 1e-4
    assert np.abs(score_mlx_lm(folder, written["mlx"], batch) - scores).max() <= 1e-4
    for backend in ("torch", "mlx"):
        for layout in ("peft", "mlx"):
            read = load(folder, backend, adapter=written[layout], threads=1)
            assert np.abs(read.score(batch) - scores).max() <= 1e-4 and greedy(read) == text
    policy.fuse()
    fused = policy.save(tmp_path / "fused")
    for backend in ("torch", "mlx"):
        again = load(fused, backend, threads=1)
        assert np.abs(again.score(batch) - scores).max() <= 1e-4 and greedy(again) == text
    assert np.abs(score_mlx_lm(fused, None, batch) - scores).max() <= 1e-4


def read_bytes(folder: Path):
    "Names and contents of the tensors of an adapter."
    (path,) = folder.glob("*.safetensors")
    return {name: array.tobytes() for name, array in read_safetensors(path).items()}
