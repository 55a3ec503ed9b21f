"""Conversions: what is made holds all that was there, everything else is refused, and no half file is left."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_formats import ROWS

from realign_core.cli import main
from realign_core.data.converting import CONVERSIONS, convert, convert_row, why_not
from realign_core.data.formats import FORMATS, as_record, parse, read
from realign_core.errors import DataError, OutputError

NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"},
                     {"role": "assistant", "content": "4"}], "level": 3}


def row(record, format=None):
    return read([record], format)[0]


def values(value) -> list[str]:
    "All leaves of a record, as text."
    if isinstance(value, dict):
        return [v for part in value.values() for v in values(part)]
    if isinstance(value, list):
        return [v for part in value for v in values(part)]
    return [str(value)]


@pytest.mark.parametrize(("old", "new"), CONVERSIONS)
def test_a_conversion_gives_good_rows_and_loses_nothing(old, new):
    record = {"verifiable": {**ROWS["verifiable"]}, "prompts": {"prompt": "2 + 2?", "solution": "4"},
              "messages": {**CHAT, "level": "x"}}.get(old, ROWS[old]) | {"teacher": "A. Nonymous"}
    made = convert_row(row(record), new, 7)
    typed = [parse(m, new) for m in made]
    assert typed and all(m["teacher"] == "A. Nonymous" for m in made)
    text = "\n".join(values(made))
    assert all(leaf in text for leaf in values(record) if leaf not in ("True", "False", "system", "user", "assistant"))
    if len(made) > 1:
        assert {m["pair"] for m in made} == {7}


@pytest.mark.parametrize(("there", "back", "record"), [
    ("messages", "instruction", {"instruction": "Add 2 and 2.", "output": "4", "system": "Be brief.", "n": 1}),
    ("prompt_completion", "instruction", {"instruction": "Add 2 and 2.", "output": "4"}),
    ("prompt_completion", "messages", CHAT), ("instruction", "messages", CHAT), ("prompts", "verifiable", ROWS["verifiable"]),
    ("instruction", "prompt_completion", ROWS["prompt_completion"])])
def test_there_and_back_again(there, back, record):
    first, = convert_row(row(record, back), there)
    again, = convert_row(row(first, there), back)
    assert again == record


def test_pairs_labels_and_scores():
    pair = row({**ROWS["preference"], "chosen_score": 0.9, "rejected_score": 0.1, "margin": 0.8})
    good, bad = convert_row(pair, "unpaired", 3)
    assert (good["completion"], good["label"], good["score"]) == ("4", True, 0.9)
    assert (bad["completion"], bad["label"], bad["score"]) == ("5", False, 0.1) and bad["margin"] == 0.8


REFUSED = {
    "rejected answers": (ROWS["preference"], "messages", "rejected answers would be lost"),
    "pairs of thumbs": (ROWS["unpaired"], "preference", "made up"),
    "labels": (ROWS["unpaired"], "prompt_completion", "labels would be lost"),
    "scores to thumbs": (ROWS["groups"], "unpaired", "made up"),
    "best of n": (ROWS["groups"], "preference", "preferences makes it"),
    "text to turns": (ROWS["text"], "messages", "made up"), "turns to text": (CHAT, "text", "learned would be lost"),
    "answers": (ROWS["prompts"], "prompt_completion", "answers would have to be made up"),
    "a solution": (ROWS["prompts"], "verifiable", "no column `solution`"),
    "no responses": ({"problem": "?", "solution": "4"}, "unpaired", "no responses"),
    "two answers": ({"messages": [*CHAT["messages"], *CHAT["messages"][1:]]}, "prompt_completion", "several turns"),
    "a last question": ({"messages": [*CHAT["messages"], CHAT["messages"][1]]}, "prompt_completion", "goes on"),
    "a turn in the prompt": ({"prompt": CHAT["messages"], "completion": [{"role": "assistant", "content": "4"}]}, "messages",
                             "would train on"),
    "a marked thought": ({**ROWS["cold_start"], "answer": "</think>"}, "messages", "already holds the mark"),
    "a solution of another type": ({"prompt": "?", "solution": 4}, "verifiable", "wrong type"),
    "a pair already": ({**ROWS["preference"], "pair": 9}, "unpaired", "'pair' has a meaning"),
    "a column in the way": ({**ROWS["prompt_completion"], "system": " ", "input": "x"}, "instruction", "has a meaning"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_or_invent_is_refused_with_the_reason(case, tmp_path):
    record, to, words = REFUSED[case]
    with pytest.raises(DataError, match=words) as caught:
        convert([record], to, tmp_path / "out" / "a.jsonl")
    assert caught.value.row == 1 and not list(tmp_path.rglob("*.jsonl"))


def test_every_pair_of_formats_is_either_made_or_explained():
    for old in FORMATS:
        for new in FORMATS:
            assert (why_not(old, new) is None) == (old == new or (old, new) in CONVERSIONS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_through_every_writer_and_back(format, name, tmp_path):
    wide = [ROWS[format], {**ROWS[format], "teacher": "Ω\u2028", "seed": 7}, {**ROWS[format], "score_sheet": {"a": [1.5, 2.0]}}]
    done = convert(wide, format, tmp_path / name)
    assert (done.rows_in, done.rows_out, done.formats) == (3, 3, {format: 3})
    assert [as_record(r) for r in read(done.path)] == [as_record(r) for r in read(wide)]
    first = done.path.read_bytes()
    assert convert(done.path, format, tmp_path / name).path.read_bytes() == first, "the same rows give the same bytes"
    assert list(tmp_path.iterdir()) == [tmp_path / name] and (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_columns_that_appear_late_make_one_parquet_file(tmp_path):
    rows = [{"text": f"row {n}", **({"early": n} if n < 5000 else {}), **({"late": {"deep": [n / 2]}} if n > 9000 else {}),
             **({"late": {"other": "x"}} if n == 9500 else {})} for n in range(10_000)]
    done = convert(rows, "text", tmp_path / "a.parquet")
    back = [as_record(r) for r in read(done.path)]
    assert back == rows and [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("rows", [
    [{"text": "a", "n": 1}, {"text": "b", "n": "one"}], [{"text": "a", "n": 2**70}], [{"text": "a", "n": {"x": {}}}],
    [{"text": "a", "n": {"x": None}}], [{"text": "a", "n": [{"x": 1}, "y"]}],
    [*[{"text": "a", "n": 1}] * 5000, {"text": "b", "n": "one"}]])
def test_what_a_table_cannot_hold_is_refused(rows, tmp_path):
    with pytest.raises(DataError, match="Parquet|JSON"):
        convert(rows, "text", tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
    assert convert(rows, "text", tmp_path / "a.jsonl").rows_out == len(rows)


def test_a_bad_row_leaves_the_old_file_alone(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(DataError) as caught:
            convert([ROWS["text"], {"text": ""}], "text", tmp_path / name)
        assert caught.value.row == 2 and (tmp_path / name).read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(NAMES)


def test_a_file_may_be_converted_onto_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{n}?", "response": str(n)}) + "\n" for n in range(9000)))
    assert convert(path, "instruction", path).rows_out == 9000
    assert json.loads(path.read_text().splitlines()[8999]) == {"instruction": "8999?", "output": "8999"}


def test_gzip_bytes_do_not_tell_the_time(tmp_path):
    one, two = (convert([ROWS["text"]], "text", tmp_path / name).path.read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz"))
    assert one == two and gzip.decompress(one).startswith(b'{"text"')


def test_things_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="unknown kind of file to write"):
        convert([ROWS["text"]], "text", tmp_path / "a.csv")
    with pytest.raises(DataError, match="unknown format"):
        convert([ROWS["text"]], "txt", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="cannot be written as JSON"):
        convert([{"text": "a", "when": Path("x")}], "text", tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no rows"):
        convert([], "text", tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    nowhere = "/sys/a.parquet" if Path("/sys").is_dir() else "/dev/null/a.parquet"
    for out in (tmp_path / "file" / "a.jsonl", tmp_path / "folder.jsonl", nowhere):
        with pytest.raises(OutputError):
            convert([ROWS["text"]], "text", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.jsonl"]


LIMITED = """
import resource, signal, sys
from realign_core.data.converting import convert
from realign_core.errors import OutputError
import pyarrow.parquet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
rows = [{"text": "%064x" % (hash(str(n)) ** 9 % 2**256)} for n in range(9000)]
try:
    convert(rows, "text", sys.argv[1])
except OutputError as error:
    print("OutputError:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on the size of files is tried on Linux only")
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_nothing(name, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / name)], capture_output=True, text=True, env=os.environ)
    assert done.stdout.startswith("OutputError:"), done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path, capsys):
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps(ROWS["preference"]) + "\n")
    assert main(["convert", str(source), "--to", "unpaired"]) == 0
    assert "1 rows read, 2 written" in capsys.readouterr().out and len(read(tmp_path / "pairs-unpaired.jsonl")) == 2
    assert main(["convert", str(source), "--to", "preference", "--out", str(tmp_path / "p.parquet")]) == 0
    assert len(read(tmp_path / "p.parquet")) == 1
    assert main(["convert", str(source), "--to", "messages"]) == 2 and "rejected answers" in capsys.readouterr().err
