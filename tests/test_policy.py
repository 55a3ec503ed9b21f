"What every policy promises, whatever its framework, on random snapshots of every supported family."

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from toys import PROMPTS, make_batch, mean_loss

from snapshots import FAMILIES, KINDS, make_snapshot, make_tokenizer, plain_logps, plain_model

torch = pytest.importorskip("torch")  # which makes the snapshots

from realign_core.engine.policy import AdamW, Batch, LoRA, Policy, load, window  # noqa: E402
from realign_core.errors import CheckpointError, ModelError, OutputError, TrainingError  # noqa: E402


@pytest.fixture
def open_policy(backend):
    return lambda folder, **kwargs: load(folder, backend, threads=1, **kwargs)


def logits(policy, ids):
    "Logits (T, V) of one row, from the model inside."
    if policy.backend == "torch":
        with torch.no_grad():
            return policy.model(torch.tensor([ids])).logits[0].float().numpy()
    import mlx.core as mx
    return np.array(policy._model(mx.array([ids]))[0].astype(mx.float32))


def final_norm(policy, states):
    if policy.backend == "torch":
        return policy.model.base_model.norm(torch.from_numpy(states)).detach().numpy()
    import mlx.core as mx
    return np.array(policy._model.model.norm(mx.array(states)))


def weights(policy):
    "Trainable weights by name, float32."
    if policy.backend == "torch":
        return {k: p.detach().float().numpy().copy() for k, p in policy._trainable().items()}
    import mlx.core as mx
    return {k: np.array(w.astype(mx.float32)) for k, w in policy._trainable().items()}


def average_output_row(policy, token):
    "Give a token the mean of the output embeddings, so that it becomes likely."
    if policy.backend == "torch":
        with torch.no_grad():
            policy.model.lm_head.weight[token] = policy.model.lm_head.weight.mean(0)
        return
    import mlx.core as mx
    head = policy._model.lm_head.weight
    policy._model.lm_head.weight = mx.concatenate([head[:token], head.mean(0, keepdims=True), head[token + 1:]])


def random_state(backend):
    "The process's own random stream."
    if backend == "torch":
        return torch.random.get_rng_state().numpy()
    import mlx.core as mx
    return np.array(mx.random.state[0])


def change_config(folder, copy, **entries):
    "A copy of a snapshot with other entries in its config.json."
    folder = shutil.copytree(folder, copy)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | entries))
    return folder


# --- scoring ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_family_scores_steps_and_generates(open_policy, snapshot, family, tied):
    "Log-probabilities as plain transformers gives them, one LoRA step, and greedy text that the model agrees with."
    folder, batch = snapshot(family, tied), make_batch()
    targets = ("qkv_proj", "down_proj") if family == "phi3" else ("q_proj", "down_proj")
    policy = open_policy(folder, lora=LoRA(rank=2, targets=targets))
    assert isinstance(policy, Policy)
    before = policy.score(batch)
    assert np.abs(before - plain_logps(folder, batch)).max() <= 1e-4
    assert (before[~batch.mask] == 0).all() and before.dtype == np.float32
    loss, metrics = policy.backward(batch, mean_loss)
    assert loss == pytest.approx(-before.sum() / batch.mask.sum(), rel=1e-5)
    assert metrics["nll"] == (pytest.approx(-before.sum(), rel=1e-5), batch.mask.sum())
    assert policy.step(1e-2, max_norm=1.0) > 0
    assert policy.score(batch).sum() > before.sum()
    assert np.abs(policy.score(batch, reference=True) - before).max() <= 1e-6
    for prompt, (c,) in zip(PROMPTS, policy.generate(PROMPTS, max_tokens=8, temperature=0), strict=True):
        ids = [*prompt]
        for token in c.ids:  # one token at a time, with no cache and no padding
            last = logits(policy, ids)[-1]
            assert last[token] >= last.max() - 1e-4
            ids.append(token)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_families_that_change_their_logits(backend, open_policy, tmp_path, family):
    "Soft-capped and rescaled logits are scored as the model itself would."
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig
    sizes = dict(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, head_dim=8)
    sliding = {"torch": 8, "mlx": 64}[backend]
    config = {"gemma2": lambda: Gemma2Config(**sizes, final_logit_softcapping=3.0, sliding_window=sliding),
              "cohere": lambda: CohereConfig(**sizes, logit_scale=0.3),
              "granite": lambda: GraniteConfig(**sizes, logits_scaling=4.0)}[family]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    extra = {"mlp_bias": False, "use_qk_norm": False}  # which mlx-lm expects and transformers may leave out
    path.write_text(json.dumps({**extra, **json.loads(path.read_text())}))
    policy, batch = open_policy(tmp_path), make_batch()
    assert np.abs(policy.score(batch) - plain_logps(tmp_path, batch)).max() <= 1e-4
    assert backend == "mlx" or policy.head.cap or policy.head.factor != 1


