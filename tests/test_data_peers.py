"""What the guides of TRL and mlx-lm show is read rightly, and what is written passes their own loaders."""

from __future__ import annotations

import json
import types

import pytest

from realign_core.data.converting import convert
from realign_core.data.formats import as_record, detect, read
from realign_core.errors import DataError

U, A, B = ({"role": "user", "content": "Which way is north?"}, {"role": "assistant", "content": "Towards the pole star."},
           {"role": "assistant", "content": "Down."})
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": {"room": "hall", "state": "on"}}}
TEXT_CALL = {**CALL, "function": {"name": "lamp", "arguments": "{\"room\": \"hall\"}"}}
SCHEMA = {"type": "function", "function": {"name": "lamp", "description": "Switch a lamp.", "parameters": {
    "type": "object", "properties": {"room": {"type": "string"}, "state": {"type": "string", "enum": ["on", "off"]}},
    "required": ["room"]}}}
TOOL_TURNS = [{"role": "user", "content": "Lamp on in the hall."}, {"role": "assistant", "tool_calls": [CALL]},
              {"role": "tool", "name": "lamp", "content": "It is on."}, {"role": "assistant", "content": "Done."}]

# Each shape of the guides, with the format it is and what it must come to; None: as it stands.
TRL = {
    "language modelling": ({"text": "North is up."}, "text", None),
    "conversational": ({"messages": [U, A]}, "messages", None),
    "from and value": ({"conversations": [{"from": "user", "value": U["content"]}, {"from": "assistant", "value": A["content"]}]},
                       "messages", {"messages": [U, A]}),
    "prompt only": ({"prompt": "North is"}, "prompts", None), "prompt only, chat": ({"prompt": [U]}, "prompts", None),
    "prompt and reward columns": ({"prompt": [U], "solution": "up", "difficulty": 2}, "prompts", None),
    "completion": ({"prompt": "North is", "completion": " up."}, "prompt_completion", None),
    "completion, chat": ({"prompt": [U], "completion": [A]}, "prompt_completion", None),
    "explicit pair": ({"prompt": "North is", "chosen": " up.", "rejected": " down."}, "preference", None),
    "implicit pair": ({"chosen": "North is up.", "rejected": "North is down."}, "preference",
                      {"prompt": "North is", "chosen": " up.", "rejected": " down."}),
    "explicit pair, chat": ({"prompt": [U], "chosen": [A], "rejected": [B]}, "preference", None),
    "implicit pair, chat": ({"chosen": [U, A], "rejected": [U, B]}, "preference",
                            {"prompt": [U], "chosen": [A], "rejected": [B]}),
    "thumb": ({"prompt": "North is", "completion": " up.", "label": True}, "unpaired", None),
    "thumb, chat": ({"prompt": [U], "completion": [B], "label": False}, "unpaired", None),
    "steps": ({"prompt": "7 or 6.9?", "completions": ["6.9 is below 7.", "So 6.9."], "labels": [True, False]}, "stepwise", None),
    "tool calls": ({"messages": TOOL_TURNS, "tools": [SCHEMA]}, "messages",
                   {"messages": [TOOL_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, *TOOL_TURNS[2:]],
                    "tools": [SCHEMA]}),
    "tools as text": ({"messages": [U, A], "tools": json.dumps([SCHEMA])}, "messages", {"messages": [U, A], "tools": [SCHEMA]}),
    "developer and thinking": ({"messages": [{"role": "developer", "content": "Be kind."}, U, {**A, "thinking": "Stars."}]},
                               "messages", None),
    "template arguments": ({"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}}, "messages", None),
    "pictures": ({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}],
                  "completion": [{"role": "assistant", "content": [{"type": "text", "text": "There."}]}]},
                 "prompt_completion", None),
}
MLX = {
    "chat": ({"messages": [SYSTEM, U, A]}, "messages", None),
    "tools": ({"messages": [U, {"role": "assistant", "tool_calls": [TEXT_CALL]}], "tools": [SCHEMA]}, "messages",
              {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [TEXT_CALL]}], "tools": [SCHEMA]}),
    "completions": ({"prompt": "North is", "completion": "up."}, "prompt_completion", None),
    "text": ({"text": "North is up."}, "text", None),
    "pair": ({"prompt": "North?", "chosen": "Up.", "rejected": "Down."}, "preference", None),
    "pair with a system prompt": ({"system": "Be brief.", "prompt": U["content"], "chosen": A["content"], "rejected": "Down."},
                                  "preference", {"prompt": [SYSTEM, U], "chosen": [A], "rejected": [B]}),
}


