"What only TorchPolicy can show; what it shares with every policy is in test_policy.py."

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from toys import make_batch, mean_loss

from snapshots import KINDS

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from realign_core.engine.policy import AdamW, Batch, LoRA, load  # noqa: E402
from realign_core.engine.torch_policy import Head  # noqa: E402
from realign_core.errors import ModelError  # noqa: E402

torch.set_num_threads(1)


def open_policy(folder, **kwargs):
    return load(folder, "torch", threads=1, **kwargs)


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_greedy_text_is_what_transformers_writes(snapshot, family, tied):
    "With adapters that are no longer zero, and prompts of different lengths."
    targets = ("qkv_proj", "down_proj") if family == "phi3" else ("q_proj", "down_proj")
    policy = open_policy(snapshot(family, tied), lora=LoRA(rank=2, targets=targets))
    policy.backward(make_batch(), mean_loss)
    policy.step(1e-2, max_norm=1.0)
    prompts = [[7, 8, 9], [30, 31, 32, 33, 34], [11]]
    for prompt, (completion,) in zip(prompts, policy.generate(prompts, max_tokens=8, temperature=0), strict=True):
        plain = policy.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                      max_new_tokens=8, do_sample=False, eos_token_id=list(policy.stops))
        assert list(completion.ids) == plain[0, len(prompt):].tolist()


def test_unknown_change_of_logits_is_refused(snapshot, monkeypatch):
    "When `score` and the model's own logits disagree, loading stops."
    from transformers import LlamaForCausalLM
    plain = LlamaForCausalLM.forward
    def forward(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 1.1
        return out
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match="not supported"):
        open_policy(snapshot())


def test_head_is_applied_to_targets_only(snapshot):
    policy, batch, seen = open_policy(snapshot()), make_batch(), []
    policy.head.linear.register_forward_hook(lambda _, args, out: seen.append(out.shape[0]))
    policy.score(batch)
    assert sum(seen) == batch.targets


def test_adapters_are_in_the_models_order(snapshot):
    "Whatever the order of the targets."
    policy = open_policy(snapshot("qwen3"), lora=LoRA(rank=3, targets=("model.layers.1.mlp.up_proj", "self_attn.q_proj")))
    assert list(policy._tensors()) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_adamw_is_the_textbook_one(snapshot):
    "Three steps against AdamW written out in NumPy float64 (arXiv 1711.05101)."
    policy, batch = open_policy(snapshot(), lora=LoRA(rank=2)), make_batch()
    policy.configure(AdamW(betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1))
    def weights(): return {k: p.detach().double().numpy().copy() for k, p in policy._trainable().items()}
    w = weights()
    m, v = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    for t in range(1, 4):
        policy.backward(batch, mean_loss)
        g = policy.gradients()
        policy.step(1e-2)
        for k in w:
            m[k], v[k] = 0.9 * m[k] + 0.1 * g[k], 0.99 * v[k] + 0.01 * g[k].astype(np.float64) ** 2
            w[k] = w[k] - 1e-2 * (m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.99**t)) + 1e-6) + 0.1 * w[k])
    assert all(np.abs(weights()[k] - w[k]).max() <= 1e-6 for k in w)


def test_autocast(snapshot):
    "Matrix products in bfloat16: scores move a little, gradients point the same way, weights and text stay float32's."
    batch, lora = make_batch(), LoRA(rank=2)
    plain, fewer = open_policy(snapshot(), lora=lora), open_policy(snapshot(), lora=lora, autocast="bfloat16")
    apart = np.abs(plain.score(batch) - fewer.score(batch)).max()
    assert 0 < apart < 0.2 and all(p.dtype == torch.float32 for p in fewer.model.parameters())
    gradients = []
    for policy in (plain, fewer):
        policy.backward(batch, mean_loss)
        gradients.append(np.concatenate([g.ravel() for g in policy.gradients().values()]))
    a, b = gradients
    assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b) and (a != b).any()
    texts = [policy.generate([[7, 8]], max_tokens=4)[0][0].ids for policy in (plain, fewer)]
    assert texts[0] == texts[1]
    for backend, kind in (("torch", "float16"), ("mlx", "bfloat16")):
        with pytest.raises(ModelError, match="autocast="):
            load(snapshot(), backend, autocast=kind)


def test_close_lets_go_of_the_model(snapshot):
    policy = open_policy(snapshot(), lora=2)
    policy.close()
    assert policy.model is None


def test_a_packed_head_is_the_same_head():
    "Only a large one, for few rows, is packed; a bias and what a family does behind the matrix are kept."
    def head(width, vocab, **settings):
        config = SimpleNamespace(vocab_size=vocab, get_text_config=lambda: SimpleNamespace(vocab_size=vocab, **settings))
        layer = torch.nn.Linear(width, vocab)
        return Head(SimpleNamespace(config=config, get_output_embeddings=lambda: layer))
    small, large = head(64, 512), head(128, 32768, final_logit_softcapping=30.0)
    assert small.packed(8) is small and large.packed(64) is large
    packed, hidden = large.packed(8), torch.randn(8, 128)
    with torch.no_grad():
        for rows in (8, 3, 1):
            assert (packed(hidden[:rows]) - large(hidden[:rows])).abs().max() <= 1e-4
    if torch.backends.mkldnn.is_available():
        assert packed is not large