def pack_rows(lengths=(7, 4, 6), width=20):
    "The same three sequences in three rows and in one."
    rng, single = np.random.default_rng(0), Batch(np.zeros((3, 7), np.int32), np.zeros((3, 7), bool))
    row, mask, start = {name: np.zeros((1, width), np.int32) for name in ("ids", "segments", "positions")}, \
        np.zeros((1, width), bool), 0
    for i, n in enumerate(lengths):
        single.ids[i, :n] = row["ids"][0, start: start + n] = rng.integers(6, 300, n)
        single.mask[i, 2:n] = mask[0, start + 2: start + n] = True
        row["segments"][0, start: start + n], row["positions"][0, start: start + n] = i + 1, np.arange(n)
        start += n
    return single, Batch(mask=mask, **row)


@pytest.mark.parametrize(("family", "sliding"), [("llama", None), ("mistral", None), ("mistral", 4), ("phi3", 4)])
def test_packed_equals_unpacked(open_policy, tmp_path, snapshot, family, sliding):
    "A row of three sequences scores as three rows, with and without a sliding window; gradients too."
    folder = change_config(snapshot(family), tmp_path / "sliding", sliding_window=sliding) if sliding else snapshot(family)
    policy, (single, packed) = open_policy(folder), pack_rows()
    assert np.abs(policy.score(single) - plain_logps(folder, single)).max() <= 1e-4
    assert np.abs(policy.score(packed)[packed.mask] - policy.score(single)[single.mask]).max() <= 1e-5
    policy.backward(single, mean_loss)
    wanted = policy.gradients()
    policy.step(0.0)
    policy.backward(packed, mean_loss)
    for name, gradient in policy.gradients().items():
        assert np.abs(gradient - wanted[name]).max() <= 1e-5


def test_chunks_change_nothing(backend, open_policy, snapshot, monkeypatch):
    "Log-probabilities and gradients are the same in one chunk and in many, tied, untied, and with an adapted head."
    batch, tolerance = make_batch(), {"torch": 1e-6, "mlx": 1e-5}[backend]
    for policy in (open_policy(snapshot(tied=True)), open_policy(snapshot()),
                   open_policy(snapshot(), lora=LoRA(rank=2, targets=("q_proj", "lm_head")))):
        whole = policy.score(batch)
        policy.backward(batch, mean_loss)
        wanted = policy.gradients()
        policy.step(0.0)
        with monkeypatch.context() as patch:
            patch.setattr(f"realign_core.engine.{backend}_policy.CHUNK_BYTES", 3 * 4 * 384)  # three targets at a time
            assert np.abs(policy.score(batch) - whole).max() <= tolerance
            policy.backward(batch, mean_loss)
        found = policy.gradients()
        assert found.keys() == wanted.keys()
        assert all(np.abs(found[k] - wanted[k]).max() <= 1e-6 for k in wanted)


def test_refused_batches(open_policy, snapshot):
    "Too long, outside the vocabulary, or a target that nothing predicts."
    policy = open_policy(snapshot(positions=16))
    assert policy.max_length == 16
    ids, mask = np.ones((1, 17), np.int32), np.zeros((1, 17), bool)
    with pytest.raises(ModelError, match="17 tokens; the model's window is 16"):
        policy.score(Batch(ids, mask | (np.arange(17) == 16)))
    assert policy.score(Batch(ids, mask | (np.arange(17) == 15)))[0, 15] < 0  # what lies behind the last target is not used
    with pytest.raises(ModelError, match="17 tokens; the model's window is 16"):
        policy.hidden_states(Batch(ids, mask))  # where every column is
    with pytest.raises(ModelError, match="first token"):
        policy.score(Batch(ids, mask | (np.arange(17) == 0)))
    for wrong in (ids + 999, ids - 2):
        with pytest.raises(ModelError, match="outside the model's vocabulary of 384"):
            policy.score(Batch(wrong, mask | (np.arange(17) == 5)))
    assert (policy.score(Batch(ids, mask)) == 0).all()


