"""Whatever a file or a list holds, reading, checking and converting end in rows or in a `DataError`, and in nothing else."""

from __future__ import annotations

import codecs
import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import ROWS

from realign_core.data.checking import check, headline, tables
from realign_core.data.converting import convert
from realign_core.data.formats import FORMATS, MAX_DEPTH, as_record, parse, read, strict_json
from realign_core.data.reading import stream
from realign_core.errors import DataError, ReAlignError

QUICK = settings(max_examples=150, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
KEYS = ["role", "content", "text", "score", "correct", "name", "tool_calls", "from", "value", "prompt", "messages", ""]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", " ", "\x00", "\ud800", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=8)
FIELDS = sorted({name for kind in FORMATS.values() for name in kind.model_fields} | {
    "system", "conversations", "response", "context", "question", "tools", "score_chosen", "kto_tag", "format", "turns", "row",
    "source", "model_config", "_row", "__class__", "copy", "model_dump"})


@st.composite
def damaged(draw):
    "A good row of some format with a few of its fields replaced, removed, or added."
    row = json.loads(json.dumps(ROWS[draw(st.sampled_from(sorted(ROWS)))]))
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(sorted(row) or FIELDS) | st.sampled_from(FIELDS))
        if draw(st.booleans()):
            row[field] = draw(anything)
        else:
            row.pop(field, None)
    return row


def survives(data, tmp_path, **given):
    "The rows if all is well; otherwise every way in must say so by our own error."
    try:
        rows = list(stream(data, given.get("format")))
    except ReAlignError as error:
        assert isinstance(error, DataError) and str(error) and "\n" not in str(error)
        rows = None
    try:
        report = check(data, given.get("format"))
    except DataError:
        assert rows is None
        return None
    assert report._repr_markdown_() and headline(report) and tables(report) is not None
    assert report.ok is (rows is not None), "reading and checking agree on what is good"
    if rows:
        again(rows, tmp_path)
    return rows


def again(rows, tmp_path):
    "Good rows can be written and are the same when they are read; a table may refuse, and then says so."
    formats = {row.format for row in rows}
    for name in ("a.jsonl", "a.parquet"):
        if len(formats) > 1:
            return
        try:
            done = convert(rows, rows[0].format, tmp_path / name)
        except DataError as error:
            assert name == "a.parquet" or "cannot be written as JSON" in str(error), error
            continue
        back = read(done.path, rows[0].format)
        assert [as_record(r) for r in back] == [as_record(r) for r in rows]


@QUICK
@given(rows=st.lists(damaged(), min_size=1, max_size=3), format=st.sampled_from([None, "mixed", "sft", *FORMATS]))
def test_damaged_rows_from_a_list(rows, format, tmp_path):
    survives(rows, tmp_path, format=format)