def test_what_a_packed_head_samples_is_what_is_scored(snapshot):
    policy = load(snapshot(vocab=131072), "torch")
    prompt = [5, 6, 7]
    for completion in policy.generate([prompt], n=4, max_tokens=8, seed=1)[0]:
        row = np.array([[*prompt, *completion.ids]], np.int32)
        scored = policy.score(Batch(row, np.arange(row.shape[1])[None] >= len(prompt)))[0, len(prompt):]
        assert np.abs(scored - completion.logps).max() <= 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_writing_with_merged_adapters_changes_nothing_in_the_model(snapshot, dora):
    "And what is written has the log-probabilities that scoring gives it."
    policy = open_policy(snapshot(), lora=LoRA(rank=2, dora=dora))
    policy.backward(make_batch(), mean_loss)
    policy.step(3e-2)
    before = policy.score(make_batch())
    (completion,), = policy.generate([[5, 6, 7]], max_tokens=8)
    assert (policy.score(make_batch()) == before).all()
    assert not any("forward" in vars(layer) for layer in policy._layers.values())
    ids = np.array([[5, 6, 7, *completion.ids]], np.int32)
    assert np.abs(policy.score(Batch(ids, np.arange(ids.shape[1])[None] > 2))[0, 3:] - completion.logps).max() < 1e-4


def test_merging_is_left_where_the_copies_are_too_large_or_would_be_rounded(snapshot):
    from realign_core.engine.torch_policy import merged
    policy = open_policy(snapshot(), lora=LoRA(rank=2))
    with merged(policy._layers):
        assert all("forward" in vars(layer) for layer in policy._layers.values())
    with merged(policy._layers, most=1):
        assert not any("forward" in vars(layer) for layer in policy._layers.values())
    with merged(open_policy(snapshot(), lora=LoRA(rank=2), dtype="bfloat16")._layers):
        assert not any("forward" in vars(layer) for layer in policy._layers.values())


def test_dropped_rows_leave_the_buffers_of_the_others_as_they_are():
    from transformers.cache_utils import DynamicLayer

    from realign_core.engine.torch_policy import append, select
    ours, plain = DynamicLayer(), DynamicLayer()
    for step, rows in enumerate([4, 4, 2, 2]):
        new = torch.randn(rows, 2, 3, 5)
        plain.update(new, new + 1)
        if step:
            append(ours, new, new + 1)
        else:
            ours.update(new, new + 1)
        if step == 1:
            keep = torch.tensor([0, 3])
            select(ours, keep)
            plain.batch_select_indices(keep)
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_plain_blocks_are_the_models_own(snapshot, family):
    "Padding, grouped heads, biases, dropped rows, a buffer that grows: token for token what the modules give."
    from realign_core.engine import torch_policy as module
    policy = open_policy(snapshot(family), lora=LoRA(rank=2, targets=("q_proj", "o_proj", "up_proj")), dtype="float32")
    with torch.no_grad():
        for p in policy._trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    prompts, found = [[1, 30, 31, 32], [1, 40], [1, 30, 31, 32]], []
    with torch.no_grad(), module.merged(policy._layers):
        for kind in (module.Blocks, module.Modules):
            cache, attend, _ = module.prefill(policy.model, prompts)
            assert module.Blocks.fit(policy.model, cache)
            further, positions, states = kind(policy.model, cache), attend.sum(-1), []
            for step in range(module.ROOM + 3):
                if step == 2:
                    further.select(torch.tensor([1, 2]))
                    attend, positions = attend[1:], positions[1:]
                attend = torch.nn.functional.pad(attend, (0, 1), value=1)
                states.append(further(torch.arange(50, 50 + len(attend)) + step % 7, positions, attend))
                positions = positions + 1
            found.append(torch.cat(states))
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()


def test_what_hangs_on_a_module_is_heeded_while_writing(snapshot):
    "Hooks, DoRA and other families go through the modules."
    from realign_core.engine import torch_policy as module
    policy = open_policy(snapshot("llama"))
    calls, plain = [], policy.generate([[1, 30, 31]], max_tokens=6, temperature=0.0)
    hook = policy.model.base_model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    assert policy.generate([[1, 30, 31]], max_tokens=6, temperature=0.0)[0][0].ids == plain[0][0].ids
    assert len(calls) == len(plain[0][0].ids)
    hook.remove()
    for other in (open_policy(snapshot("llama"), lora=LoRA(rank=2, dora=True)), open_policy(snapshot("gemma"))):
        with module.merged(other._layers):
            assert not module.Blocks.fit(other.model, module.prefill(other.model, [[1, 30]])[0])


def test_a_module_that_stands_in_is_the_real_one_when_it_is_needed():
    "Loading a policy leaves SciPy's optimisers out; whoever calls one gets it."
    pytest.importorskip("scipy")
    code = ("import sys; from realign_core import load; load('tinyworld-instruct', 'torch')\n"
            "from transformers.loss.loss_for_object_detection import linear_sum_assignment as f\n"
            "assert 'scipy.optimize' not in sys.modules; print(f([[2, 1], [1, 3]])[1].tolist(), 'scipy.optimize' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[-2] == "[1, 0] True", done.stderr[-500:]