def test_refused_packing(open_policy, snapshot):
    "Positions that run on from one sequence to the next, that jump, or that are missing."
    policy, (_, packed) = open_policy(snapshot()), pack_rows()
    with pytest.raises(ModelError, match="do not start at 0"):
        policy.score(replace(packed, positions=np.arange(20, dtype=np.int32)[None]))
    with pytest.raises(ModelError, match="do not count up by 1"):
        policy.backward(replace(packed, positions=packed.positions * 2), mean_loss)
    for missing in ("segments", "positions"):
        with pytest.raises(ModelError, match="belong together"):
            policy.score(replace(packed, **{missing: None}))


def test_window_of_a_configuration():
    "Three names, at the top or in the text part; what says nothing has no limit."
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        assert window({name: 77}) == window({"model_type": "both", "text_config": {name: 77}}) == 77
    assert window({"max_position_embeddings": None, "n_positions": 5}) == 5 and window({}) == 2**31


def test_entropy_and_hidden_states(open_policy, snapshot):
    from transformers import AutoModelForCausalLM
    folder, batch = snapshot("gemma"), make_batch()
    policy, plain = open_policy(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out = plain(torch.from_numpy(batch.ids).long(), output_hidden_states=True)
    probs = out.logits.softmax(-1).double()
    entropy = -(probs * probs.log()).sum(-1).numpy()
    wanted = np.pad(entropy[:, :-1], ((0, 0), (1, 0))) * batch.mask
    assert np.abs(policy.entropy(batch) - wanted).max() <= 1e-4
    states = policy.hidden_states(batch)
    assert states.shape == (3, *batch.ids.shape, 32)
    for i in range(2):  # transformers' last state is after the final norm, ours before
        assert np.abs(states[i] - out.hidden_states[i].numpy()).max() <= 1e-5
    assert np.abs(final_norm(policy, states[2]) - out.hidden_states[2].numpy()).max() <= 1e-4
    assert (policy.hidden_states(batch, [-1, 0]) == states[[2, 0]]).all()
    with pytest.raises(ModelError, match="points 0 to 2"):
        policy.hidden_states(batch, [3])


# --- generation ------------------------------------------------------------------------------------------------------

def scored(policy, prompt, completion):
    "The log-probabilities that `score` gives a completion."
    ids = np.array([[*prompt, *completion.ids]], dtype=np.int32)
    return policy.score(Batch(ids, np.arange(ids.shape[1])[None] >= len(prompt)))[0, len(prompt):]


def ids_of(completions):
    return [[c.ids for c in cs] for cs in completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_logps_equal_score(open_policy, snapshot, family):
    policy = open_policy(snapshot(family))
    for prompt, completions in zip(PROMPTS, policy.generate(PROMPTS, n=3, max_tokens=12, seed=5), strict=True):
        for c in completions:
            assert np.abs(scored(policy, prompt, c) - c.logps).max() <= 1e-4
            assert c.finished == (c.ids[-1] in policy.stops)
            assert c.text == policy.tokenizer.decode(c.ids, skip_special_tokens=True)


def test_generation_with_a_sliding_window(open_policy, snapshot, tmp_path):
    "Prompts of different lengths, longer than the window: log-probabilities as scored, and as without company."
    policy = open_policy(change_config(snapshot("mistral"), tmp_path / "sliding", sliding_window=5))
    together = policy.generate(PROMPTS, n=2, max_tokens=9, seed=2)
    assert ids_of(together) == ids_of(policy.generate(PROMPTS, n=2, max_tokens=9, seed=2, batch_size=1))
    for prompt, cs in zip(PROMPTS, together, strict=True):
        for c in cs:
            assert np.abs(scored(policy, prompt, c) - c.logps).max() <= 1e-4


def test_samples_do_not_depend_on_the_batch(open_policy, snapshot):
    "One by one, in batches, or another n: completion (prompt, sample) is the same."
    policy = open_policy(snapshot())
    def ids(seed=3, **kwargs): return ids_of(policy.generate(PROMPTS, max_tokens=10, seed=seed, **kwargs))
    many = ids(n=4, batch_size=64)
    assert many == ids(n=4, batch_size=3) == ids(n=4, batch_size=1)
    assert [cs[:2] for cs in many] == ids(n=2)
    assert many != ids(n=4, seed=4)
    assert len({i for cs in many for i in cs}) > len(PROMPTS)


def test_a_prompt_given_twice_is_sampled_twice(open_policy, snapshot):
    "The model reads it once, and each place in the list has a stream of its own."
    policy = open_policy(snapshot())
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    together = ids_of(policy.generate(prompts, n=2, max_tokens=10, seed=3))
    assert together == ids_of(policy.generate(prompts, n=2, max_tokens=10, seed=3, batch_size=1))
    assert together[0] != together[2]
    first, _, third = policy.generate(prompts, max_tokens=10, temperature=0)
    assert first[0].ids == third[0].ids


def test_sampling_follows_the_distribution(open_policy, snapshot):
    "First tokens of 4,000 samples against the model's own distribution, plain and with a nucleus."
    policy = open_policy(snapshot())
    last = logits(policy, PROMPTS[2])[-1].astype(np.float64)
    probs = np.exp(last - last.max()) / np.exp(last - last.max()).sum()
    draws = policy.generate([PROMPTS[2]], n=4000, max_tokens=1, batch_size=4000)[0]
    share = np.bincount([c.ids[0] for c in draws], minlength=len(probs)) / 4000
    assert np.abs(share - probs).sum() < 0.35 and np.abs(share - probs).max() < 0.03
    top = set(np.argsort(-probs)[:int((np.cumsum(np.sort(probs)[::-1]) < 0.3).sum()) + 1].tolist())
    nucleus = policy.generate([PROMPTS[2]], n=500, max_tokens=1, top_p=0.3, batch_size=500)[0]
    assert {c.ids[0] for c in nucleus} <= top
    hot, cold = (np.mean([c.logps[0] for c in policy.generate([PROMPTS[2]], n=500, max_tokens=1, temperature=t,
                                                              batch_size=500)[0]]) for t in (2.0, 0.3))
    assert hot < cold  # and both are log-probabilities at temperature 1


def test_stops(open_policy, snapshot):
    "The chat's end-of-turn token ends a completion, finished rows don't disturb others, and the window is respected."
    policy = open_policy(snapshot(positions=32))
    end = policy.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in policy.stops
    average_output_row(policy, end)  # likely enough that completions have many lengths
    plain = policy.generate(PROMPTS, n=8, max_tokens=64, seed=1, batch_size=64)
    assert {c.finished for cs in plain for c in cs} == {True, False}
    for prompt, cs in zip(PROMPTS, plain, strict=True):
        for c in cs:
            assert end not in c.ids[:-1] and len(c.ids) == len(c.logps)
            assert c.finished or len(prompt) + len(c.ids) == 32
    assert ids_of(policy.generate(PROMPTS, n=8, max_tokens=64, seed=1, batch_size=5)) == ids_of(plain)


def test_refused_generation(open_policy, snapshot):
    "Prompts without room or with unknown ids, and settings that mean nothing: an error, never an empty answer."
    policy = open_policy(snapshot(positions=32))
    for prompts in ([[]], [[7] * 32]):
        with pytest.raises(ModelError, match="prompt 0 has"):
            policy.generate(prompts)
    for token in (384, -1):
        with pytest.raises(ModelError, match=f"prompt 1: token id {token} is outside the model's vocabulary of 384"):
            policy.generate([[7], [7, token]])
    for name in ("n", "max_tokens", "batch_size"):
        for value in (0, -1):
            with pytest.raises(ModelError, match=f"{name}={value}; wanted at least 1"):
                policy.generate(PROMPTS, **{name: value})
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(ModelError, match="wanted temperature >= 0 and 0 < top_p <= 1"):
            policy.generate(PROMPTS, **wrong)
    assert policy.generate([]) == []


# --- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_micro_batches_give_the_same_gradient(open_policy, snapshot, lora):
    "1, 2 or 4 micro-batches, each weighted by its share of the targets."
    policy, batch, found = open_policy(snapshot(), lora=lora), make_batch(rows=8), []
    for count in (1, 2, 4):
        for rows in np.split(np.arange(8), count):
            part = Batch(batch.ids[rows], batch.mask[rows])
            policy.backward(part, mean_loss, scale=part.targets / batch.targets)
        found.append(policy.gradients())
        policy.step(0.0)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(np.abs(other[k] - found[0][k]).max() <= 1e-6 for k in other)


def test_step_clips_and_clears(open_policy, snapshot):
    policy, batch = open_policy(snapshot()), make_batch()
    with pytest.raises(TrainingError, match="backward"):
        policy.step(1e-3)
    policy.backward(batch, mean_loss)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in policy.gradients().values()))
    assert policy.step(1e-3, max_norm=0.1) == pytest.approx(norm, rel=1e-5)
    assert policy.gradients() == {}


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(open_policy, snapshot):
    policy, batch = open_policy(snapshot()), make_batch()
    before = policy.score(batch)
    policy.backward(batch, lambda logps, b: (logps.sum() * float("nan"), {}))
    assert np.isnan(policy.step(1e-3, max_norm=1.0))
    assert (policy.score(batch) == before).all()


