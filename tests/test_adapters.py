"Adapters: written, read and converted between PEFT's layout and mlx-lm's, and understood by both libraries."

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realign_core.engine.adapters import (
    convert_adapter,
    read_adapter,
    read_safetensors,
    staged_folder,
    write_adapter,
)
from realign_core.engine.policy import LoRA
from realign_core.errors import ModelError, OutputError
from snapshots import make_snapshot

BLOCKS, WIDTH = 3, 32
SHAPES = {"mlp.down_proj": (WIDTH, 2 * WIDTH), "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH // 2, WIDTH)}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return make_snapshot(tmp_path_factory.mktemp("adapters") / "llama", width=WIDTH, layers=BLOCKS)


def make_adapter(dora=False, blocks=range(BLOCKS), rank=3, bare=True):
    "Settings and random arrays; whole paths as targets unless every block has them."
    rng = np.random.default_rng(0)
    def draw(*shape): return rng.normal(0, 0.3, shape).astype(np.float32)
    tensors = {f"model.layers.{i}.{name}": (draw(rank, inputs), draw(outputs, rank), 1 + draw(outputs) ** 2 if dora else None)
               for i in blocks for name, (outputs, inputs) in SHAPES.items()}
    targets = ("q_proj", "v_proj", "down_proj") if bare else tuple(tensors)
    return LoRA(rank=rank, alpha=5.0, dropout=0.1, targets=targets, dora=dora), tensors


def same(one, two):
    "Equal settings and arrays?"
    (lora, tensors), (lora2, tensors2) = one, two
    assert lora == lora2 and list(tensors) == list(tensors2)
    for path, arrays in tensors.items():
        for a, b in zip(arrays, tensors2[path], strict=True):
            assert (a is None and b is None) or (a == b).all() and b.dtype == np.float32
    return True


@pytest.mark.parametrize("layout", ["peft", "mlx"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("blocks", [range(BLOCKS), [1, 2], [0]])
def test_round_trips(tmp_path, layout, dora, blocks):
    "Write and read either layout, and convert there and back: nothing changes."
    adapter = make_adapter(dora, blocks, bare=len(blocks) == BLOCKS)
    write_adapter(tmp_path / "one", layout, *adapter, "some/model")
    assert same(adapter, read_adapter(tmp_path / "one"))
    other = "mlx" if layout == "peft" else "peft"
    convert_adapter(tmp_path / "one", tmp_path / "two", other)
    convert_adapter(tmp_path / "two", tmp_path / "three", layout)
    assert same(adapter, read_adapter(tmp_path / "two")) and same(adapter, read_adapter(tmp_path / "three"))
    for name in (p.name for p in (tmp_path / "one").iterdir()):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert "some/model" in (tmp_path / "two" / "adapter_config.json").read_text()


def test_blocks_are_in_their_natural_order(tmp_path):
    "Layer 10 comes after layer 2, whatever order the file has."
    lora, tensors = make_adapter(blocks=range(12))
    write_adapter(tmp_path / "a", "peft", lora, tensors, "")
    assert list(read_adapter(tmp_path / "a")[1]) == [f"model.layers.{i}.{name}" for i in range(12) for name in SHAPES]


# --- the two libraries -----------------------------------------------------------------------------------------------

IDS = np.random.default_rng(1).integers(6, 300, (2, 11))


def peft_logits(snapshot, folder):
    "Logits of plain transformers with the adapter put in by peft, and the greedy continuation of the first row."
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(snapshot), folder).eval()
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        text = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False)
        return model(ids).logits.numpy(), text[0, ids.shape[1]:].tolist()


def mlx_logits(snapshot, folder):
    "The same from plain mlx_lm."
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    from mlx_lm.generate import generate_step
    model, tokenizer = mlx_lm.load(str(snapshot), adapter_path=None if folder is None else str(folder))
    text = [int(token) for token, _ in generate_step(mx.array(IDS[0]), model, max_tokens=8)]
    ends = [i for i, token in enumerate(text) if token in tokenizer.eos_token_ids]
    return np.array(model(mx.array(IDS))), text[: ends[0] + 1] if ends else text


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("blocks", [range(BLOCKS), [1, 2], [0]])
def test_both_libraries_load_what_we_write(tmp_path, snapshot, dora, blocks):
    "One adapter, either layout: peft and mlx_lm give the same logits and the same greedy text."
    adapter = make_adapter(dora, blocks, bare=len(blocks) == BLOCKS)
    write_adapter(tmp_path / "peft", "peft", *adapter, str(snapshot))
    convert_adapter(tmp_path / "peft", tmp_path / "mlx", "mlx")
    (logits, text), (logits2, text2) = peft_logits(snapshot, tmp_path / "peft"), mlx_logits(snapshot, tmp_path / "mlx")
    plain, _ = mlx_logits(snapshot, None)
    assert np.abs(logits - plain).max() > 0.1  # the adapter does something
    assert np.abs(logits - logits2).max() <= 1e-3 and text == text2


@pytest.mark.parametrize("dora", [False, True])
def test_we_load_what_peft_writes(tmp_path, snapshot, dora):
    "peft's own save, for all blocks, for some, and with rank-stabilised scaling."
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from realign_core.engine.policy import Batch, load
    for name, extra in {"all": {}, "some": {"layers_to_transform": [1]}, "stabilised": {"use_rslora": True}}.items():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=dora,
                                 init_lora_weights=False, task_type="CAUSAL_LM", **extra)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(snapshot), config).eval()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            logps = model(torch.from_numpy(IDS)).logits[:, :-1].log_softmax(-1)
        wanted = logps.gather(-1, torch.from_numpy(IDS)[:, 1:, None])[..., 0].numpy()
        for layout in ("peft", "mlx"):
            folder = convert_adapter(tmp_path / name, tmp_path / f"{name}-{layout}", layout)
            policy = load(snapshot, "torch", adapter=folder)
            found = policy.score(Batch(IDS.astype(np.int32), np.arange(IDS.shape[1])[None] + 0 * IDS > 0))
            assert np.abs(found[:, 1:] - wanted).max() <= 1e-4
            assert len(policy.lora.targets) == 2 and all("." in t for t in policy.lora.targets) == (name == "some")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("num_layers", [-1, 2])