@pytest.mark.parametrize("case", [*TRL, *(f"mlx {name}" for name in MLX)])
def test_what_the_guides_show_is_read_rightly(case, tmp_path):
    record, format, meaning = MLX[case[4:]] if case.startswith("mlx ") else TRL[case]
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    row, = read(tmp_path / "train.jsonl")
    assert detect(record) == row.format == format
    assert as_record(row) == (meaning or record)


def test_the_one_thing_they_show_that_is_refused():
    "A conversation without an answer appears in TRL's guide to show a template; as a row to train on it teaches nothing."
    with pytest.raises(DataError, match="nothing to learn"):
        read([{"messages": [U]}])


def test_keys_of_mlx_lm_s_configuration_file():
    billsum = [{"text": "A long bill.", "summary": "A bill.", "title": "x"}]
    row, = read(billsum, columns={"prompt_feature": "text", "completion_feature": "summary"})
    assert as_record(row) == {"prompt": "A long bill.", "completion": "A bill.", "title": "x"}
    row, = read([{"chosen": [U, A], "rejected": [U, B]}], "messages", columns={"chat_feature": "chosen"})
    assert row.messages == [U, A]
    assert read([{"body": "Some text."}], columns={"text_feature": "body"})[0].text == "Some text."


def test_implicit_prompts_are_those_of_trl():
    trl = pytest.importorskip("trl.data_utils")
    for record in ({"chosen": "North is up.", "rejected": "North is down."}, {"chosen": [U, A], "rejected": [U, B]},
                   {"chosen": [SYSTEM, U, A, U, B], "rejected": [SYSTEM, U, A, U, A]}):
        theirs = trl.extract_prompt(record)
        assert {key: as_record(read([record])[0])[key] for key in theirs} == theirs


# ── their loaders ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tiny)


def written(rows, to, path):
    "The rows written in both containers, read back by `datasets`."
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for kind, name in (("json", "rows.jsonl"), ("parquet", "rows.parquet")):
        file = convert(rows, to, path / name).path
        yield datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(path / f"cache-{kind}"))