def test_dropout_is_only_in_training_and_follows_the_seed(backend, open_policy, snapshot):
    lora, batch, losses = LoRA(rank=2, dropout=0.5), make_batch(), []
    for seed in (0, 0, 1):
        policy = open_policy(snapshot(), lora=lora, seed=seed)
        state = random_state(backend)
        for _ in range(3):
            policy.backward(batch, mean_loss)
            policy.step(0.1)
        assert (random_state(backend) == state).all()  # the process's own stream is left alone
        assert (policy.score(batch) == policy.score(batch)).all()
        losses.append(policy.backward(batch, mean_loss)[0])
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16(open_policy, snapshot):
    "16-bit weights score close to 32-bit ones and learn at a rate that would round to nothing without float32 copies."
    batch = make_batch()
    wide, narrow = open_policy(snapshot()), open_policy(snapshot(), dtype="bfloat16")
    assert "bfloat16" in repr(narrow) and "float32" in repr(wide) and narrow.score(batch).dtype == np.float32
    assert np.abs(narrow.score(batch) - wide.score(batch)).mean() < 0.1
    for policy in (wide, narrow):
        for _ in range(30):
            policy.backward(batch, mean_loss)
            policy.step(1e-4)
    assert narrow.score(batch).sum() == pytest.approx(wide.score(batch).sum(), rel=0.01)
    adapted = open_policy(snapshot(), dtype="bfloat16", lora=2)
    adapted.backward(batch, mean_loss)
    assert adapted.step(1e-3) > 0


