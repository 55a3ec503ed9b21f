"A direction taken out of the stream while the model runs, and out of its weights, is the same function."

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from test_interventions import make_batch, vector

from snapshots import KINDS

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from realign_core.engine.adapters import read_safetensors  # noqa: E402
from realign_core.engine.policy import load  # noqa: E402
from realign_core.errors import BackendError, DataError, ModelError  # noqa: E402
from realign_core.evaluate.metrics import kl  # noqa: E402
from realign_core.methods import abliteration as ab  # noqa: E402


@pytest.fixture
def open_policy(backend):
    return lambda folder, **kwargs: load(folder, backend, threads=1, **kwargs)


STRENGTHS = {"whole": {}, "by layer": {"embedding": 0.0, "attention": (1.0, 0.4), "mlp": (0.0, 1.3)}}


@pytest.mark.seconds(20)
@pytest.mark.parametrize("strengths", STRENGTHS)
@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_runtime_and_weights_agree_on_both_frameworks(snapshot, tmp_path, backend, family, tied, strengths):
    "Written by one framework, read by both."
    settings, batch = STRENGTHS[strengths] | ({"embedding": 0.0} if family == "gemma" else {}), make_batch()
    policy, d = load(snapshot(family, tied), backend, threads=1), vector(3, 2)
    with policy.intervene(*ab.ablation(d, 2, **settings)):
        wanted, states = policy.score(batch), policy.hidden_states(batch)
    assert np.abs(wanted - policy.score(batch)).max() > 1e-2
    folder = ab.write(policy, d, tmp_path / "model", **settings)
    for name in ("torch", "mlx"):
        other = load(folder, name, threads=1)
        assert np.abs(other.score(batch) - wanted).max() <= 1e-4
        assert np.abs(other.hidden_states(batch) - states).max() <= 1e-4
    if not settings.get("embedding", 1.0) == 0.0:
        assert np.abs(states @ d.T).max() <= 1e-4  # nothing is left of it anywhere


def whole(policy, ids):
    "All logits (T, V) of one sequence, by the framework's own call of the model."
    if policy.backend == "torch":
        return policy.model(torch.tensor(ids)[None]).logits[0].detach().numpy()
    import mlx.core as mx
    return np.array(policy._model(mx.array(ids)[None])[0].astype(mx.float32))


IDS = np.random.default_rng(3).integers(6, 300, 24)


@pytest.mark.seconds(10)
@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_whole_logits_agree(snapshot, tmp_path, backend, family, tied):
    "Every token and every entry of the vocabulary: at run time, as a snapshot, as an adapter of either layout; both frameworks."
    policy, d = load(snapshot(family, tied), backend, threads=1), vector(3, 2)
    settings = {"attention": (1.0, 0.4), "mlp": (0.0, 1.3)}
    with policy.intervene(*ab.ablation(d, 2, 0.0, **settings)):
        wanted = whole(policy, IDS)
    assert np.abs(wanted - whole(policy, IDS)).max() > 1e-2
    folder = ab.write(policy, d, tmp_path / "m", embedding=0.0, **settings)
    adapters = [ab.write_lora(policy, d, tmp_path / layout, layout=layout, **settings) for layout in ("peft", "mlx")]
    for name in ("torch", "mlx"):
        close = 1e-4 if name == backend else 1e-3
        assert np.abs(whole(load(folder, name, threads=1), IDS) - wanted).max() <= close
        for adapter in adapters:
            assert np.abs(whole(load(snapshot(family, tied), name, adapter=adapter, threads=1), IDS) - wanted).max() <= close


def test_whole_logits_of_the_shipped_model_agree(tmp_path, open_policy):
    policy, d = open_policy("tinyworld-instruct"), vector(1, width=128)
    with policy.intervene(*ab.ablation(d, 4)):
        wanted = whole(policy, IDS)
    folder = ab.write(policy, d, tmp_path / "m")
    for name in ("torch", "mlx"):
        assert np.abs(whole(load(folder, name, threads=1), IDS) - wanted).max() <= (1e-4 if name == policy.backend else 1e-3)


def test_an_adapter_has_the_rank_of_the_directions(snapshot, tmp_path, open_policy):
    from realign_core.engine.adapters import read_adapter
    policy = open_policy(snapshot())
    lora, tensors = read_adapter(ab.write_lora(policy, vector(3, 3), tmp_path / "a", attention=0.0))
    assert (lora.rank, lora.scale) == (3, 1.0)
    assert list(tensors) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(snapshot()), tmp_path / "a").eval()
    with policy.intervene(*ab.ablation(vector(3, 3), 2, 0.0, 0.0)):
        assert np.abs(model(torch.tensor(IDS)[None]).logits[0].detach().numpy() - whole(policy, IDS)).max() <= 1e-3