def trainer(kind, tiny, tokenizer, dataset, path):
    "A trainer of TRL's with its own preprocessing done: its training set."
    trl = pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = getattr(trl, f"{kind}Config")(output_dir=str(path / "out"), use_cpu=True, bf16=False, report_to=[], max_length=256,
                                           per_device_train_batch_size=2, disable_tqdm=True)
    made = getattr(trl, f"{kind}Trainer")(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    return made.train_dataset, made


CHATS = [{"messages": [U, A]}, {"messages": [SYSTEM, U, B]}]
SFT = {"messages": CHATS, "text": [{"text": "North is up."}, {"text": "South is down."}],
       "prompt_completion": [{"prompt": "North is", "completion": " up."}, {"prompt": "South is", "completion": " down."}]}


@pytest.mark.parametrize("format", SFT)
def test_sft_files_pass_trl(format, tiny, tokenizer, tmp_path):
    for dataset in written(SFT[format], format, tmp_path):
        ready, made = trainer("SFT", tiny, tokenizer, dataset, tmp_path)
        batch = made.data_collator([ready[i] for i in range(2)])
        assert (batch["labels"] != -100).any(1).all(), "every row has something to learn"


PAIRS = {"plain": [{"prompt": "North is", "chosen": " up.", "rejected": " down."}] * 2,
         "chat": [{"chosen": [U, A], "rejected": [U, B]},
                  {"system": "Be brief.", "prompt": "?", "chosen": "Yes.", "rejected": "No."}]}


@pytest.mark.parametrize("shape", PAIRS)
def test_preference_files_pass_trl(shape, tiny, tokenizer, tmp_path):
    for dataset in written(PAIRS[shape], "preference", tmp_path):
        ready, made = trainer("DPO", tiny, tokenizer, dataset, tmp_path)
        assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(ready.column_names)
        batch = made.data_collator([ready[0], ready[1]])
        assert batch["input_ids"].shape[0] == 4 and bool(batch["completion_mask"].any(1).all())


def test_unpaired_files_pass_trl(tiny, tokenizer, tmp_path):
    rows = [*PAIRS["plain"], {"prompt": "East is", "chosen": " right.", "rejected": " left."}]
    for dataset in written(rows, "unpaired", tmp_path):
        ready, _ = trainer("KTO", tiny, tokenizer, dataset, tmp_path)
        assert len(ready) == 6 and sum(ready["label"]) == 3


def plain(record: dict) -> bool:
    "Only roles and contents that the tiny tokenizer's template knows."
    turns = [m for value in record.values() if isinstance(value, list) for m in value]
    return all(isinstance(m, dict) and isinstance(m.get("content"), str) and m["role"] != "developer" for m in turns)


@pytest.mark.parametrize("record", [record for record, format, _ in TRL.values()
                                    if format not in ("text", "stepwise") and "tools" not in record and plain(record)])
def test_every_other_shape_passes_trl_s_template(record, tokenizer, tmp_path):
    trl = pytest.importorskip("trl.data_utils")
    format = detect(record)
    for dataset in written([record], format, tmp_path):
        row = dataset[0]
        assert trl.is_conversational(row) == isinstance(next(iter(row.values())), list)
        made = trl.maybe_apply_chat_template({k: v for k, v in row.items() if k != "chat_template_kwargs"}, tokenizer)
        fields = {"text", "prompt", "chosen", "rejected", "completion"} & set(made)
        assert fields and all(isinstance(made[k], str) and made[k] for k in fields)


def test_tools_written_as_lines_reach_the_template(tokenizer, tmp_path):
    trl = pytest.importorskip("trl.data_utils")
    record, _, meaning = TRL["tool calls"]
    path = convert([record], "messages", tmp_path / "a.jsonl").path
    row = json.loads(path.read_text())
    assert row == meaning
    template = ("{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
                "{% for c in m.tool_calls or [] %}{{ c.function.arguments.state }}{% endfor %}{% endfor %}")
    seen = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False, chat_template=template)
    assert "lamp" in seen and "hall.onIt is on.Done." in seen and trl.is_conversational(row)


@pytest.mark.parametrize("format", SFT)
def test_files_pass_mlx_lm(format, tokenizer, tmp_path):
    loaders = pytest.importorskip("mlx_lm.tuner.datasets")
    for name in ("train", "valid", "test"):
        convert(SFT[format], format, tmp_path / f"{name}.jsonl")
    args = types.SimpleNamespace(data=str(tmp_path), train=True, test=True, mask_prompt=format != "text")
    for part in loaders.load_dataset(args, tokenizer):
        tokens = [part.process(part[i]) for i in range(len(part))]
        assert len(tokens) == 2 and all(len(ids) > offset for ids, offset in tokens)


def test_conversations_reach_mlx_lm_as_messages(tokenizer, tmp_path):
    "mlx-lm's completions are text; conversational ones are written as `messages` for it."
    loaders = pytest.importorskip("mlx_lm.tuner.datasets")
    path = convert([{"prompt": [SYSTEM, U], "completion": [A]}, {"instruction": "North?", "output": "Up."}], "messages",
                   tmp_path / "train.jsonl").path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = loaders.create_dataset(rows, tokenizer, types.SimpleNamespace(mask_prompt=True))
    assert type(made).__name__ == "ChatDataset" and all(len(ids) > offset for ids, offset in map(made.process, rows))