# --- adapters and the reference --------------------------------------------------------------------------------------

def test_fresh_adapters(open_policy, snapshot):
    "A as the seed says, B zero, so nothing changes at first; unknown layers are refused with the list of known ones."
    folder, batch = snapshot("qwen3"), make_batch()
    lora = LoRA(rank=3, targets=("self_attn.q_proj", "model.layers.1.mlp.up_proj"))
    policy = open_policy(folder, lora=lora, seed=7)
    arrays = policy._tensors()
    assert sorted(arrays) == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    for path, (a, b, m) in arrays.items():
        assert (a == lora.initial_a(path, 32, 7)).all() and not b.any() and m is None
    assert (policy.score(batch) == open_policy(folder).score(batch)).all()
    names = {name.rpartition(".lora_")[2] for name in (policy.backward(batch, mean_loss), policy.gradients())[1]}
    assert names == {"A.weight", "B.weight"}
    for targets in (("wq",), ("q_proj", "wq")):
        with pytest.raises(ModelError, match="no linear layer 'wq'.*it has .*q_proj"):
            open_policy(folder, lora=LoRA(targets=targets))
    with pytest.raises(ModelError, match="lm_head"):
        open_policy(snapshot(tied=True), lora=LoRA(targets=("lm_head",)))


@pytest.mark.parametrize("dora", [False, True])
def test_fused_equals_adapted(open_policy, snapshot, tmp_path, dora):
    "Fusing keeps scores and greedy text, and the saved snapshot says the same in both plain libraries."
    policy, batch = open_policy(snapshot("qwen2"), lora=LoRA(rank=4, dora=dora, targets=("q_proj", "up_proj"))), make_batch()
    for _ in range(5):
        policy.backward(batch, mean_loss)
        policy.step(3e-2)
    scores, text = policy.score(batch), policy.generate(PROMPTS, temperature=0, max_tokens=8)
    policy.fuse()
    assert policy.lora is None and np.abs(policy.score(batch) - scores).max() <= 1e-4
    assert ids_of(policy.generate(PROMPTS, temperature=0, max_tokens=8)) == ids_of(text)
    folder = policy.save(tmp_path / "fused")
    assert np.abs(plain_logps(folder, batch) - scores).max() <= 1e-4
    policy.backward(batch, mean_loss)  # all weights train now
    assert len(policy.gradients()) > 10 and policy.step(1e-3) > 0
    pytest.importorskip("mlx_lm")
    assert np.abs(plain_logps(folder, batch, "mlx_lm") - scores).max() <= 1e-4
    read = plain_model(folder, "mlx_lm")
    for prompt, (c,) in zip(PROMPTS, text, strict=True):
        assert read([*prompt, *c.ids])[len(prompt) - 1:-1].argmax(-1).tolist() == list(c.ids)