def test_what_an_adapter_cannot_hold(snapshot, tmp_path, open_policy):
    policy = open_policy(snapshot())
    with pytest.raises(ModelError, match="nothing would be taken out"):
        ab.write_lora(policy, vector(), tmp_path / "a", attention=0.0, mlp=0.0)
    with pytest.raises(ModelError, match="width 32"):
        ab.write_lora(policy, np.ones(31), tmp_path / "a")
    with pytest.raises(ModelError, match="fuse"):
        ab.write_lora(open_policy(snapshot(), lora=2), np.ones(32), tmp_path / "a")
    with pytest.raises(ModelError, match="layout"):
        ab.write_lora(policy, vector(), tmp_path / "a", layout="gguf")
    assert not (tmp_path / "a").exists()


def test_a_bias_that_writes_to_the_stream_has_no_room_in_an_adapter(snapshot, tmp_path, open_policy, monkeypatch):
    policy, saved = open_policy(snapshot()), ab._saved
    def with_bias(policy, folder):
        files = saved(policy, folder)
        entries = next(iter(files.values()))
        entries["model.layers.0.mlp.down_proj.bias"] = {"dtype": "F32", "shape": [32], "data": bytes(128)}
        return files
    monkeypatch.setattr(ab, "_saved", with_bias)
    with pytest.raises(ModelError, match=r"down_proj\.bias"):
        ab.write_lora(policy, vector(), tmp_path / "a")


def test_search_finds_strengths_that_pass(open_policy):
    pytest.importorskip("optuna", reason="Optuna is not installed")
    policy, d = open_policy("tinyworld-instruct"), vector(1, width=128)
    args = (policy, d, ["What is 7 + 5?"], ["What is 12 + 30?", "Name the colour of the bird."], ["I cannot help with that."])
    strengths, rows = ab.search(*args, trials=6, max_kl=9.0)
    assert len(rows) == 6 and [len(strengths[k]) for k in ("attention", "mlp")] == [4, 4]
    assert rows == ab.search(*args, trials=6, max_kl=9.0)[1]
    ab.ablation(d, 4, **strengths)
    with pytest.raises(ModelError, match="none of 2 trials"):
        ab.search(*args, trials=2, max_kl=-1.0)


def test_search_says_what_it_needs(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BackendError, match="pip install"):
        ab.search(None, None, [], [], [])


