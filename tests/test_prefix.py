"A common prefix read once gives the log-probabilities and gradients of separate rows, on every family and backend."

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_policy import change_config, weights
from toys import mean_loss

from snapshots import KINDS, plain_logps

torch = pytest.importorskip("torch")  # which makes the snapshots

from realign_core.engine import batching  # noqa: E402
from realign_core.engine.batching import shared_prefixes, worth_sharing  # noqa: E402
from realign_core.engine.policy import Batch, LoRA, load  # noqa: E402
from realign_core.methods import dpo, reward  # noqa: E402


@pytest.fixture
def open_policy(backend):
    return lambda folder, **kwargs: load(folder, backend, threads=1, **kwargs)


def make_groups(prompts=(9, 5, 7), group=2, seed=0, answers=(2, 8), start=()):
    "Groups of right-padded rows: a prompt of so many tokens, then answers, which are the targets and begin with `start`."
    rng = np.random.default_rng(seed)
    rows = []
    for length in prompts:
        prompt = rng.integers(6, 300, length)
        rows += [(length, [*prompt, *start, *rng.integers(6, 300, rng.integers(*answers))]) for _ in range(group)]
    width = max(len(row) for _, row in rows) + 2
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, (length, row) in enumerate(rows):
        ids[i, :len(row)], mask[i, length:len(row)] = row, True
    ref = -np.abs(rng.standard_normal(ids.shape)).astype(np.float32) * mask * 6
    return Batch(ids, mask, extras={"ref_logps": ref}, group=group, rows=tuple(range(1, len(prompts) + 1)))


def both_ways(policy, batch, objective=mean_loss):
    "Scores and gradients of separate rows, and with prefixes read once."
    assert policy.can_share
    found = []
    for policy.share in (False, True):
        loss, _ = policy.backward(batch, objective)
        found.append((policy.score(batch), loss, policy.gradients()))
        policy.step(0.0)
    return found


def assert_same(policy, batch, objective=mean_loss):
    (scores, loss, gradients), (shared, shared_loss, shared_gradients) = both_ways(policy, batch, objective)
    assert np.abs(shared - scores).max() <= 1e-5 and (shared[~batch.mask] == 0).all()
    assert shared_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert shared_gradients.keys() == gradients.keys()
    largest = max(1.0, *(np.abs(g).max() for g in gradients.values()))
    for name, gradient in gradients.items():
        assert np.abs(shared_gradients[name] - gradient).max() <= 1e-5 * largest, name
    assert any(np.abs(g).max() > 1e-4 for g in gradients.values())


# --- what is shared --------------------------------------------------------------------------------------------------

def naive_prefix(rows, masks):
    "Token by token."
    length = 0
    while length < rows.shape[1] and len(set(rows[:, length])) == 1 and not masks[:, :length + 1].any():
        length += 1
    return length


@pytest.mark.parametrize("seed", range(20))
def test_every_token_that_is_needed_has_a_place(seed):
    "On batches with few different ids, so that answers often go on alike, and with rows that have no targets."
    rng = np.random.default_rng(seed)
    group, rows, width = int(rng.integers(1, 5)), 12, int(rng.integers(3, 14))
    group = next(g for g in (group, 3, 2, 1) if rows % g == 0)
    ids = rng.integers(0, 2, (rows, width)).astype(np.int32)
    mask = np.arange(width) >= rng.integers(1, width, rows)[:, None]
    mask &= (np.arange(width) < rng.integers(2, width + 1, rows)[:, None]) & (rng.random(rows) < 0.9)[:, None]
    shared = shared_prefixes(Batch(ids, mask, group=group))
    flat = shared.flat(ids[:, :shared.place.shape[1]])
    for row, column in zip(*np.nonzero(mask), strict=True):
        path = shared.place[row, :column]  # all that the target is predicted from, in order
        assert (flat[path] == ids[row, :column]).all() and len(set(path)) == column
    for g, prefix in enumerate(shared.prefix):
        part = slice(g * group, (g + 1) * group)
        if mask[part].any() and mask[part].any(1).all():
            assert prefix == (naive_prefix(ids[part], mask[part]) if group > 1 else 0)
        assert group == 1 or len({tuple(p[:prefix]) for p in shared.place[part]}) == 1
    assert len(flat) == shared.prefix.sum() + shared.own.sum() <= max(1, shared.place.size)


def test_when_it_pays():
    "By the share of positions saved; never for packed rows, nor without targets, nor where it is switched off."
    long, short = make_groups((30, 30)), make_groups((1, 1), answers=(8, 9))
    assert worth_sharing(long, None).saved() > 0.3 and worth_sharing(short, None) is None
    assert worth_sharing(short, True) is not None and worth_sharing(long, False) is None
    assert worth_sharing(replace(long, mask=long.mask & False), True) is None
    assert worth_sharing(replace(long, segments=np.ones_like(long.ids), positions=long.ids), True) is None
    single = make_groups((6, 6), group=1, answers=(4, 5))
    assert worth_sharing(single, True, padded=True) is None  # nothing in common, nothing padded