@QUICK
@given(rows=st.lists(damaged() | anything, min_size=1, max_size=4))
def test_damaged_rows_from_a_file(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # NaN and lone surrogates go into the file as escapes
    survives(path, tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    survives(tmp_path / "rows.json", tmp_path)


@QUICK
@given(data=st.data(), kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet"]))
def test_damaged_bytes(data, kind, tmp_path):
    content = good_bytes(kind)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        what = data.draw(st.sampled_from(["cut", "insert", "change", "drop"]))
        new = data.draw(st.binary(max_size=4) | st.sampled_from(
            [b"\x00", b"\n", b"\r\n", codecs.BOM_UTF8, b"\xff", b"[", b'"', b"NaN"]))
        content = {"cut": content[:at], "insert": content[:at] + new + content[at:],
                   "change": content[:at] + new + content[at + len(new):], "drop": content[:at] + content[at + 1:]}[what]
    path = tmp_path / f"bytes.{kind}"
    path.write_bytes(content)
    survives(path, tmp_path)


@QUICK
@given(content=st.binary(max_size=60), kind=st.sampled_from(["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet"]))
def test_any_bytes(content, kind, tmp_path):
    path = tmp_path / f"any.{kind}"
    for start in (b"", b"[", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"):
        path.write_bytes(start + content)
        survives(path, tmp_path)


_GOOD: dict[str, bytes] = {}


def good_bytes(kind: str) -> bytes:
    "A small good file of this kind."
    if not _GOOD:
        rows = [{**ROWS["preference"], "n": n, "é": "ü"} for n in range(5)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        _GOOD.update({"jsonl": lines, "json": json.dumps(rows, indent=1).encode(), "jsonl.gz": gzip.compress(lines)})
        _GOOD["jsonl.zst"] = pytest.importorskip("zstandard").compress(lines)
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        _GOOD["parquet"] = sink.getvalue().to_pybytes()
    return _GOOD[kind]


@QUICK
@given(text=st.text(alphabet='{}[]":,0123456789.eE+-\\untruefalsNaIity \ud800é', max_size=40))
def test_json_is_json_or_a_value_error(text):
    try:
        value = strict_json(text)
    except ValueError:
        return
    assert json.loads(text) == value


# ── the cases of the list, by name ──────────────────────────────────────────────────────────────────────────────────────

def deep(levels: int) -> str:
    return '{"text": "a", "x": ' + "[" * levels + "]" * levels + "}"


LINES = {
    "duplicate key": ('{"text": "a", "text": "b"}', "stands twice"),
    "duplicate key inside": ('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "stands twice"),
    "NaN": ('{"text": "a", "score": NaN}', "NaN"), "infinity": ('{"text": "a", "score": -Infinity}', "Infinity"),
    "infinite by size": ('{"text": "a", "score": 1e999}', "too large"),
    "too many digits": ('{"text": "a", "n": ' + "9" * 5000 + "}", "digits"),
    "lone surrogate": ('{"text": "a\\ud83d"}', "surrogate"),
    "lone surrogate in a key": ('{"text": "a", "\\uDC00": 1}', "surrogate"),
    "depth": (deep(MAX_DEPTH + 1), "nested deeper"), "much depth": (deep(50_000), "nested deeper"),
    "objects in depth": ('{"text": ' * 5000 + '"a"' + "}" * 5000, "nested deeper"),
    "null byte": ('{"text": "a\x00b"}', "control character"), "two objects": ('{"text": "a"} {"text": "b"}', "follows"),
    "single quotes": ("{'text': 'a'}", "malformed"), "a scalar": ("7", "not an object"), "null": ("null", "not an object"),
    "empty object": ("{}", "no known format"), "fields of null": ('{"text": null}', "no known format"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_no_row(case, tmp_path):
    line, words = LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first"}\n' + line + "\n" + '{"text": "last"}\n')
    report = check(path)
    assert (report.rows, report.errors, report.shown[0]["row"]) == (3, 1, 2)
    with pytest.raises(DataError) as caught:
        read(path)
    (tmp_path / "only.jsonl").write_text(line)
    with pytest.raises(DataError) as alone:
        read(tmp_path / "only.jsonl")
    assert caught.value.row == 2 and any(words in str(e) for e in (caught.value, alone.value)), (caught.value, alone.value)
    assert len(str(caught.value)) < 1000


def test_the_last_level_that_is_allowed_can_be_read_and_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text(deep(MAX_DEPTH - 1))
    row, = read(tmp_path / "rows.jsonl")
    assert as_record(read(convert([row], "text", tmp_path / "b.jsonl").path)[0]) == as_record(row)


def test_python_objects_get_the_same_treatment_as_files():
    endless: list = []
    endless.append(endless)
    for value in (float("nan"), float("inf"), "\ud800", {1: 2}, {"a": {None: 1}}, endless, {"x": endless}):
        with pytest.raises(DataError):
            read([{"text": "a", "extra": value}])
    with pytest.raises(DataError):
        read([{"text": b"bytes"}])
    with pytest.raises(DataError):
        read([{1: 2}])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("empty", ["", "  ", None, [], {}, 0, False, [None], [{}], [[]]])
def test_fields_that_are_there_and_empty(format, empty):
    for field in ROWS[format]:
        record = {**ROWS[format], field: empty}
        try:
            row = parse(record, format)
        except DataError as error:
            assert error.field or error.problem
        else:
            optional = {"input", "responses", "verify", "ground_truth", "harmful", "prompt", "label"}
            assert field in optional or as_record(row).get(field) == empty, "an empty answer got through"


def test_ten_megabytes_in_one_string(tmp_path):
    big = "word " * 2_000_000
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**ROWS["preference"], "chosen": big},
                                                              {**ROWS["preference"], "rejected": 5, "x": big})))
    report = check(path)
    assert (report.rows, report.errors) == (2, 1) and report.formats["preference"].sizes["chosen"].high == len(big)
    assert len(report._repr_markdown_()) < 10_000
    path.write_text("[" + path.read_text().replace("\n", ",", 1) + "]")
    assert check(path).rows == 2


def test_line_ends_and_marks_of_other_systems(tmp_path):
    lines = [json.dumps(row) for row in ROWS.values()]
    random.Random(0).shuffle(lines)
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + "\r\n".join(["", *lines, "", ""]).encode())
    report = check(tmp_path / "a.jsonl", "mixed")
    assert report.ok and report.rows == len(ROWS) and report.begins[next(iter(report.formats))] == 2
