"The tiny world: splits, checkers under attack, the shipped snapshots, and a build that survives a kill."
import json
import random
import subprocess
import sys

import pytest

from realign_core.tinyworld import world as tw
from realign_core.tinyworld.checks import Unsafe, check, mood_of, read_function, run_function, style_of
from realign_core.tinyworld.measure import digest, ece, path, properties, share
from realign_core.tinyworld.world import KINDS, World

WORLD = World()


def test_import_loads_no_framework():
    code = ("import sys, realign_core.tinyworld.world, realign_core.tinyworld.checks, realign_core.tinyworld.measure;"
            "print([m for m in ('torch', 'mlx', 'transformers', 'nbdev', 'fastcore') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_same_seed_same_world_in_another_process():
    code = ("import hashlib; from realign_core.tinyworld.world import World, corpus;"
            "w = World(); print(hashlib.sha256(repr([w.animals, w.towns, corpus(w, scale=0.01)]).encode()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": s, "PATH": "/usr/bin:/bin"}).stdout for s in ("1", "2")}
    assert len(runs) == 1
    assert World(1).animals != WORLD.animals


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("ambiguous", "unknowable")])
def test_held_out_prompts_are_new_and_enough(kind):
    train = {r["prompt"] for r in WORLD.rows(kind, 3000)}
    rows = WORLD.rows(kind, 200, "heldout")
    assert len({r["prompt"] for r in rows}) == 200
    assert not train & {r["prompt"] for r in rows}
    assert rows == WORLD.rows(kind, 200, "heldout") != WORLD.rows(kind, 200, "heldout", seed=1)


def test_held_out_entities_and_templates_are_apart():
    train = WORLD.rows("facts", 3000)
    names, shapes = {r["entity"] for r in train}, {r["prompt"].replace(r["entity"], "E") for r in train}
    entities, templates = (WORLD.rows("facts", 200, "heldout", heldout=x) for x in ("entities", "templates"))
    assert not names & {r["entity"] for r in entities} and names >= {r["entity"] for r in templates}
    assert not shapes & {r["prompt"].replace(r["entity"], "E") for r in templates}
    assert shapes >= {r["prompt"].replace(r["entity"], "E") for r in entities}


def test_corpus_keeps_its_promises():
    text = " ".join(tw.corpus(WORLD, scale=0.05))
    words = set(text.replace("?", " ").replace(".", " ").replace(",", " ").replace(":", " ").split())
    assert not words & {e["name"] for e in WORLD.region2}
    assert {e["name"] for e in WORLD.rare} <= words
    assert tw.REFUSAL not in text and tw.ABSTENTION not in text
    rng = random.Random(0)
    assert not words & {WORLD.unknown(rng, s) for s in ("train", "heldout") for _ in range(200)}


def test_unknown_arguments_are_refused():
    for bad in (dict(kind="fact", n=1), dict(kind="facts", n=1, split="test"), dict(kind="facts", n=1, heldout="all")):
        with pytest.raises(ValueError, match="wanted one of"):
            WORLD.rows(**bad)
    with pytest.raises(ValueError, match="different heldout prompts"):
        WORLD.rows("chance", 5000, "heldout")


@pytest.mark.parametrize("kind", list(KINDS))
def test_careful_answers_pass_their_checker(kind):
    rng = random.Random(0)
    for row in WORLD.rows(kind, 300):
        verdict = check(row, tw.REFUSAL if kind == "forbidden" else tw.reply(row, rng, careful=1.0))
        assert verdict.ok or kind == "chance" and verdict.label in ("right", "wrong"), (row, verdict)


@pytest.mark.parametrize("kind", ["style", "arithmetic", "code", "forbidden"])
def test_chosen_beats_rejected(kind):
    for row, pair in zip(WORLD.rows(kind, 100), tw.preference_rows(WORLD, kind, 100), strict=True):
        assert row["prompt"] == pair["prompt"] and check(row, pair["chosen"]).ok
        if kind == "style":
            assert style_of(pair["chosen"]) == dict(padded=False, polite=True) != style_of(pair["rejected"])
            assert check(row, pair["rejected"]).ok
        else:
            assert not check(row, pair["rejected"]).ok


def test_contrast_pairs_differ_in_one_word():
    for pair in tw.contrast_rows(WORLD, 100):
        a, b = (pair[k]["prompt"].split() for k in ("harmful", "harmless"))
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_sft_rows_have_standard_formats():
    rows = tw.sft_rows(WORLD, ["facts", "code", "forbidden"], 30)
    assert len(rows) == 30 and all([m["role"] for m in r["messages"]] == ["user", "assistant"] for r in rows)
    assert set(tw.sft_rows(WORLD, "facts", 1, form="instruction")[0]) == {"instruction", "output"}