def test_we_load_what_mlx_lm_writes(tmp_path, snapshot, dora, num_layers):
    "mlx-lm's own layers and files, for all blocks and for the last two."
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    model, _ = mlx_lm.load(str(snapshot))
    model.freeze()
    settings = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, num_layers, settings, use_dora=dora)
    mx.random.seed(0)
    changed = [(k, v + 0.1 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(changed, strict=False)
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    (folder / "adapter_config.json").write_text(json.dumps({
        "fine_tune_type": "dora" if dora else "lora", "num_layers": num_layers, "lora_parameters": settings, "model": "x"}))
    lora, tensors = read_adapter(folder)
    assert lora.rank == 2 and lora.scale == 3.0 and lora.dora == dora
    assert lora.targets == (("q_proj", "up_proj") if num_layers == -1 else tuple(tensors))
    logits, _ = peft_logits(snapshot, convert_adapter(folder, tmp_path / "peft", "peft"))
    assert np.abs(logits - np.array(model(mx.array(IDS)))).max() <= 1e-3


def test_sixteen_bit_arrays(tmp_path):
    "bfloat16 and float16 files are read as float32, exactly."
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(kind)
        save_torch({"x": x}, tmp_path / "x.safetensors")
        found = read_safetensors(tmp_path / "x.safetensors")["x"]
        assert found.dtype == np.float32 and (found == x.float().numpy()).all()
    save_torch({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="I64; wanted a float"):
        read_safetensors(tmp_path / "x.safetensors")


# --- what is refused -------------------------------------------------------------------------------------------------

def spoil_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_arrays(folder, change):
    path = next(folder.glob("*.safetensors"))
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def drop(ending):
    def change(arrays):
        del arrays[next(name for name in arrays if name.endswith(ending))]
    return change


def add(name, *shape):
    def change(arrays):
        arrays[name] = np.zeros(shape, np.float32)
    return change


Q = "model.layers.0.self_attn.q_proj"
SPOILT = {
    "no config": ("peft", lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "bad json": ("mlx", lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "neither": ("mlx", lambda f: (f / "adapter_config.json").write_text("{}"), "neither 'peft_type'"),
    "not an object": ("mlx", lambda f: (f / "adapter_config.json").write_text("[]"), "neither 'peft_type'"),
    "no weights": ("mlx", lambda f: (f / "adapters.safetensors").unlink(), "adapters.safetensors is missing"),
    "only a pickle": ("peft", lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "never loaded"),
    "cut": ("peft", lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-4]), "damaged or cut short"),
    "empty file": ("mlx", lambda f: (f / "adapters.safetensors").write_bytes(b""), "damaged or cut short"),
    "no arrays": ("mlx", lambda f: spoil_arrays(f, dict.clear), "empty"),
    "other method": ("peft", lambda f: spoil_config(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "other tuning": ("mlx", lambda f: spoil_config(f, fine_tune_type="full"), "fine_tune_type is 'full'"),
    "no settings": ("mlx", lambda f: spoil_config(f, lora_parameters=None), "lora_parameters is missing"),
    "no rank": ("peft", lambda f: spoil_config(f, r=None), "r is None; wanted a positive number"),
    "odd scale": ("mlx", lambda f: spoil_config(f, lora_parameters={"rank": 3, "scale": "big"}), "scale is 'big'"),
    "other rank": ("peft", lambda f: spoil_config(f, r=4), "do not fit rank 4"),
    "ranks": ("peft", lambda f: spoil_config(f, rank_pattern={"q_proj": 2}), "rank_pattern"),
    "biases": ("peft", lambda f: spoil_config(f, bias="all"), "bias = 'all'"),
    "modules": ("peft", lambda f: spoil_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "half a pair": ("peft", lambda f: spoil_arrays(f, drop("lora_B.weight")), "has arrays"),
    "stray": ("peft", lambda f: spoil_arrays(f, add("base_model.model.lm_head.weight", 2)), "unexpected tensor"),
    "embedding": ("peft", lambda f: spoil_arrays(f, add("model.embed_tokens.lora_embedding_A", 2)), "unexpected"),
    "not dora": ("mlx", lambda f: spoil_arrays(f, add(f"{Q}.m", 32)), "has arrays"),
    "dora without m": ("peft", lambda f: spoil_config(f, use_dora=True), "has arrays"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_folders_are_refused(tmp_path, case):
    "Each with a ModelError that names the folder and the reason."
    layout, spoil, message = SPOILT[case]
    folder = write_adapter(tmp_path / "adapter", layout, *make_adapter(), "base")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)


def test_unknown_layout_and_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="unknown adapter layout 'gguf'"):
        write_adapter(tmp_path / "a", "gguf", *make_adapter(), "base")
    with pytest.raises(ModelError, match="missing"):
        read_adapter(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- writing ---------------------------------------------------------------------------------------------------------

def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "mine.txt").write_text("precious")
    for target in ("new", "keep"):
        with pytest.raises(OutputError, match="No space left"), staged_folder(tmp_path / target) as stage:
            (stage / "half").write_text("x")
            raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "new") as stage:
        (stage / "half").write_text("x")
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]
    with staged_folder(tmp_path / "keep") as stage:
        (stage / "new.txt").write_text("new")
    assert sorted(p.name for p in (tmp_path / "keep").iterdir()) == ["mine.txt", "new.txt"]
    (tmp_path / "keep" / "mine.txt").unlink()
    shutil.rmtree(tmp_path / "keep")
