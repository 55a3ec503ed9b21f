"""The reward model: against NumPy float64, TRL and transformers, on both frameworks, at its limits and with bad input."""

from __future__ import annotations

import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from test_sft import assert_agrees_with_float64, assert_torch_gradient_is_exact, on

from realign_core.data.formats import read
from realign_core.engine.adapters import convert_adapter, read_safetensors
from realign_core.engine.batching import collate
from realign_core.engine.encoding import Encoder, encode_rows
from realign_core.engine.logprobs import finite_difference
from realign_core.engine.policy import AdamW, Batch, LoRA, last_tokens, load
from realign_core.engine.training import evaluate, fit
from realign_core.errors import DataError, ModelError, ReAlignError, TrainingError
from realign_core.methods import dpo, get, reward

rng = np.random.default_rng(2)
P, T = 5, 8
LAST = rng.integers(2, T, 2 * P)
PLACE = np.arange(T) == LAST[:, None]
REWARDS = np.where(PLACE, rng.normal(0, 2, (2 * P, 1)), 0)
MARGIN = np.array([0.0, 0.5, 1.0, 0.0, 3.0])
BATCH = Batch(ids=np.zeros(PLACE.shape, np.int32), mask=PLACE, extras={"margin": MARGIN}, group=2)
METHODS = {"plain": reward.method(margin=0.0), "margin": reward.method(), "half the margin": reward.method(margin=0.5),
           "centred": reward.method(center=0.01), "centred only a little": reward.method(margin=0.0, center=1.0)}
PAIRS = [{"prompt": f"What is {i} plus {j}?", "chosen": str(i + j), "rejected": f"I think {i + j + 1}, friend."}
         for i in range(6) for j in range(6)]


# --- the objective ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_agree_with_float64(name, backend):
    assert_agrees_with_float64(backend, METHODS[name].objective, REWARDS, BATCH, BATCH)


@pytest.mark.parametrize("name", METHODS)
def test_torch_float64_gradient_equals_finite_differences(name):
    assert_torch_gradient_is_exact(METHODS[name].objective, REWARDS, BATCH)