@pytest.mark.parametrize("dora", [False, True])
def test_saved_adapter_comes_back(open_policy, snapshot, tmp_path, dora):
    policy, batch = open_policy(snapshot(), lora=LoRA(rank=2, dora=dora)), make_batch()
    policy.backward(batch, mean_loss)
    policy.step(0.1)
    for layout in ("peft", "mlx"):
        again = open_policy(snapshot(), adapter=policy.save(tmp_path / layout, layout))
        assert again.lora == policy.lora
        assert (again.score(batch) == policy.score(batch)).all()
    with pytest.raises(ModelError, match="the model wants|the layer maps"):
        open_policy(make_snapshot(tmp_path / "other", width=64), adapter=tmp_path / "peft")


def test_reference(open_policy, snapshot):
    "With adapters the reference is the base model, DoRA's too; without, a copy that later steps don't touch."
    batch = make_batch()
    start = open_policy(snapshot()).score(batch)
    for lora in (None, LoRA(rank=2), LoRA(rank=2, dora=True)):
        policy = open_policy(snapshot(), lora=lora)
        if lora is None:
            with pytest.raises(ModelError, match="freeze_reference"):
                policy.score(batch, reference=True)
        policy.freeze_reference()
        policy.backward(batch, mean_loss)
        policy.step(0.1)
        assert (policy.score(batch, reference=True) == start).all()
        assert (policy.score(batch) != start)[batch.mask].any()


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_saved_snapshot_loads_in_plain_libraries(open_policy, snapshot, tmp_path, family):
    "A fully trained model, saved, gives the same scores in transformers and mlx_lm, with the same tokenizer."
    from transformers import AutoTokenizer
    policy, batch = open_policy(snapshot(family)), make_batch()
    policy.backward(batch, mean_loss)
    policy.step(1e-2)
    folder, scores = policy.save(tmp_path / "out"), policy.score(batch)
    assert np.abs(plain_logps(folder, batch) - scores).max() <= 1e-4
    assert (open_policy(folder).score(batch) == scores).all()
    assert AutoTokenizer.from_pretrained(folder).chat_template == policy.tokenizer.chat_template
    assert not list(folder.glob("*.bin")) and not [p for p in folder.parent.iterdir() if p.name.startswith(".")]
    pytest.importorskip("mlx_lm")
    tolerance = 5e-3 if family == "gemma" else 1e-4  # mlx-lm has the exact GELU where Gemma wants the tanh form
    assert np.abs(plain_logps(folder, batch, "mlx_lm") - scores).max() <= tolerance


def test_saving_over_an_earlier_save(open_policy, snapshot, tmp_path):
    "Pieces of an earlier, larger save are removed, other files are left alone."
    policy, folder = open_policy(snapshot()), tmp_path / "out"
    folder.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (folder / name).write_text("old")
    policy.save(folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in snapshot().iterdir()} | {"notes.txt"}
    assert (open_policy(folder).score(make_batch()) == policy.score(make_batch())).all()