def test_one_matrix_for_embedding_and_output_is_untied(snapshot, tmp_path, open_policy):
    policy = open_policy(snapshot("llama", True))
    folder = ab.write(policy, vector(), tmp_path / "m")
    arrays = read_safetensors(next(folder.glob("*.safetensors")))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    before = read_safetensors(snapshot("llama", True) / "model.safetensors")["model.embed_tokens.weight"]
    assert (arrays["lm_head.weight"] == before).all()
    assert np.abs(arrays["model.embed_tokens.weight"] @ vector()).max() <= 1e-5
    with pytest.raises(ModelError, match="embedding=0"):
        ab.write(open_policy(snapshot("gemma", True)), vector(), tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_untouched_weights_keep_every_bit_in_bfloat16(snapshot, tmp_path, open_policy):
    policy = open_policy(snapshot(), dtype="bfloat16")
    plain = read_safetensors(next(policy.save(tmp_path / "plain").glob("*.safetensors")))
    folder = ab.write(policy, vector(), tmp_path / "m")
    made = read_safetensors(next(folder.glob("*.safetensors")))
    changed = {name for name in plain if (made[name] != plain[name]).any()}
    assert changed == {n for n in plain if n.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight"))}
    for name in changed:  # as torch rounds
        exact = ab.orthogonalise(plain[name], vector(), axis=1 if "embed" in name else 0)
        assert (torch.tensor(exact).bfloat16().float().numpy() == made[name]).all()
    assert json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16") == "bfloat16"
    load(folder, "torch", dtype="bfloat16")


def test_lengths_are_kept(snapshot, tmp_path, open_policy):
    folder = ab.write(open_policy(snapshot()), vector(), tmp_path / "m", preserve=True)
    before, after = read_safetensors(snapshot() / "model.safetensors"), read_safetensors(next(folder.glob("*.safetensors")))
    for name in before:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert np.allclose(np.linalg.norm(before[name], axis=0), np.linalg.norm(after[name], axis=0), rtol=1e-4)
            assert np.abs(vector() @ after[name]).max() <= 1e-5
            assert np.abs(before[name] - after[name]).max() > 1e-3


def test_drift_is_what_the_library_measures(tmp_path, open_policy):
    "The sampled KL with interventions equals that of the written snapshot to its reference."
    policy, d = open_policy("tinyworld-instruct"), vector(1, width=128)
    prompts = ["What is 12 + 30?", "Name the colour of the bird.", "What is 7 + 5?"]
    inside = ab.drift(policy, prompts, ab.ablation(d, 4), max_tokens=12, seed=2)
    other = load(ab.write(policy, d, tmp_path / "m"), policy.backend, threads=1)
    outside = kl(other, prompts, reference=policy, max_tokens=12, seed=2)
    assert inside.value == pytest.approx(outside.k3.value, rel=1e-3, abs=1e-6) and inside.value > 0


def test_states_do_not_depend_on_the_batch(open_policy):
    policy, prompts = open_policy("tinyworld-instruct"), ["What is 12 + 30?", "Hello.", "Name the colour of the bird now."]
    together, apart = ab.states(policy, prompts), np.concatenate([ab.states(policy, [p]) for p in prompts], axis=1)
    assert together.shape == (5, 3, 128)
    assert np.abs(together - apart).max() <= 1e-5 * np.abs(apart).max()  # entries of some tens: relative to the largest


def test_refusal_odds_are_the_probability_of_the_sentence(open_policy):
    policy = open_policy("tinyworld-instruct")
    odds = ab.refusal_odds(policy, ["What is 12 + 30?"], ["I cannot help with that.", "I do not know."])
    assert odds.shape == (1,) and odds[0] < -3


def test_strengths_of_each_layer():
    actions = ab.ablation(np.ones(4), 3, embedding=0, attention=(0.0, 1.0, 0.5), mlp=1.0)
    found = [(a.at, a.layers, a.scale) for a in actions]
    assert found == [("attention", (1,), 1.0), ("attention", (2,), 0.5), ("mlp", (0, 1, 2), 1.0)]
    for wrong in ({"attention": (1.0, 1.0)}, {"mlp": float("nan")}, {"embedding": 0, "attention": 0, "mlp": 0}):
        with pytest.raises(ModelError):
            ab.ablation(np.ones(4), 3, **wrong)


def test_bad_input(snapshot, tmp_path, open_policy):
    policy = open_policy(snapshot())
    with pytest.raises(DataError, match="no prompts"):
        ab.states(policy, [])
    with pytest.raises(ModelError, match="width 32"):
        ab.write(policy, np.ones(31), tmp_path / "m")
    with pytest.raises(ModelError, match="fuse"):
        ab.write(open_policy(snapshot(), lora=2), np.ones(32), tmp_path / "m")
    with pytest.raises(ModelError, match="no direction passes"):
        ab.select(policy, vector(1, 3), ["hi"], ["ho"], ["no"], max_kl=-1.0)
    assert not (tmp_path / "m").exists()


def test_a_family_that_normalises_what_it_writes_is_refused(snapshot, tmp_path):
    with pytest.raises(ModelError, match="bring the direction back"):
        ab._check_family(["model.layers.0.post_feedforward_layernorm.weight"], 1, {"model_type": "gemma2"}, 1.0)
    with pytest.raises(ModelError, match="gpt2.*found"):
        ab._check_family(["h.0.attn.c_proj.weight"], 1, {"model_type": "gpt2"}, 1.0)


def test_a_failed_write_leaves_nothing(snapshot, tmp_path, open_policy, monkeypatch):
    monkeypatch.setattr(ab, "_write_tensors", lambda *_: (_ for _ in ()).throw(OSError("full")))
    from realign_core.errors import OutputError
    with pytest.raises(OutputError):
        ab.write(open_policy(snapshot()), vector(), tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.iterdir())


def test_a_second_write_replaces_the_first(snapshot, tmp_path, open_policy):
    policy = open_policy(snapshot())
    first = ab.write(policy, vector(1), tmp_path / "m")
    shutil.copytree(first, tmp_path / "copy")
    ab.write(policy, vector(2), tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {p.name for p in (tmp_path / "copy").iterdir()}
