"""Containers: every box gives the same rows without holding them, and every broken box is named."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc

import pytest

from realign_core.data import reading
from realign_core.data.formats import as_record, read
from realign_core.data.reading import container, stream
from realign_core.errors import DataError

RECORDS = [{"prompt": f"{n} + 1?\u2028", "chosen": str(n + 1), "rejected": "é" * (n % 3 + 1), "n": n} for n in range(40)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()
CALL = {"type": "function", "function": {"name": "light", "arguments": {"on": True}}}
TOOL = {"messages": [{"role": "user", "content": "Light on."}, {"role": "assistant", "tool_calls": [CALL]},
                     {"role": "tool", "name": "light", "content": "done"}, {"role": "assistant", "content": "It is on."}],
        "tools": [{"type": "function", "function": {"name": "light"}}]}


def put(path, content: bytes):
    path.write_bytes(content)
    return path


def refused(data, **given) -> DataError:
    with pytest.raises(DataError) as caught:
        list(stream(data, **given))
    return caught.value


def boxes(folder):
    zstandard, datasets = pytest.importorskip("zstandard"), pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "disk", num_shards=3)
    framed = b"".join(zstandard.compress(LINES[i:i + 700]) for i in range(0, len(LINES), 700))
    return {
        "JSON lines": put(folder / "a.jsonl", LINES), "JSON lines, gzip": put(folder / "a.jsonl.gz", gzip.compress(LINES)),
        "JSON lines, zstd": put(folder / "a.jsonl.zst", framed),
        "a JSON array": put(folder / "a.json", json.dumps(RECORDS, indent=2).encode()),
        "a JSON array, gzip": put(folder / "b.json.gz", gzip.compress(codecs.BOM_UTF8 + json.dumps(RECORDS).encode())),
        "Parquet": folder / "rows.parquet", "an Arrow folder": folder / "disk", "a datasets object": dataset,
        "a list": RECORDS, "an iterator": iter(RECORDS)}


def test_every_container_gives_the_same_rows(tmp_path):
    for kind, box in boxes(tmp_path).items():
        rows = stream(box)
        assert (rows.container.kind, rows.format) == (kind, "preference")
        assert [as_record(row) for row in rows] == RECORDS, kind
        assert kind in rows._repr_markdown_()


def test_datasets_that_stream_or_give_tensors(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    assert [as_record(row) for row in stream(dataset.to_iterable_dataset())] == RECORDS
    assert [as_record(row) for row in stream(dataset.with_format("numpy"))] == RECORDS
    both = datasets.DatasetDict({"train": dataset, "test": dataset})
    both.save_to_disk(tmp_path / "both")
    assert "test, train" in str(refused(tmp_path / "both")) and "train" in str(refused(both))
    assert len(read(tmp_path / "both" / "train")) == 40


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_block_borders_fall_anywhere(tmp_path, monkeypatch, size):
    text = ",\n ".join(json.dumps(r, ensure_ascii=False) for r in RECORDS[:6])
    array = put(tmp_path / "a.json", f" [{text}] \n".encode())
    lines = put(tmp_path / "a.jsonl", codecs.BOM_UTF8 + LINES.replace(b"\n", b"\r\n"))
    packed = put(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    monkeypatch.setattr(reading, "BLOCK", size)
    assert [as_record(row) for row in stream(array)] == RECORDS[:6]
    assert [as_record(row) for row in stream(lines)] == RECORDS == [as_record(row) for row in stream(packed)]


def test_rows_are_not_held(tmp_path):
    def peak(times):
        path = put(tmp_path / "big.jsonl", LINES * times)
        tracemalloc.start()
        count = sum(1 for _ in stream(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return count, most
    (few, little), (many, much) = peak(500), peak(1500)  # the first is already larger than one block
    assert (few, many) == (20_000, 60_000) and much < 1.2 * little


def test_an_iterator_is_read_once_and_says_so():
    rows = stream(iter(RECORDS))
    assert rows.format == "preference" and len(list(rows)) == 40
    assert "only once" in str(pytest.raises(DataError, list, rows).value)


BROKEN = {
    "gzip, cut": ("a.jsonl.gz", lambda: gzip.compress(LINES)[:-9], "gzip"),
    "gzip, header only": ("a.jsonl.gz", lambda: b"\x1f\x8b\x08\x00", "gzip"),
    "gzip, damaged": ("a.jsonl.gz", lambda: gzip.compress(LINES)[:60] + b"\x00\x00\x00" + gzip.compress(LINES)[63:], "gzip"),
    "zstd, cut": ("a.jsonl.zst", lambda: zst()[:-9], "zstd"),
    "zstd, cut between frames": ("a.jsonl.zst", lambda: zst() + zst()[:5], "zstd"),
    "Parquet, cut": ("a.parquet", lambda: b"PAR1" + bytes(80), "Parquet"),
    "Parquet, empty": ("a.parquet", lambda: b"", "Parquet"),
    "UTF-16": ("a.jsonl", lambda: LINES.decode().encode("utf-16"), "UTF-16"),
    "Latin-1": ("a.jsonl", lambda: LINES.decode().replace("\u2028", "").encode("latin-1"), "UTF-8"),
    "Latin-1 in an array": ("a.json", lambda: b'[{"text": "caf\xe9"}]', "UTF-8"),
    "an array that ends early": ("a.json", lambda: b'[{"text": "a"}', "ends before"),
    "an array with a comma too many": ("a.json", lambda: b'[{"text": "a"},]', "comma"),
    "an array without a comma": ("a.json", lambda: b'[{"text": "a"} {"text": "b"}]', "missing"),
    "an array and more": ("a.json", lambda: b'[{"text": "a"}] {}', "behind"),
    "an array of other things": ("a.json", lambda: b"[1, 2]", "no known format|not an object"),
    "null bytes": ("a.jsonl", lambda: bytes(100), "malformed"),
    "nothing": ("a.jsonl", lambda: b"", "no rows"), "blank lines": ("a.jsonl", lambda: b"\n \r\n", "no rows"),
    "an empty array": ("a.json", lambda: b" [ ] ", "no rows"),
}


def zst() -> bytes:
    return pytest.importorskip("zstandard").compress(LINES)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_box_is_named(case, tmp_path):
    name, content, words = BROKEN[case]
    path = put(tmp_path / name, content())
    error = refused(path)
    assert str(error).startswith(str(path)), error
    assert any(word in str(error) for word in words.split("|")), error


def test_rows_before_a_break_are_counted_and_the_break_is_no_end(tmp_path):
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(LINES * 3000)[:-2000])
    with pytest.raises(DataError) as caught:
        for row in stream(path):
            last = row.row
    assert last > 100_000 and caught.value.row == last + 1


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LARGEST_ROW", 1 << 21)
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "' + b"a" * (5 << 20) + b'"}\n')
    assert refused(path).row == 2 and "longer than 2 MiB" in str(refused(path))
    path = put(tmp_path / "a.json", b'[{"text": "' + b"a" * (9 << 20) + b'"}]')
    assert "longer than 2 MiB" in str(refused(path))


def test_things_that_hold_no_rows(tmp_path):
    for data in (7, None, b"bytes", {"text": "a"}, tmp_path / "none.jsonl", tmp_path, "nul\0byte.jsonl", "~nobody-here/a.jsonl"):
        assert isinstance(refused(data), DataError)
    assert ".xlsx" in str(refused(put(tmp_path / "a.xlsx", b"x")))


def test_columns_of_other_names():
    rows = [{"input": "2 + 2?", "output": "4", "prompt": "ignored: it means something else"}]
    row, = stream(rows, columns={"prompt_feature": "input", "completion_feature": "output"})
    assert (row.format, row.prompt, row.completion) == ("prompt_completion", "2 + 2?", "4") and not row.model_extra
    assert "prompt" in str(refused(rows, format="preference", columns={"chosen": "nowhere"}))


def test_mixed_rows_only_when_asked():
    rows = [{"text": "a"}, {"prompt": "?", "chosen": "a", "rejected": "b"}]
    assert refused(rows).row == 2 and "several formats" in str(refused(rows))
    thumbs = [{"prompt": "?", "completion": "a"}, {"prompt": "?", "completion": "b", "label": False}]
    assert "unpaired, after rows of prompt_completion" in str(refused(thumbs))
    assert len(list(stream(thumbs, "prompt_completion"))) == 2, "when the format is given, a label is a column like any other"
    assert [row.format for row in stream(rows, "mixed")] == ["text", "preference"]
    assert "unknown format" in str(refused(rows, format="both"))


def test_tables_bring_back_what_was_there_and_nothing_else(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    other = json.loads(json.dumps(TOOL).replace('"on": true', '"dim": 3'))
    parquet.write_table(pyarrow.Table.from_pylist([TOOL, other]), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"on": True}
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"dim": 3}
    assert set(first.messages[0]) == {"role", "content"}


def test_containers_are_told_apart_by_content_not_by_name(tmp_path):
    assert container(put(tmp_path / "a.jsonl", gzip.compress(LINES))).kind == "JSON lines, gzip"
    assert container(put(tmp_path / "b.jsonl", b'\n\n[{"text": "a"}]')).kind == "a JSON array"