@pytest.mark.parametrize(("margin", "center"), [(False, None), (True, None), (True, 0.01)])
def test_equals_trl(margin, center, backend):
    "TRL's own `compute_loss`, fed with our numbers by a model that returns them."
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl").RewardTrainer
    values = REWARDS.sum(axis=1)
    leaf = torch.tensor(np.concatenate([values[0::2], values[1::2]]), dtype=torch.float32, requires_grad=True)
    inputs = {"input_ids": torch.zeros(2 * P, 3, dtype=torch.long), "attention_mask": torch.ones(2 * P, 3)}
    inputs |= {"margin": torch.tensor(MARGIN, dtype=torch.float32)} if margin else {}
    def model(**_): return SimpleNamespace(logits=leaf[:, None])
    class Metrics(dict):
        def __missing__(self, key): return self.setdefault(key, [])
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=center), _total_train_tokens=0,
        _metrics={"train": Metrics(), "eval": Metrics()},
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x))
    theirs = trainer.compute_loss(stub, model, inputs)
    theirs.backward()
    method = reward.method(margin=1.0 if margin else 0.0, center=center or 0.0)
    ours, metrics, gradient = on(backend, method.objective, REWARDS, BATCH)
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    wanted, got = leaf.grad.numpy(), gradient[PLACE]
    assert np.abs(np.concatenate([got[0::2], got[1::2]]) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_by_hand():
    "Rewards of 2 and 1: −log σ(1); with a margin of 1: log 2; centred with weight 0.01: 0.09 more."
    two = np.array([2.0]), np.array([1.0])
    assert reward.loss(*two)[0] == pytest.approx(0.313262, abs=1e-6)
    assert reward.loss(*two, margin=1.0)[0] == pytest.approx(np.log(2))
    assert reward.loss(*two, center=0.01)[0] == pytest.approx(0.313262 + 0.09, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("chosen", "rejected"), [(0, 0), (1e4, 1e4), (1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4), (1e-9, 0)])
def test_no_reward_gives_nan(name, chosen, rejected, backend):
    batch = Batch(ids=np.zeros((2, 2), np.int32), mask=np.ones((2, 2), bool), extras={"margin": np.zeros(1)}, group=2)
    values = np.array([[0, chosen], [0, rejected]], float)
    loss, metrics, gradient = on(backend, METHODS[name].objective, values, batch)
    assert np.isfinite(loss) and np.isfinite(gradient).all() and all(np.isfinite(total) for total, _ in metrics.values())


def test_an_equal_pair_is_a_coin_and_centring_does_not_order():
    equal = np.where(PLACE, 1.5, 0.0)
    loss, metrics = METHODS["plain"].objective(equal, BATCH)
    assert loss == pytest.approx(np.log(2)) and metrics["accuracy"] == (P / 2, P)
    slope = finite_difference(lambda x: float(reward.loss(x[:1], x[1:], center=0.3)[0]), np.array([1.0, 1.0]))
    assert slope.sum() == pytest.approx(2 * 0.3 * 2 * 2)


def test_micro_batches_add_up_to_the_whole():
    objective = METHODS["centred"].objective
    def part(start, stop):
        margin = {"margin": MARGIN[start // 2: stop // 2]}
        batch = Batch(ids=BATCH.ids[start:stop], mask=PLACE[start:stop], extras=margin, group=2)
        return objective(REWARDS[start:stop], batch)[0] * batch.examples
    total = part(0, 4) + part(4, 10)
    assert total / P == pytest.approx(objective(REWARDS, BATCH)[0], rel=1e-12)


# --- the scalar head -------------------------------------------------------------------------------------------------

def make_batch(seed=0, rows=6, width=18, vocab=300):
    "Pairs of right-padded rows whose last tokens are targets."
    draw = np.random.default_rng(seed)
    ids, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row in range(rows):
        length = int(draw.integers(width // 2 + 2, width))
        ids[row, :length], mask[row, width // 2: length] = draw.integers(6, vocab, length), True
    return Batch(ids, mask, extras={"margin": np.zeros(rows // 2, np.float32)}, group=2, rows=tuple(range(1, rows // 2 + 1)))


def trained(policy, steps=2):
    "A policy after a few steps, so that head and adapters are no longer what they started as."
    policy.configure(AdamW())
    for seed in range(steps):
        policy.backward(make_batch(seed), reward.method().objective)
        policy.step(5e-3)
    return policy


def classify(folder, batch, adapter=None):
    "The rewards that plain transformers (and peft) gives."
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification
    if adapter is None:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        peft = pytest.importorskip("peft")
        base = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1, pad_token_id=0)
        model = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch.ids).long()).logits[:, 0].numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"])
def test_a_saved_snapshot_gives_the_same_rewards_everywhere(family, tied, backend, snapshot, tmp_path):
    "Trained here, read by transformers, torch and MLX."
    if family == "gemma" and not tied:
        pytest.skip("Gemma ties its embeddings")
    policy, batch = trained(load(snapshot(family, tied), backend, head="reward", seed=1)), make_batch(9)
    ours = policy.score(batch)
    assert ((ours != 0).sum(axis=1) == 1).all() and np.ptp(ours.sum(axis=1)) > 1e-3
    policy.save(tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert len(config["id2label"]) == config["num_labels"] == 1
    weights = read_safetensors(tmp_path / "reward" / "model.safetensors")
    assert weights["score.weight"].shape[0] == 1 and "lm_head.weight" not in weights
    assert np.abs(classify(tmp_path / "reward", batch) - ours.sum(axis=1)).max() <= 1e-4
    for other in ("torch", "mlx"):
        assert np.abs(load(tmp_path / "reward", other).score(batch) - ours).max() <= 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_adapter_gives_the_same_rewards_everywhere(dora, backend, snapshot, tmp_path):
    lora = LoRA(rank=4, targets=("q_proj", "v_proj", "down_proj"), dora=dora)
    policy, batch = trained(load(snapshot(), backend, lora=lora, head="reward")), make_batch(9)
    ours = policy.score(batch)
    policy.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert np.abs(classify(snapshot(), batch, tmp_path / "adapter") - ours.sum(axis=1)).max() <= 1e-4
    for other in ("torch", "mlx"):
        again = load(snapshot(), other, adapter=tmp_path / "adapter")
        assert again.reward and np.abs(again.score(batch) - ours).max() <= 1e-4
        again.fuse()
        again.save(tmp_path / other)
        assert np.abs(classify(tmp_path / other, batch) - ours.sum(axis=1)).max() <= 1e-4
    convert_adapter(tmp_path / "adapter", tmp_path / "again", "peft")
    assert np.abs(load(snapshot(), backend, adapter=tmp_path / "again").score(batch) - ours).max() <= 1e-6
    with pytest.raises(ModelError, match="no room for a reward model's head"):
        convert_adapter(tmp_path / "adapter", tmp_path / "mlx-layout", "mlx")


def test_an_adapter_that_peft_trained_is_read(snapshot, tmp_path, backend):
    "PEFT's own SEQ_CLS set-up, which saves `classifier` and `score` whether there or not."
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification
    base = AutoModelForSequenceClassification.from_pretrained(snapshot(), num_labels=1, pad_token_id=0, dtype=torch.float32)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, settings)
    batch = make_batch(9)
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(batch.ids).long()).logits[:, 0].numpy()
    model.save_pretrained(tmp_path / "peft")
    policy = load(snapshot(), backend, adapter=tmp_path / "peft")
    assert np.abs(policy.score(batch).sum(axis=1) - theirs).max() <= 1e-4


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_losses_gradients_and_curves_agree_between_frameworks(snapshot, lora):
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    found = []
    for name in ("torch", "mlx"):
        policy, curve = load(snapshot(), name, lora=lora, head="reward", seed=3), []
        loss, _ = policy.backward(make_batch(1), METHODS["centred"].objective)
        grads = policy.gradients()
        for step in range(10):
            policy.step(2e-3, max_norm=1.0)
            curve.append(policy.backward(make_batch(step % 4), METHODS["centred"].objective)[0])
        found.append((loss, grads, np.array(curve)))
    (loss, grads, curve), (loss_b, grads_b, curve_b) = found
    assert loss == pytest.approx(loss_b, rel=1e-5) and grads.keys() == grads_b.keys()
    a, b = (np.concatenate([g[k].ravel() for k in sorted(g)]) for g in (grads, grads_b))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
    assert np.abs(curve / curve_b - 1).max() <= 1e-3 and curve[-4:].mean() < curve[:4].mean()


def test_autocast_rounds_rewards_and_gradients_alike(tiny):
    pytest.importorskip("torch")
    exact, rounded = (load(tiny, "torch", head="reward", seed=3, autocast=kind) for kind in (None, "bfloat16"))
    off = np.abs(exact.score(make_batch()) - rounded.score(make_batch())).max()
    assert 0 < off < 0.02
    losses = [policy.backward(make_batch(), METHODS["plain"].objective)[0] for policy in (exact, rounded)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.02)


def test_padding_changes_no_reward_and_eos_as_padding_is_not_read(tiny, backend):
    policy = load(tiny, backend, head="reward")
    batch = make_batch(5)
    wide = Batch(np.pad(batch.ids, ((0, 0), (0, 7))), np.pad(batch.mask, ((0, 0), (0, 7))), extras=batch.extras, group=2)
    assert np.abs(policy.score(wide).sum(axis=1) - policy.score(batch).sum(axis=1)).max() <= 1e-5
    ids, mask = np.array([[7, 8, 9, 2, 2]]), np.array([[0, 0, 1, 1, 0]], bool)
    assert last_tokens(Batch(ids, mask), pad_id=2).argmax() == 2 and last_tokens(Batch(ids, mask), pad_id=0).argmax() == 3


def test_a_head_is_seeded_and_saved_with_the_state(tiny, backend, tmp_path):
    batch = make_batch()
    a, b, c = (load(tiny, backend, head="reward", seed=seed) for seed in (0, 0, 1))
    assert (a.score(batch) == b.score(batch)).all() and not np.allclose(a.score(batch), c.score(batch))
    trained(a).save_state(tmp_path / "state")
    b.load_state(tmp_path / "state")
    assert (a.score(batch) == b.score(batch)).all()


def test_what_a_reward_model_cannot_do_is_refused(tiny, backend):
    policy, batch = load(tiny, backend, head="reward"), make_batch()
    for call, message in ((lambda: policy.generate([[5, 6]]), "writes no text"),
                          (lambda: policy.entropy(batch), "no probabilities"),
                          (lambda: policy.score(batch, reference=True), "no reference"),
                          (lambda: policy.score(Batch(batch.ids, np.zeros_like(batch.mask))), "has no target"),
                          (lambda: load(tiny, backend, head="score"), "unknown head 'score'")):
        with pytest.raises(ModelError, match=message):
            call()
    with pytest.raises(TrainingError, match="'dpo' wants a policy loaded with head=None"):
        fit(policy, dpo.method(), PAIRS, steps=1, progress=False)
    with pytest.raises(TrainingError, match="'reward' wants a policy loaded with head='reward'"):
        fit(load(tiny, backend), reward.method(), PAIRS, steps=1, progress=False)
    with pytest.raises(ReAlignError, match="no scalar head"):
        reward.reward(load(tiny, backend), ["a"], ["b"])


def test_a_classifier_with_two_labels_or_a_lost_head_is_refused(tiny, backend, tmp_path):
    policy = load(tiny, backend, head="reward")
    policy.save(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ModelError, match="2 labels is no reward model"):
        load(tmp_path / "two", backend)
    from safetensors.numpy import save_file
    policy.save(tmp_path / "lost")
    weights = read_safetensors(tmp_path / "lost" / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="score"):
        load(tmp_path / "lost", backend)


# --- training, and what it is used for -------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [None, LoRA(rank=4, dropout=0.1)], ids=["full", "lora"])
def test_a_stopped_run_goes_on_exactly(tiny, backend, lora, tmp_path):
    settings = dict(steps=10, batch_size=8, micro_batch=4, lr=1e-2, save_every=4, held_out=4, progress=False)
    def fresh(): return load(tiny, backend, lora=lora, head="reward")
    whole = fit(fresh(), reward.method(center=0.01), PAIRS, out=tmp_path / "whole", **settings)
    def stop(record):
        if record["step"] == 6:
            raise RuntimeError("pulled the plug")
    with pytest.raises(RuntimeError, match="plug"):
        fit(fresh(), reward.method(center=0.01), PAIRS, out=tmp_path / "cut", track=stop, **settings)
    resumed = fit(fresh(), reward.method(center=0.01), PAIRS, out=tmp_path / "cut", **settings)
    for policy, name in ((whole.policy, "a"), (resumed.policy, "b")):
        policy.save_state(tmp_path / name)
    for file in ("weights.safetensors", "optimizer.safetensors"):
        a, b = (read_safetensors(tmp_path / name / file) for name in "ab")
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert whole.history[-1]["loss"] == resumed.history[-1]["loss"]


def test_it_learns_and_ranks(tiny, backend):
    policy = load(tiny, backend, head="reward")
    run = fit(policy, reward.method(), PAIRS, steps=20, batch_size=8, lr=3e-3, held_out=6, progress=False)
    found = reward.ranked(run.policy, read(PAIRS, "preference"))
    assert found.value > 0.9 and found.n == len(PAIRS)
    values = reward.reward(run.policy, [p["prompt"] for p in PAIRS[:5]], [p["chosen"] for p in PAIRS[:5]], batch_size=2)
    alone = [reward.reward(run.policy, [p["prompt"]], [p["chosen"]])[0] for p in PAIRS[:5]]
    assert np.abs(values - alone).max() <= 1e-4


def test_reward_and_evaluate_agree(tiny, backend):
    policy, rows = load(tiny, backend, head="reward"), read(PAIRS[:8], "preference")
    examples = encode_rows(rows, reward.encode, Encoder(policy.tokenizer, policy.max_length))
    found = evaluate(policy, get("reward"), [collate(examples[:3]), collate(examples[3:])])
    chosen = reward.reward(policy, [r.prompt for r in rows], [r.chosen for r in rows])
    assert found["chosen_reward"] == pytest.approx(chosen.mean(), abs=1e-5)
    assert found["accuracy"] == pytest.approx(reward.ranked(policy, rows).value)


def test_best_of_is_the_mean_over_all_subsets():
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        by_hand = [np.mean([values[i, max(c, key=lambda s: rewards[i, s])] for c in combinations(range(6), n)]) for i in range(3)]
        assert reward.best_of(rewards, values, [n])[:, 0] == pytest.approx(by_hand)
    with pytest.raises(DataError, match="n samples"):
        reward.best_of(rewards, values, [7])


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "What is 1 plus 1?", "chosen": "2", "rejected": "3, friend."}


@pytest.mark.parametrize(("change", "message"), [
    ({"rejected": "2"}, "same"),
    ({"prompt": ""}, "prompt"),
    ({"chosen": " "}, "chosen"),
    ({"chosen_score": 0.2, "rejected_score": 0.9}, "scores contradict the order"),
    ({"margin": -0.5}, "margin contradicts the order"),
    ({"rejected": "word " * 400}, "longer than"),
])
def test_bad_rows_are_named(change, message, tiny, backend, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | change, GOOD)))
    with pytest.raises(DataError, match=message) as error:
        fit(load(tiny, backend, head="reward"), reward.method(), file, steps=1, held_out=0, truncation="error", progress=False)
    assert error.value.row == 2 and "pairs.jsonl" in str(error.value)


def test_margins_come_from_the_row_or_its_scores():
    rows = read([GOOD, GOOD | {"chosen_score": 0.9, "rejected_score": 0.2},
                 GOOD | {"margin": 2, "chosen_score": 1, "rejected_score": 0}], "preference")
    assert [reward.row_margin(row) for row in rows] == pytest.approx([0, 0.7, 2])


def test_an_answer_that_cannot_be_scored_is_named(tiny, backend):
    policy = load(tiny, backend, head="reward")
    for answers, message in ((["2", " "], "empty"), (["2", "word " * 400], "longer than")):
        with pytest.raises(DataError, match=message) as error:
            reward.reward(policy, ["a question", "another"], answers)
        assert error.value.row == 2


@pytest.mark.parametrize("bad", [dict(margin=-1), dict(center=-0.1)])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ReAlignError, match="wanted"):
        reward.method(**bad)
