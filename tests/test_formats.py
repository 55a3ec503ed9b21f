"""Reading rows: the formats, and for every kind of bad input an error that names file, row and field."""

from __future__ import annotations

import gzip
import json

import pytest

from realign_core.data.formats import FORMATS, Messages, PromptCompletion, detect, read
from realign_core.errors import DataError, ReAlignError

USER, GOOD, BAD = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"},
                   {"role": "assistant", "content": "5"})
ROWS = {
    "text": {"text": "The sky is blue."},
    "instruction": {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    "messages": {"messages": [USER, GOOD]},
    "prompt_completion": {"prompt": "2 + 2?", "completion": "4"},
    "preference": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "unpaired": {"prompt": "2 + 2?", "completion": "4", "label": True},
    "stepwise": {"prompt": "2 + 2?", "completions": ["Two and two", "are 5."], "labels": [True, False]},
    "prompts": {"prompt": "2 + 2?", "ground_truth": "4"},
    "groups": {"prompt": "2 + 2?", "responses": [{"text": "4", "score": 1.0}, {"text": "5", "score": 0.0}]},
    "verifiable": {"problem": "2 + 2?", "solution": "4", "responses": [{"text": "4", "correct": True}],
                   "verify": {"name": "number", "tolerance": 0.5}},
    "contrast": {"harmful": "How to pick a lock?", "harmless": "How to pick a lemon?"},
    "cold_start": {"problem": "2 + 2?", "reasoning": "Two and two.", "answer": "4"},
}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def content(rows) -> list[dict]:
    return [row.model_dump() for row in rows]


def error(data, format=None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(data, format)
    return caught.value


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_read_and_traced(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[name], "", ROWS[name])
    rows = read(path)
    assert detect(ROWS[name]) == name and all(type(row) is FORMATS[name] for row in rows)
    assert [(row.source, row.row) for row in rows] == [(str(path), 1), (str(path), 3)]
    assert read(path, name) == rows and read(rows) == rows


def test_lists_generators_datasets_gzip_and_parquet_give_the_same_rows(tmp_path):
    records = [ROWS["preference"], {"prompt": "3 + 3?", "chosen": "6", "rejected": "9"}]
    assert [row.row for row in read(records)] == [1, 2] and read(records)[0].source is None
    plain = content(read(records))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    assert content(read(tmp_path / "rows.jsonl.gz")) == plain == content(read(r for r in records))
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(records)
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert content(read(dataset)) == plain == content(read(str(tmp_path / "rows.parquet")))


def test_messages_survive_parquet_and_stay_plain_dictionaries(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROWS["messages"]]).to_parquet(tmp_path / "rows.parquet")
    row, = read(tmp_path / "rows.parquet")
    assert row.messages == [USER, GOOD] and type(row.messages[0]) is dict


def test_further_columns_are_kept_even_those_called_row_and_source():
    row, = read([{**ROWS["preference"], "margin": 0.5, "source": "ultra", "row": 99}])
    assert row.margin == 0.5 and row.row == 1 and row.source is None and row.model_extra["source"] == "ultra"


def test_instruction_puts_its_input_below_and_none_counts_as_absent():
    row, = read([ROWS["instruction"]])
    assert row.prompt == "Add.\n\n2 and 2"
    assert read([{"instruction": "Hi", "input": None, "output": "Hello"}])[0].prompt == "Hi"


def test_the_sft_family_takes_three_formats_and_refuses_pairs():
    assert isinstance(read([ROWS["messages"]], "sft")[0], Messages)
    assert isinstance(read([ROWS["prompt_completion"]], "sft")[0], PromptCompletion)
    assert "chosen" in str(error([ROWS["preference"]], "sft"))


def test_conversational_and_implicit_preferences_become_a_prompt_and_two_answers():
    explicit, = read([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}])
    implicit, = read([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    repeated, = read([{"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    mixed, = read([{"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]}])
    for row in (explicit, implicit, repeated, mixed):
        assert (row.prompt, row.chosen, row.rejected) == ([USER], [GOOD], [BAD])


def test_an_implicit_prompt_may_have_several_turns():
    start = [{"role": "system", "content": "Be brief."}, USER, GOOD, {"role": "user", "content": "And 3 + 3?"}]
    row, = read([{"chosen": [*start, {"role": "assistant", "content": "6"}], "rejected": [*start, BAD]}])
    assert row.prompt == start


def test_missing_empty_and_odd_files(tmp_path):
    assert "no such file" in str(error(tmp_path / "none.jsonl"))
    assert "not a file" in str(error(tmp_path))
    assert "no rows" in str(error(write(tmp_path / "empty.jsonl"))) and "empty.jsonl" in str(error(tmp_path / "empty.jsonl"))
    assert "no rows" in str(error(write(tmp_path / "blank.jsonl", "", "  "))) and "no rows" in str(error([]))
    assert ".xlsx" in str(error(write(tmp_path / "rows.xlsx", "x")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert "gzip" in str(error(tmp_path / "cut.jsonl.gz"))
    assert "Parquet" in str(error(write(tmp_path / "no.parquet", "not parquet")))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    assert "UTF-8" in str(error(tmp_path / "latin.jsonl"))
    assert "not rows" in str(error({"text": "a"})) and "not rows" in str(error(7))


def test_malformed_json_names_the_line(tmp_path):
    found = error(write(tmp_path / "rows.jsonl", ROWS["text"], "", '{"text": "cut', ROWS["text"]))
    assert found.row == 3 and found.file.endswith("rows.jsonl") and "malformed JSON" in found.problem and "cut" in str(found)
    assert error(write(tmp_path / "list.jsonl", ROWS["text"], "[1, 2]")).row == 2


PAIR = ROWS["preference"]
BAD_ROWS = {
    "missing field": ("preference", {"prompt": "a", "chosen": "b"}, "rejected", "missing"),
    "missing prompt": ("preference", {"chosen": "b", "rejected": "c"}, "prompt", "missing"),
    "a number": ("preference", {**PAIR, "chosen": 4}, "chosen", "wrong type"),
    "null": ("preference", {**PAIR, "rejected": None}, "rejected", "wrong type"),
    "empty chosen": ("preference", {**PAIR, "chosen": ""}, "chosen", "empty"),
    "blank rejected": ("preference", {**PAIR, "rejected": " \n"}, "rejected", "empty"),
    "both the same": ("preference", {**PAIR, "rejected": "4"}, "rejected", "the same"),
    "both the same conversation": ("preference", {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "rejected", "the same"),
    "kinds mixed": ("preference", {"prompt": [USER], "chosen": "4", "rejected": "5"}, "chosen", "differ in kind"),
    "empty output": ("instruction", {"instruction": "a", "output": ""}, "output", "empty"),
    "output is a list": ("instruction", {"instruction": "a", "output": ["b"]}, "output", "wrong type"),
    "empty completion": ("prompt_completion", {"prompt": "a", "completion": "  "}, "completion", "empty"),
    "empty list of messages": ("messages", {"messages": []}, "messages", "empty"),
    "messages is text": ("messages", {"messages": "hello"}, "messages", "wrong type"),
    "a message is text": ("messages", {"messages": ["hello"]}, "messages[0]", "wrong type"),
    "unknown role": ("messages", {"messages": [{"role": "human", "content": "a"}, GOOD]}, "messages[0].role", "not allowed"),
    "message without content": ("messages", {"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing"),
    "empty assistant turn": ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]},
                             "messages[1].content", "empty"),
    "nobody answers": ("messages", {"messages": [USER]}, "messages", "no assistant"),
    "late system message": ("messages", {"messages": [USER, {"role": "system", "content": "a"}, GOOD]}, "messages", "system"),
    "empty chosen turn": ("preference", {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [BAD]},
                          "chosen[0].content", "empty"),
    "empty text": ("text", {"text": ""}, "text", "empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case, tmp_path):
    format, record, field, words = BAD_ROWS[case]
    path = write(tmp_path / "rows.jsonl", ROWS[format], record)
    found = error(path, format)
    assert (found.file, found.row, found.field) == (str(path), 2, field), str(found)
    assert words in found.problem and isinstance(found, ReAlignError)
    assert str(found).startswith(f"{path}, row 2, field '{field}': ")


def test_unknown_fields_and_unknown_formats_say_what_is_known():
    assert "instruction" in str(error([{"question": "a", "answer": "b"}]))
    assert "preference" in str(error([PAIR], "preferences"))