# --- the same numbers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["full", "lora"])
@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_families(open_policy, snapshot, family, tied, how):
    "Prompts of different lengths, against separate rows and against plain transformers."
    targets = ("qkv_proj", "down_proj") if family == "phi3" else ("q_proj", "v_proj", "down_proj")
    folder, batch = snapshot(family, tied), make_groups()
    policy = open_policy(folder, lora=None if how == "full" else LoRA(rank=2, targets=targets))
    policy.freeze_reference()
    policy.backward(batch, mean_loss)
    policy.step(1e-2)
    assert_same(policy, batch)
    assert_same(policy, batch, partial(dpo.objective, beta=0.5))
    policy.share = True
    assert np.abs(policy.score(batch, reference=True) - plain_logps(folder, batch)).max() <= 1e-4


CASES = {
    "same length": dict(prompts=(7, 7)),
    "one pair": dict(prompts=(11,)),
    "answers begin alike": dict(start=(20, 21)),
    "answers of one token": dict(answers=(1, 2)),
    "prompt of one token": dict(prompts=(1, 1)),
    "groups of four": dict(group=4),
    "groups of one": dict(group=1),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_of_batches(open_policy, snapshot, case):
    for settings in ({}, {"lora": LoRA(rank=2, targets=("k_proj", "v_proj", "lm_head"))}):
        assert_same(open_policy(snapshot(), **settings), make_groups(**CASES[case]))


def test_prefixes_that_end_early(open_policy, snapshot):
    "Nothing in common in one group or in all; a target inside the prompt; a row without targets; targets with gaps."
    policy, batch = open_policy(snapshot()), make_groups()
    apart = replace(batch, ids=batch.ids.copy())
    apart.ids[0, 0] += 1
    assert shared_prefixes(apart).prefix.tolist() == [0, 5, 7]
    assert_same(policy, apart)
    apart.ids[[2, 4], 0] += 1
    assert shared_prefixes(apart).prefix.sum() == 0
    assert_same(policy, apart)
    early = replace(batch, mask=batch.mask.copy())
    early.mask[2, 2] = True
    assert shared_prefixes(early).prefix.tolist() == [9, 2, 7]
    assert_same(policy, early)
    early.mask[4] = False
    early.mask[1, 10] = False
    assert_same(policy, early)
    policy.share = True
    assert (policy.score(replace(batch, mask=batch.mask & False)) == 0).all()


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("sliding", [3, 6])
def test_sliding_windows(backend, open_policy, snapshot, tmp_path, family, sliding):
    "Shorter than prompts and answers, in all layers or in some."
    if family == "gemma3_text":
        from transformers import AutoModelForCausalLM, Gemma3TextConfig

        from snapshots import make_tokenizer
        torch.manual_seed(0)
        folder = tmp_path / "sliding"
        AutoModelForCausalLM.from_config(Gemma3TextConfig(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=sliding, initializer_range=0.2,
            layer_types=["sliding_attention", "full_attention"])).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        change = {"sliding_window_pattern": 2}
        folder = change_config(folder, tmp_path / "changed", **change) if backend == "mlx" else folder
    elif family == "qwen2":
        if backend == "mlx":
            pytest.skip("mlx-lm's Qwen 2 has no sliding window")
        folder = change_config(snapshot(family), tmp_path / "sliding", use_sliding_window=True, sliding_window=sliding,
                               max_window_layers=1, layer_types=["full_attention", "sliding_attention"])
    else:
        folder = change_config(snapshot(family), tmp_path / "sliding", sliding_window=sliding)
    policy, batch = open_policy(folder), make_groups(prompts=(12, 5), answers=(4, 9))
    assert_same(policy, batch)
    policy.share = True
    if family != "gemma3_text" or backend == "torch":
        assert np.abs(policy.score(batch) - plain_logps(folder, batch)).max() <= 1e-4


def test_what_cannot_share_does_not(open_policy, snapshot, monkeypatch):
    "When a trial on loading goes wrong: separate rows whatever is asked for, and the policy says so."
    plain = shared_prefixes
    def too_long(batch): return replace(plain(batch), prefix=plain(batch).prefix + 1)
    with monkeypatch.context() as patch:
        patch.setattr(batching, "shared_prefixes", too_long)
        policy = open_policy(snapshot())
    assert not policy.can_share and policy.share is None
    policy.share, batch = True, make_groups()
    assert np.abs(policy.score(batch) - plain_logps(snapshot(), batch)).max() <= 1e-4


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe"])
def test_torch_families_that_cannot_share(tmp_path, family):
    "Soft-capped attention, and a sliding window that the attention is not told of."
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2MoeConfig

    from snapshots import make_tokenizer
    sizes = dict(vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, sliding_window=6)
    config = (Gemma2Config(**sizes, head_dim=8) if family == "gemma2" else Qwen2MoeConfig(
        **sizes, use_sliding_window=True, max_window_layers=1, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy, batch = load(tmp_path, "torch", threads=1), make_groups(prompts=(12, 5))
    assert not policy.can_share
    policy.share = True
    assert np.abs(policy.score(batch) - plain_logps(tmp_path, batch)).max() <= 1e-4


# --- inside training -------------------------------------------------------------------------------------------------

def test_micro_batches(open_policy, snapshot):
    "The gradient of three pairs is that of two and one, weighted."
    policy, batch = open_policy(snapshot(), lora=2), make_groups()
    policy.share = True
    policy.backward(batch, mean_loss)
    whole = policy.gradients()
    policy.step(0.0)
    for cut in (slice(0, 4), slice(4, 6)):
        part = replace(batch, ids=batch.ids[cut], mask=batch.mask[cut], extras={})
        policy.backward(part, mean_loss, part.targets / batch.targets)
    assert all(np.abs(g - whole[name]).max() <= 1e-5 for name, g in policy.gradients().items())


def test_chunks(backend, open_policy, snapshot, monkeypatch):
    "Three targets at a time, with a head that is trained, tied, adapted or frozen."
    for tied, lora in ((False, None), (True, None), (False, 2), (False, LoRA(rank=2, targets=("q_proj", "lm_head")))):
        policy, batch = open_policy(snapshot(tied=tied), lora=lora), make_groups()
        policy.share = True
        policy.backward(batch, mean_loss)
        scores, wanted = policy.score(batch), policy.gradients()
        policy.step(0.0)
        with monkeypatch.context() as patch:
            patch.setattr(f"realign_core.engine.{backend}_policy.CHUNK_BYTES", 3 * 4 * 384)
            policy.backward(batch, mean_loss)
            assert np.abs(policy.score(batch) - scores).max() <= 1e-5
        assert all(np.abs(g - wanted[name]).max() <= 1e-5 for name, g in policy.gradients().items())


def test_entropy_and_dora(open_policy, snapshot):
    policy, batch = open_policy(snapshot(), lora=LoRA(rank=2, dora=True)), make_groups()
    policy.backward(batch, mean_loss)
    policy.step(1e-2)
    assert_same(policy, batch)
    policy.share = False
    entropy = policy.entropy(batch)
    policy.share = True
    assert np.abs(policy.entropy(batch) - entropy).max() <= 1e-5


def test_dropout_is_seeded(backend, open_policy, snapshot):
    "The same seed gives the same bits (on MLX 1e-6), another seed or the next step does not; scoring has none."
    def gradients(seed, steps=1):
        policy = open_policy(snapshot(), lora=LoRA(rank=2, dropout=0.5), seed=seed)
        policy.share = True
        for _ in range(steps):
            policy.step(0.0) if _ else None
            policy.backward(batch, mean_loss)
        return np.concatenate([g.ravel() for _, g in sorted(policy.gradients().items())])
    batch = make_groups()
    first = gradients(0)
    assert np.abs(gradients(0) - first).max() <= (0 if backend == "torch" else 1e-6)
    assert np.abs(gradients(0, 2) - first).max() > 1e-4
    policy = open_policy(snapshot(), lora=LoRA(rank=2, dropout=0.5))
    policy.share = True
    assert np.abs(policy.score(batch) - plain_logps(snapshot(), batch)).max() <= 1e-4


def test_training_goes_the_same_way(open_policy, snapshot):
    "Ten steps of DPO with prefixes read once and with separate rows."
    ends = []
    for share in (False, True):
        policy = open_policy(snapshot(), lora=LoRA(rank=2))
        policy.share = share
        for step in range(10):
            policy.backward(make_groups(seed=step % 3), partial(dpo.objective, beta=0.5))
            policy.step(1e-3, max_norm=1.0)
        ends.append(weights(policy))
    assert all(np.abs(ends[1][name] - w).max() <= 1e-4 for name, w in ends[0].items())


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("prompts", [(9, 5, 7), (30, 30, 30)])
def test_rewards_are_the_same(open_policy, snapshot, lora, prompts):
    policy = open_policy(snapshot(), head="reward", lora=lora)
    batch = replace(make_groups(prompts), extras={"margin": np.ones(3, np.float32)})
    assert worth_sharing(batch, None) is not None
    assert_same(policy, batch, reward.method().objective)


def test_a_row_that_fills_the_window_has_a_reward(open_policy, tiny_window):
    policy = open_policy(tiny_window, head="reward")
    batch = make_groups((policy.max_length - 3,), answers=(3, 4))
    batch = Batch(batch.ids[:, :policy.max_length], batch.mask[:, :policy.max_length], group=2)
    assert np.isfinite(policy.score(batch)).all() and (policy.score(batch) != 0).sum() == 2


@pytest.fixture
def tiny_window(snapshot, tmp_path):
    return change_config(snapshot(), tmp_path / "window", max_position_embeddings=32)
