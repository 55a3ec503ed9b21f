"""Bad input of every kind: the error names the place, says what was wanted, and nothing half-written is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import VOCAB, Chatty, examples, method

from realign_core.engine.checkpoints import checkpoint_problem, newest_checkpoint
from realign_core.engine.history import Run
from realign_core.engine.policy import find_snapshot, load
from realign_core.engine.training import BigramPolicy, fit
from realign_core.errors import BackendError, DataError, ModelError, OutputError, ReAlignError
from realign_core.methods import dpo, sft
from snapshots import make_snapshot

GOOD = {"prompt": "Two plus three?", "chosen": "Five.", "rejected": "Six, I think."}


def lines(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def refused(tmp_path, text: str | None, chosen=dpo.method, name="pairs.jsonl", **settings) -> DataError:
    "The error that `fit` raises for a file with this text; no run's folder may be left with anything in it."
    path, out = tmp_path / name, tmp_path / "run"
    if text is not None:
        path.write_text(text)
    policy = Chatty()
    before = policy.table.copy()
    with pytest.raises(DataError) as caught:
        fit(policy, chosen(), path, steps=2, lr=0.1, out=out, progress=False, **settings)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not out.exists()
    assert (policy.table == before).all()
    return caught.value


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_missing_file(tmp_path):
    assert "no such file" in str(refused(tmp_path, None))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file(tmp_path, text):
    assert "no rows" in str(refused(tmp_path, text))


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / "pairs.jsonl").mkdir()
    assert "not a file" in str(refused(tmp_path, None))


def test_unknown_kind_of_file(tmp_path):
    assert ".jsonl" in str(refused(tmp_path, "a,b\n", name="pairs.csv"))


@pytest.mark.parametrize("bad", ['{"prompt": "Who?", "chosen": "Me', "Who? Me.", "{'prompt': 1}"])
def test_malformed_json_names_the_line(tmp_path, bad):
    error = refused(tmp_path, lines(GOOD, GOOD, bad, GOOD))
    assert error.row == 3 and "malformed JSON" in str(error)


def test_blank_lines_count_as_lines(tmp_path):
    assert refused(tmp_path, lines(GOOD) + "\n\n" + lines("{")).row == 4


def test_missing_field(tmp_path):
    error = refused(tmp_path, lines(GOOD, {"prompt": "Who?", "chosen": "Me."}))
    assert error.row == 2 and "rejected" in str(error)


@pytest.mark.parametrize("value", [6, None, ["x"], {"text": "x"}])
def test_wrong_type(tmp_path, value):
    error = refused(tmp_path, lines(GOOD, {**GOOD, "chosen": value}))
    assert error.row == 2 and "chosen" in str(error)


@pytest.mark.parametrize("empty", ["", "  \n "])
@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_empty_completion(tmp_path, field, empty):
    error = refused(tmp_path, lines(GOOD, GOOD, {**GOOD, field: empty}))
    assert error.row == 3 and field in str(error) and "empty" in str(error)


def test_empty_completion_in_a_conversation(tmp_path):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " "}]
    error = refused(tmp_path, lines({"messages": chat}), sft.method)
    assert error.row == 1 and "messages[1].content" in str(error)


def test_a_row_longer_than_the_window_is_counted_or_named(tmp_path):
    long = {**GOOD, "prompt": "Where does the sun rise? " * 40}
    error = refused(tmp_path, lines(GOOD, long), truncation="error")
    assert error.row == 2 and "longer than 64 tokens" in str(error)
    (tmp_path / "pairs.jsonl").write_text(lines(GOOD, long, GOOD))
    run = fit(Chatty(), dpo.method(), tmp_path / "pairs.jsonl", steps=1, lr=0.1, progress=False)
    assert run.report.counts["dropped"] == 1 and run.summary["rows_dropped"] == 1


def test_when_every_row_is_too_long(tmp_path):
    error = refused(tmp_path, lines({**GOOD, "prompt": "Where does the sun rise? " * 40}))
    assert "no row is left" in str(error) and "longer than 64 tokens" in str(error)


def test_rows_of_another_method(tmp_path):
    assert "prompt" in str(refused(tmp_path, lines({"text": "The cat sat."})))


@pytest.mark.parametrize("data", [7, None, {"prompt": "Who?"}])
def test_things_that_are_no_rows(data):
    with pytest.raises(ReAlignError):
        fit(Chatty(), dpo.method(), data, steps=1, lr=0.1, progress=False)


def test_a_list_that_is_empty():
    with pytest.raises(DataError, match="no rows"):
        fit(Chatty(), dpo.method(), [], steps=1, lr=0.1, progress=False)


# ── models and backends ─────────────────────────────────────────────────────────────────────────────────────────────────

def test_unknown_backend(tiny):
    with pytest.raises(BackendError, match="unknown backend 'jax'; wanted 'auto', 'torch' or 'mlx'"):
        load(tiny, "jax")


def test_unknown_model_name(backend):
    with pytest.raises(ModelError, match="unknown model 'tinyworld-instuct'.*tinyworld-instruct"):
        load("tinyworld-instuct", backend)


def test_hub_id_that_is_not_there(backend):
    with pytest.raises(ModelError, match="neither a folder nor reachable"):
        load("nobody/nothing", backend)


@pytest.fixture
def snapshot(tiny, tmp_path) -> Path:
    "A snapshot of its own, to be broken."
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_snapshot_without_tokenizer(snapshot, backend):
    for path in [*snapshot.glob("tokenizer*"), *snapshot.glob("vocab*")]:
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(snapshot, backend)


def test_snapshot_of_pickles_only(snapshot, backend):
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin, a pickle.*never loaded"):
        load(snapshot, backend)


def test_snapshot_without_config(snapshot):
    (snapshot / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing"):
        find_snapshot(snapshot)


def test_snapshot_with_a_broken_config(snapshot):
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        find_snapshot(snapshot)


def test_snapshot_with_weights_cut_short(snapshot, backend):
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError):
        load(snapshot, backend)


def test_file_instead_of_a_snapshot(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="not a folder"):
        find_snapshot(tmp_path / "model.gguf")


# ── output folders ──────────────────────────────────────────────────────────────────────────────────────────────────────

def train(out, policy=None, **settings):
    settings = {"steps": 20, "save_every": 5, **settings}
    return fit(policy or BigramPolicy(VOCAB), method(), examples(), out=out, progress=False, **settings)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(OutputError, match="cannot write to .*run"):
        train(tmp_path / "run")
    with pytest.raises(OutputError):
        train(tmp_path / "run" / "inside")
    assert (tmp_path / "run").read_text() == "notes"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system that nobody can write to")
def test_read_only_file_system():
    with pytest.raises(OutputError, match="cannot write to /sys/"):
        train("/sys/realign-run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            train(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


@pytest.fixture
def little_disk(tmp_path):
    "A file system of 64 KiB, which needs the right to mount one."
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True)
    if not done or done.returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_space_left(little_disk):
    (little_disk / "filler").write_bytes(bytes(40_000))
    with pytest.raises(OutputError, match="No space left"):
        train(little_disk / "run", steps=400, save_every=5)
    drafts = [p for p in (little_disk / "run").rglob("*") if ".tmp" in p.name]
    assert not drafts, "nothing half-written"
    for line in (little_disk / "run/log.jsonl").read_text().splitlines():
        json.loads(line)
    checkpoint = newest_checkpoint(little_disk / "run")
    assert checkpoint is not None and checkpoint_problem(checkpoint) is None
    (little_disk / "filler").unlink()


def test_with_space_again_the_run_goes_on(little_disk):
    whole, policy = BigramPolicy(VOCAB), BigramPolicy(VOCAB)
    train(None, whole)
    (little_disk / "filler").write_bytes(bytes(49_000))
    with pytest.raises(OutputError):
        train(little_disk / "run")
    (little_disk / "filler").unlink()
    train(little_disk / "run", policy)
    assert (policy.table == whole.table).all() and len(Run.load(little_disk / "run").history) == 21


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from realign_core.engine.policy import load
from realign_core.engine.training import fit
from realign_core.errors import OutputError
from realign_core.methods import sft
policy = load({model!r}, {backend!r}, threads=1)
rows = [{{"instruction": "Who?", "output": "Nobody."}}] * 8
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # no file may grow beyond 50 kB
try:
    fit(policy, sft.method(), rows, steps=3, batch_size=4, out={out!r}, save_every=1, held_out=0, progress=False)
except OutputError as error:
    print("OutputError:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on the size of files is tried on Linux only")
def test_weights_that_cannot_be_written_whole(tiny, backend, tmp_path):
    "A real short write inside each framework's own safetensors writer, which may not notice it by itself."
    code = LIMITED.format(tests=str(Path(__file__).parent), model=str(tiny), backend=backend, out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith("OutputError:") and str(tmp_path) in done.stdout, done.stderr[-2000:]
    assert not list((tmp_path / "run/checkpoints").iterdir()), "no checkpoint, and no half of one"


def test_a_vanished_folder(tmp_path):
    def remove(record):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises((OutputError, ReAlignError)):
        train(tmp_path / "run", track=lambda r: remove(r) or (tmp_path / "run").write_text("") if r["step"] == 3 else None)


def test_make_snapshot_is_sound(tmp_path):
    assert find_snapshot(make_snapshot(tmp_path / "m")).is_dir()