ATTACKS = ["__import__('os').system('true')", "x.__class__.__base__.__subclasses__()", "9**9**9**9", "2**3**3**3**3", "[x]*10**9",
           "'a'*10**9", "f(x)", "open('/etc/passwd').read()", "(lambda: x)()", "eval('x')", "max(x, key=print)", "x[0]",
           "(" * 99 + "x" + ")" * 99 + ".a", "[i for i in range(9**9)]", "10**3*10**3*10**3*10**3", "x if 1 else", "\x00",
           "sum(x)"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_code_is_refused(attack):
    with pytest.raises(Unsafe):
        run_function(*read_function(f"def f(x): return {attack}"), 3)


def test_checker_survives_any_text():
    rng = random.Random(0)
    alphabet = "def f(x): return x+*/%0123456789()[]<>\n\t'\"\\\x00é<think></think>- It is"
    for kind in KINDS:
        row = WORLD.rows(kind, 1)[0]
        for n in (0, 1, 10, 100, 3000):
            check(row, "".join(rng.choice(alphabet) for _ in range(n)))
    assert not check(WORLD.rows("arithmetic", 1)[0], "It is " + "9" * 5000).ok


def test_listing_every_value_is_wrong():
    row = WORLD.rows("facts", 1)[0]
    assert check(row, " or ".join(tw.VALUES[row["attribute"]])).label == "wrong"


def test_mood_and_statistics():
    assert mood_of("a merry and bleak day") == "mixed" and mood_of("a day") == "none"
    assert ece([1, 1, 1, 1], [1, 1, 1, 0]) == pytest.approx(0.25)
    assert share(0, 10)[1] == 0 and share(10, 10)[2] == 1


@pytest.mark.parametrize("name", ["base", "instruct"])
def test_shipped_files_are_those_that_were_measured(name):
    folder = path(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] != config["pad_token_id"]
    assert properties()["sha256"][name] == digest(folder / "model.safetensors")
    assert properties()["parameters"] <= 3_000_000
    assert {p.name for p in folder.iterdir()} >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert all(r["n"] >= 150 for r in properties()["properties"][name])


def test_tokenizer_is_deterministic_and_shipped_one_is_sound():
    transformers = pytest.importorskip("transformers")
    from realign_core.tinyworld.build import SPECIAL, make_tokenizer
    built, again = make_tokenizer(WORLD), make_tokenizer(World())
    assert built.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    for name in ("base", "instruct"):
        shipped = transformers.AutoTokenizer.from_pretrained(path(name))
        assert len(shipped) == len(built) and shipped.eos_token_id != shipped.pad_token_id
        assert shipped.convert_tokens_to_ids(SPECIAL) == list(range(len(SPECIAL)))
        assert shipped.decode(shipped("It is 85.\n- moss")["input_ids"]) == "It is 85.\n- moss"
        assert len(shipped("47")["input_ids"]) == 2


def test_chat_template_marks_the_assistant():
    transformers = pytest.importorskip("transformers")
    from realign_core.tinyworld.build import chat_items
    tok = transformers.AutoTokenizer.from_pretrained(path("instruct"))
    turns = [dict(role="user", content="What is 4 + 3?"), dict(role="assistant", content="<think>4+3=7</think>It is 7.")]
    got = tok.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert chat_items(tok, [(turns[0]["content"], turns[1]["content"])])[0] == (got["input_ids"], got["assistant_masks"])
    prompt = tok.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert got["input_ids"][:len(prompt)] == prompt


def test_both_frameworks_load_the_snapshots_unchanged():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    for name in ("base", "instruct"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path(name))
        tok = transformers.AutoTokenizer.from_pretrained(path(name))
        ids = tok("The colour of the")["input_ids"]
        other, _ = mlx_lm.load(str(path(name)))
        with torch.no_grad():
            a = model(input_ids=torch.tensor([ids])).logits.numpy()
        b = other(mx.array([ids]))
        assert abs(a - __import__("numpy").array(b)).max() < 1e-3


def test_a_killed_build_goes_on(tmp_path):
    torch = pytest.importorskip("torch")
    from realign_core.tinyworld import build
    torch.set_num_threads(1)
    tok = build.make_tokenizer(WORLD)
    data = build.batches(build.raw_items(tok, tw.corpus(WORLD, scale=0.002)), 8, 0)[:8]
    whole = build.new_model(len(tok))
    build.run_stage(whole, "read", data, log=None)
    first = build.new_model(len(tok))
    optimizer = build.new_optimizer(first)
    for step in range(4):
        build.train_step(first, optimizer, data[step], build.rate(step, 8, build.RATES["read"]),
                         build.learned_tokens(data))
    file = tmp_path / "read.safetensors"
    build.save_state(file, first, optimizer, step=4, history=[])
    assert not list(tmp_path.glob("*.part"))
    again = build.new_model(len(tok), seed=9)
    build.run_stage(again, "read", data, file, log=None)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