def test_chat_template_set_by_hand_is_saved(open_policy, snapshot, tmp_path):
    from transformers import AutoTokenizer
    policy = open_policy(snapshot(chat=False))
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert AutoTokenizer.from_pretrained(policy.save(tmp_path / "out")).chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.3), LoRA(rank=2, dora=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_round_trip(backend, open_policy, snapshot, tmp_path, lora, dtype):
    "Six steps in one go, or three, saved, read by a fresh policy, and three more: the same bits; on MLX within 1e-6."
    def steps(policy, which):
        for i in which:
            policy.backward(make_batch(seed=i), mean_loss)
            policy.step(1e-2 / (i + 1), max_norm=1.0)
    def fresh():
        policy = open_policy(snapshot(), lora=lora, dtype=dtype)
        policy.configure(AdamW(weight_decay=0.01))
        return policy
    whole, first, second = fresh(), fresh(), open_policy(snapshot(), lora=lora, dtype=dtype)
    steps(whole, range(6))
    steps(first, range(3))
    first.save_state(tmp_path / "state")
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "optimizer.safetensors", "state.json", "weights.safetensors"]
    second.load_state(tmp_path / "state")
    steps(second, range(3, 6))
    wanted, found = weights(whole), weights(second)
    assert wanted.keys() == found.keys()
    if backend == "torch":
        assert all(found[k].tobytes() == w.tobytes() for k, w in wanted.items())
    assert all(np.abs(found[k] - w).max() <= 1e-6 for k, w in wanted.items())


def test_bad_states_are_refused(open_policy, snapshot, tmp_path):
    "Another run's, missing, cut short, or with notes that lack an entry; a whole one is read afterwards."
    policy, state = open_policy(snapshot(), lora=2), tmp_path / "state"
    policy.backward(make_batch(), mean_loss)
    policy.step(1e-3)
    policy.save_state(state)
    with pytest.raises(CheckpointError, match="other adapters"):
        open_policy(snapshot(), lora=4).load_state(state)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        policy.load_state(tmp_path / "nothing")
    for name in ("weights", "optimizer"):
        with damaged(state / f"{name}.safetensors") as (file, whole):
            for keep in (len(whole) - 10, 100, 4, 0):
                file.write_bytes(whole[:keep])
                with pytest.raises(CheckpointError, match="missing or damaged"):
                    policy.load_state(state)
    with damaged(state / "state.json") as (file, whole):
        notes = json.loads(whole)
        for name in notes:
            file.write_text(json.dumps({k: v for k, v in notes.items() if k != name}))
            with pytest.raises(CheckpointError, match="missing or damaged"):
                policy.load_state(state)
        file.write_text(json.dumps(notes | {"backend": "another"}))
        with pytest.raises(CheckpointError, match="saved from another model .* on another"):
            policy.load_state(state)
    policy.load_state(state)


@contextmanager
def damaged(file):
    "A file and its bytes, which come back at the end."
    whole = file.read_bytes()
    yield file, whole
    file.write_bytes(whole)


@pytest.mark.parametrize("lora", [None, 2])
def test_a_folder_that_cannot_be_written(open_policy, snapshot, tmp_path, lora):
    "A file in the way, a place that takes no files, a disk that is full: OutputError, and nothing half-written."
    resource = pytest.importorskip("resource")
    policy = open_policy(snapshot(), lora=lora)
    (tmp_path / "file").write_text("")
    for write in (policy.save, policy.save_state):
        for target in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OutputError, match="file"):
                write(target)
        if os.path.ismount("/proc"):
            with pytest.raises(OutputError):
                write("/proc/realign")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # every file fails after 2000 bytes, as on a full disk
        try:
            with pytest.raises(OutputError):
                write(tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


STRANGE = {"torch": {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
           "mlx": {"model_file": "code.py"}}


def test_bad_snapshots(backend, open_policy, snapshot, tmp_path):
    "A missing weight, a cut file, an unknown architecture: refused with the folder's name, and no code is run."
    from safetensors.numpy import load_file, save_file
    holes = shutil.copytree(snapshot(), tmp_path / "holes")
    arrays = load_file(holes / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, holes / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="(?s)holes.*model.layers.1.mlp.up_proj.weight") as error:
        open_policy(holes)
    assert backend == "mlx" or "1 weights are missing" in str(error.value)
    cut = shutil.copytree(snapshot(), tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut"):
        open_policy(cut.parent)
    strange = change_config(snapshot(), tmp_path / "strange", **STRANGE[backend])
    (strange / "code.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ModelError, match="strange"):
        open_policy(strange)


def test_close(open_policy, snapshot):
    policy = open_policy(snapshot(), lora=2)
    policy.close()
    assert "closed" in repr(policy)
