"What MLXPolicy promises, on random snapshots of every supported family."

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from snapshots import FAMILIES, make_snapshot

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from realign_core.engine.policy import AdamW, Batch, LoRA, Policy, load  # noqa: E402
from realign_core.errors import CheckpointError, ModelError, OutputError, TrainingError  # noqa: E402

KINDS = [(family, tied) for family in FAMILIES for tied in (False, True) if tied or family != "gemma"]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    "Folder of a snapshot of the family asked for, made once."
    made = {}
    def get(family="llama", tied=False, **sizes):
        key = (family, tied, *sizes.items())
        if key not in made:
            made[key] = make_snapshot(tmp_path_factory.mktemp("snapshots") / family, family, tied, width=32, **sizes)
        return made[key]
    return get


def open_policy(folder, **kwargs):
    return load(folder, "mlx", threads=1, **kwargs)


def make_batch(rows=4, width=20, vocab=300, seed=0, group=1):
    "Right-padded rows of random lengths, the second half of each a target."
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((rows, width), dtype=np.int32), np.zeros((rows, width), dtype=bool)
    for row in range(rows):
        length = width if row == 0 else int(rng.integers(width // 2, width))
        ids[row, :length] = rng.integers(6, vocab, length)
        mask[row, length // 2: length] = True
    return Batch(ids, mask, group=group, rows=tuple(range(1, rows // group + 1)))


def take(batch, rows):
    return Batch(batch.ids[rows], batch.mask[rows])


def mean_loss(logps, batch):
    "Negative log-likelihood per target."
    return -logps.sum() / batch.mask.sum(), {"nll": (-logps.sum(), batch.mask.sum())}


def plain_logps(folder, batch, library="transformers"):
    "The same log-probabilities from a plain forward pass of transformers or mlx-lm."
    torch = pytest.importorskip("torch")
    ids = torch.from_numpy(batch.ids).long()
    if library == "transformers":
        from transformers import AutoModelForCausalLM
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    else:
        import mlx_lm
        logits = torch.from_numpy(np.array(mlx_lm.load(str(folder))[0](mx.array(batch.ids)).astype(mx.float32)))
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].numpy()
    return np.pad(logps, ((0, 0), (1, 0))) * batch.mask


def weights(policy):
    from mlx.utils import tree_flatten
    return {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(policy._model.trainable_parameters())}


# --- scoring ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_family_scores_steps_and_generates(snapshot, family, tied):
    "Log-probabilities as plain transformers gives them, one LoRA step, and greedy text that scoring agrees with."
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
            logits = policy._model(mx.array([ids]))[0, -1]
            assert logits[token].item() >= logits.max().item() - 1e-4
            ids.append(token)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_families_that_change_their_logits(tmp_path, family):
    "Soft-capped and rescaled logits are scored as the model itself would."
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

    from snapshots import make_tokenizer
    sizes = dict(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, head_dim=8)
    config = {"gemma2": lambda: Gemma2Config(**sizes, final_logit_softcapping=3.0, sliding_window=64),
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
    batch = make_batch()
    assert np.abs(open_policy(tmp_path).score(batch) - plain_logps(tmp_path, batch)).max() <= 1e-4


def test_unknown_output_layer_is_refused(snapshot, monkeypatch):
    "When the head alone and the whole model disagree, loading stops."
    from mlx_lm.models.llama import Model
    plain = Model.__call__
    monkeypatch.setattr(Model, "__call__", lambda self, ids, *a: plain(self, ids, *a) * (1.1 if ids.ndim == 2 else 1.0))
    with pytest.raises(ModelError, match="output layer"):
        open_policy(snapshot())


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3"])
def test_packed_equals_unpacked(tmp_path, snapshot, kind):
    "A row of three sequences scores as three rows, with a sliding window too; gradients as well."
    folder = snapshot(kind)
    if kind != "llama":
        folder = shutil.copytree(folder, tmp_path / "sliding")
        config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 4}
        (folder / "config.json").write_text(json.dumps(config))
    policy = open_policy(folder)
    lengths, rng = (7, 4, 6), np.random.default_rng(0)
    single = Batch(np.zeros((3, 7), np.int32), np.zeros((3, 7), bool))
    row = {name: np.zeros((1, 20), np.int32) for name in ("ids", "segments", "positions")}
    mask, start = np.zeros((1, 20), bool), 0
    for i, n in enumerate(lengths):
        single.ids[i, :n] = row["ids"][0, start: start + n] = rng.integers(6, 300, n)
        single.mask[i, 2:n] = mask[0, start + 2: start + n] = True
        row["segments"][0, start: start + n], row["positions"][0, start: start + n] = i + 1, np.arange(n)
        start += n
    packed = Batch(mask=mask, **row)
    assert np.abs(policy.score(single) - plain_logps(folder, single)).max() <= 1e-4
    assert np.abs(policy.score(packed)[mask] - policy.score(single)[single.mask]).max() <= 1e-5
    policy.backward(single, mean_loss)
    wanted = policy.gradients()
    policy.step(0.0)
    policy.backward(packed, mean_loss)
    for name, gradient in policy.gradients().items():
        assert np.abs(gradient - wanted[name]).max() <= 1e-5


def test_chunks_change_nothing(snapshot, monkeypatch):
    "Log-probabilities and gradients are the same in one chunk and in many, tied, untied, and with an adapted head."
    import realign_core.engine.mlx_policy as module
    batch = make_batch()
    for policy in (open_policy(snapshot(tied=True)), open_policy(snapshot()),
                   open_policy(snapshot(), lora=LoRA(rank=2, targets=("q_proj", "lm_head")))):
        whole = policy.score(batch)
        policy.backward(batch, mean_loss)
        wanted = policy.gradients()
        policy.step(0.0)
        with monkeypatch.context() as patch:
            patch.setattr(module, "LOGIT_BYTES", 3 * 4 * 384)  # three targets at a time
            assert np.abs(policy.score(batch) - whole).max() <= 1e-5
            policy.backward(batch, mean_loss)
        found = policy.gradients()
        assert found.keys() == wanted.keys()
        assert all(np.abs(found[k] - wanted[k]).max() <= 1e-6 for k in wanted)


def test_head_is_applied_to_targets_only(snapshot, monkeypatch):
    policy, batch, seen = open_policy(snapshot()), make_batch(), []
    head = policy._head
    policy._head = lambda hidden: (seen.append(hidden.shape[1]), head(hidden))[1]
    policy.score(batch)
    assert sum(seen) == batch.targets


def test_refused_batches(snapshot):
    "Too long, outside the vocabulary, or a target that nothing predicts."
    policy = open_policy(snapshot(positions=16))
    assert policy.max_length == 16
    ids, mask = np.ones((1, 17), np.int32), np.zeros((1, 17), bool)
    with pytest.raises(ModelError, match="17 tokens; the model's window is 16"):
        policy.score(Batch(ids, mask | (np.arange(17) == 16)))
    assert policy.score(Batch(ids, mask | (np.arange(17) == 15)))[0, 15] < 0  # what lies behind the last target is not used
    with pytest.raises(ModelError, match="first token"):
        policy.score(Batch(ids, mask | (np.arange(17) == 0)))
    with pytest.raises(ModelError, match="outside the model's vocabulary"):
        policy.score(Batch(ids + 999, mask | (np.arange(17) == 5)))
    assert (policy.score(Batch(ids, mask)) == 0).all()


def test_entropy_and_hidden_states(snapshot):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    folder, batch = snapshot("gemma"), make_batch()
    policy = open_policy(folder)
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(batch.ids).long(), output_hidden_states=True)
    probs = out.logits.softmax(-1).double()
    entropy = -(probs * probs.log()).sum(-1).numpy()
    wanted = np.pad(entropy[:, :-1], ((0, 0), (1, 0))) * batch.mask
    assert np.abs(policy.entropy(batch) - wanted).max() <= 1e-4
    states = policy.hidden_states(batch)
    assert states.shape == (3, *batch.ids.shape, 32)
    for i in range(2):  # transformers' last state is after the final norm, ours before
        assert np.abs(states[i] - out.hidden_states[i].numpy()).max() <= 1e-5
    final = np.array(policy._model.model.norm(mx.array(states[2])))
    assert np.abs(final - out.hidden_states[2].numpy()).max() <= 1e-4
    assert (policy.hidden_states(batch, [-1, 0]) == states[[2, 0]]).all()
    with pytest.raises(ModelError, match="points 0 to 2"):
        policy.hidden_states(batch, [3])


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [[int(x) for x in np.random.default_rng(i).integers(6, 300, 3 + 2 * i)] for i in range(7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_logps_equal_score(snapshot, family):
    policy = open_policy(snapshot(family))
    for prompt, completions in zip(PROMPTS, policy.generate(PROMPTS, n=3, max_tokens=12, seed=5), strict=True):
        for c in completions:
            ids = np.array([[*prompt, *c.ids]], dtype=np.int32)
            mask = np.arange(ids.shape[1])[None] >= len(prompt)
            assert np.abs(policy.score(Batch(ids, mask))[0, len(prompt):] - c.logps).max() <= 1e-4
            assert c.finished == (c.ids[-1] in policy.stops)
            assert c.text == policy.tokenizer.decode(c.ids, skip_special_tokens=True)


def test_samples_do_not_depend_on_the_batch(snapshot):
    "One by one, in batches, or another n: completion (prompt, sample) is the same."
    policy = open_policy(snapshot())
    def ids(**kwargs): return [[c.ids for c in cs] for cs in policy.generate(PROMPTS, max_tokens=10, seed=3, **kwargs)]
    many = ids(n=4, batch_size=64)
    assert many == ids(n=4, batch_size=3) == ids(n=4, batch_size=1)
    assert [cs[:2] for cs in many] == ids(n=2)
    assert many != [[c.ids for c in cs] for cs in policy.generate(PROMPTS, n=4, max_tokens=10, seed=4)]
    assert len({i for cs in many for i in cs}) > len(PROMPTS)


def test_sampling_follows_the_distribution(snapshot):
    "First tokens of 4,000 samples against the model's own distribution, plain and with a nucleus."
    policy = open_policy(snapshot())
    probs = np.array(mx.softmax(policy._model(mx.array([PROMPTS[2]]))[0, -1]))
    draws = policy.generate([PROMPTS[2]], n=4000, max_tokens=1, batch_size=4000)[0]
    share = np.bincount([c.ids[0] for c in draws], minlength=len(probs)) / 4000
    assert np.abs(share - probs).sum() < 0.35 and np.abs(share - probs).max() < 0.03
    top = set(np.argsort(-probs)[:int((np.cumsum(np.sort(probs)[::-1]) < 0.3).sum()) + 1].tolist())
    nucleus = policy.generate([PROMPTS[2]], n=500, max_tokens=1, top_p=0.3, batch_size=500)[0]
    assert {c.ids[0] for c in nucleus} <= top
    hot, cold = (np.mean([c.logps[0] for c in policy.generate([PROMPTS[2]], n=500, max_tokens=1, temperature=t,
                                                              batch_size=500)[0]]) for t in (2.0, 0.3))
    assert hot < cold  # and both are log-probabilities at temperature 1


def test_stops(snapshot):
    "The chat's end-of-turn token ends a completion, finished rows don't disturb others, and the window is respected."
    policy = open_policy(snapshot(positions=32))
    end = policy.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in policy.stops
    head = policy._model.lm_head.weight  # make the end likely enough that completions have many lengths
    policy._model.lm_head.weight = mx.concatenate([head[:end], head.mean(0, keepdims=True), head[end + 1:]])
    plain = policy.generate(PROMPTS, n=8, max_tokens=64, seed=1, batch_size=64)
    assert {c.finished for cs in plain for c in cs} == {True, False}
    for prompt, cs in zip(PROMPTS, plain, strict=True):
        for c in cs:
            assert end not in c.ids[:-1] and len(c.ids) == len(c.logps)
            assert c.finished or len(prompt) + len(c.ids) == 32
    assert [[c.ids for c in cs] for cs in policy.generate(PROMPTS, n=8, max_tokens=64, seed=1, batch_size=5)] == [
        [c.ids for c in cs] for cs in plain]
    for prompts in ([[]], [[7] * 32]):
        with pytest.raises(ModelError, match="prompt 0 has"):
            policy.generate(prompts)
    with pytest.raises(ModelError, match="temperature"):
        policy.generate(PROMPTS, temperature=-1)
    assert policy.generate([]) == []


# --- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_micro_batches_give_the_same_gradient(snapshot, lora):
    "1, 2 or 4 micro-batches, each weighted by its share of the targets."
    policy, batch, found = open_policy(snapshot(), lora=lora), make_batch(rows=8), []
    for count in (1, 2, 4):
        for rows in np.split(np.arange(8), count):
            part = take(batch, rows)
            policy.backward(part, mean_loss, scale=part.targets / batch.targets)
        found.append(policy.gradients())
        policy.step(0.0)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(np.abs(other[k] - found[0][k]).max() <= 1e-6 for k in other)


def test_step_clips_and_clears(snapshot):
    policy, batch = open_policy(snapshot()), make_batch()
    with pytest.raises(TrainingError, match="backward"):
        policy.step(1e-3)
    policy.backward(batch, mean_loss)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in policy.gradients().values()))
    assert policy.step(1e-3, max_norm=0.1) == pytest.approx(norm, rel=1e-5)
    assert policy.gradients() == {}


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(snapshot):
    policy, batch = open_policy(snapshot()), make_batch()
    before = policy.score(batch)
    policy.backward(batch, lambda logps, b: (logps.sum() * float("nan"), {}))
    assert np.isnan(policy.step(1e-3, max_norm=1.0))
    assert (policy.score(batch) == before).all()


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


def test_dropout_is_only_in_training_and_follows_the_seed(snapshot):
    lora, batch, losses = LoRA(rank=2, dropout=0.5), make_batch(), []
    for seed in (0, 0, 1):
        policy = open_policy(snapshot(), lora=lora, seed=seed)
        state = np.array(mx.random.state[0])
        for _ in range(3):
            policy.backward(batch, mean_loss)
            policy.step(0.1)
        assert (np.array(mx.random.state[0]) == state).all()  # the process's own stream is left alone
        assert (policy.score(batch) == policy.score(batch)).all()
        losses.append(policy.backward(batch, mean_loss)[0])
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16(snapshot):
    "16-bit weights score close to 32-bit ones and learn at a rate that would round to nothing without float32 copies."
    batch = make_batch()
    wide, narrow = open_policy(snapshot()), open_policy(snapshot(), dtype="bfloat16")
    assert narrow._dtype == mx.bfloat16 and narrow.score(batch).dtype == np.float32
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

def test_fresh_adapters(snapshot):
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
    with pytest.raises(ModelError, match="no linear layer 'wq'.*it has .*q_proj"):
        open_policy(folder, lora=LoRA(targets=("wq",)))
    with pytest.raises(ModelError, match="lm_head"):
        open_policy(snapshot(tied=True), lora=LoRA(targets=("lm_head",)))


@pytest.mark.parametrize("dora", [False, True])
def test_fused_equals_adapted(snapshot, tmp_path, dora):
    "Fusing keeps scores and greedy text, and the saved snapshot says the same in both plain libraries."
    policy, batch = open_policy(snapshot("qwen2"), lora=LoRA(rank=4, dora=dora, targets=("q_proj", "up_proj"))), make_batch()
    for _ in range(5):
        policy.backward(batch, mean_loss)
        policy.step(3e-2)
    scores, text = policy.score(batch), policy.generate(PROMPTS, temperature=0, max_tokens=8)
    policy.fuse()
    assert policy.lora is None and np.abs(policy.score(batch) - scores).max() <= 1e-4
    assert [c[0].ids for c in policy.generate(PROMPTS, temperature=0, max_tokens=8)] == [c[0].ids for c in text]
    folder = policy.save(tmp_path / "fused")
    for library in ("transformers", "mlx_lm"):
        assert np.abs(plain_logps(folder, batch, library) - scores).max() <= 1e-4
    policy.backward(batch, mean_loss)  # all weights train now
    assert len(policy.gradients()) > 10 and policy.step(1e-3) > 0


@pytest.mark.parametrize("dora", [False, True])
def test_saved_adapter_comes_back(snapshot, tmp_path, dora):
    policy, batch = open_policy(snapshot(), lora=LoRA(rank=2, dora=dora)), make_batch()
    policy.backward(batch, mean_loss)
    policy.step(0.1)
    for layout in ("peft", "mlx"):
        again = open_policy(snapshot(), adapter=policy.save(tmp_path / layout, layout))
        assert again.lora == policy.lora
        assert (again.score(batch) == policy.score(batch)).all()
    with pytest.raises(ModelError, match="the layer maps"):
        open_policy(make_snapshot(tmp_path / "other", width=64), adapter=tmp_path / "peft")


def test_reference(snapshot):
    "With adapters the reference is the base model, DoRA's too; without, a copy that later steps don't touch."
    batch = make_batch()
    for lora in (None, LoRA(rank=2), LoRA(rank=2, dora=True)):
        policy = open_policy(snapshot(), lora=lora)
        start = open_policy(snapshot()).score(batch)
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
def test_saved_snapshot_loads_in_plain_libraries(snapshot, tmp_path, family):
    "A fully trained model, saved, gives the same scores in transformers and mlx_lm, with the same tokenizer."
    policy, batch = open_policy(snapshot(family)), make_batch()
    policy.backward(batch, mean_loss)
    policy.step(1e-2)
    folder, scores = policy.save(tmp_path / "out"), policy.score(batch)
    assert np.abs(plain_logps(folder, batch) - scores).max() <= 1e-4
    tolerance = 5e-3 if family == "gemma" else 1e-4  # mlx-lm has the exact GELU where Gemma wants the tanh form
    assert np.abs(plain_logps(folder, batch, "mlx_lm") - scores).max() <= tolerance
    assert (open_policy(folder).score(batch) == scores).all()
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(folder).chat_template == policy.tokenizer.chat_template
    assert not list(folder.glob("*.bin")) and not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_rotary_base_where_transformers_5_writes_it(snapshot, tmp_path):
    "A snapshot with rope_parameters alone scores the same, and is saved so that plain mlx_lm reads it right."
    folder, batch = shutil.copytree(snapshot(), tmp_path / "new"), make_batch()
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config.pop("rope_theta") != 10_000
    (folder / "config.json").write_text(json.dumps(config))
    policy = open_policy(folder)
    assert np.abs(policy.score(batch) - plain_logps(folder, batch)).max() <= 1e-4
    assert np.abs(plain_logps(policy.save(tmp_path / "out"), batch, "mlx_lm") - policy.score(batch)).max() <= 1e-4


def test_chat_template_set_by_hand_is_saved(snapshot, tmp_path):
    from transformers import AutoTokenizer
    policy = open_policy(snapshot(chat=False))
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert AutoTokenizer.from_pretrained(policy.save(tmp_path / "out")).chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dropout=0.3), LoRA(rank=2, dora=True)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_round_trip(snapshot, tmp_path, lora, dtype):
    "Six steps in one go, or three, saved, read by a fresh policy, and three more: within 1e-6."
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
    second.load_state(tmp_path / "state")
    steps(second, range(3, 6))
    found = weights(second)
    assert all(np.abs(found[k] - w).max() <= 1e-6 for k, w in weights(whole).items())


def test_bad_states_are_refused(snapshot, tmp_path):
    policy = open_policy(snapshot(), lora=2)
    policy.backward(make_batch(), mean_loss)
    policy.step(1e-3)
    policy.save_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="other adapters"):
        open_policy(snapshot(), lora=4).load_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        policy.load_state(tmp_path / "nothing")
    for name in ("weights", "optimizer"):
        file = tmp_path / "state" / f"{name}.safetensors"
        whole = file.read_bytes()
        for keep in (len(whole) - 10, 100, 4, 0):
            file.write_bytes(whole[:keep])
            with pytest.raises(CheckpointError, match="missing or damaged"):
                policy.load_state(tmp_path / "state")
        file.write_bytes(whole)
    policy.load_state(tmp_path / "state")


@pytest.mark.parametrize("lora", [None, 2])
def test_a_folder_that_cannot_be_written(snapshot, tmp_path, lora):
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


def test_bad_snapshots(snapshot, tmp_path):
    "A missing weight, a cut file, an unknown architecture: refused with the folder's name, and no code is run."
    def copy(name): return shutil.copytree(snapshot(), tmp_path / name)
    holes = copy("holes")
    arrays = mx.load(str(holes / "model.safetensors"))
    mx.eval(arrays)
    del arrays["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(holes / "model.safetensors"), arrays)
    with pytest.raises(ModelError, match="(?s)holes.*model.layers.1.mlp.up_proj.weight"):
        open_policy(holes)
    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut"):
        open_policy(cut.parent)
    strange = copy("strange")
    config = json.loads((strange / "config.json").read_text()) | {"model_file": "code.py"}
    (strange / "config.json").write_text(json.dumps(config))
    (strange / "code.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ModelError, match="strange"):
        open_policy(strange)


def test_close(snapshot):
    policy = open_policy(snapshot(), lora=2)
    policy.close()
    assert policy._model is None
