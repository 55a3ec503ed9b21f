"""The tables say what cards and records say; a cell of the support matrix without a run behind it fails here."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from conftest import ROOT

from realign_core import guide, tables
from realign_core.data.formats import FORMATS, detect, parse

KEPT = [r for name in ("full", "seeds") for r in json.loads((ROOT / "results" / f"{name}.json").read_text())]


def passed(name: str, backend: str) -> bool:
    "Is there a full run of this page on this framework whose gates all held? Read here without the guide."
    return any(r["notebook"] == name and r["backend"] == backend and r["budget"] == "full" and all(r["gates"].values())
               and r["passed"] is True for r in KEPT)


def page_of(entry) -> str:
    return entry.page.rpartition("/")[2].removesuffix(".ipynb").partition("_")[2]


def assert_proven(rows) -> None:
    "Every cell that says yes has a run behind it, and every run its cell."
    known = {f"(`{e.name}`)": e for e in guide.catalogue().values()}
    assert len(rows) == len(known)
    for row in rows:
        entry = known[row["method"].split()[-1]]
        for place, backend in (("MLX", "mlx"), ("PyTorch", "torch"), ("cloud", "cloud")):
            assert row[place].startswith("yes") == passed(page_of(entry), backend), (entry.name, place)


def committed_matrix() -> list[dict]:
    "The support matrix as the page shows it."
    notebook = nbformat.read(ROOT / "nbs" / "start" / "02_tables.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if c.source == "support()")
    head, _, *lines = [[part.strip() for part in line.strip("|").split("|")] for line in
                       "".join(cell.outputs[0]["data"]["text/markdown"]).splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_no_cell_without_evidence():
    assert_proven(tables.support())


def test_the_page_s_matrix_has_no_cell_without_evidence_either():
    for row in committed_matrix():
        for place in tables.PLACES:
            if row[place].startswith("yes"):
                name = re.search(r"\(`(\w+)`\)", row["method"])[1]
                assert passed(page_of(guide.catalogue()[name]), tables.PLACES[place]), (name, place)


def test_a_cell_added_by_hand_is_found():
    rows = [dict(row) for row in tables.support()]
    rows[0]["cloud"] = f"yes: [1 seed]({tables.HOME}/results/full.json)"
    with pytest.raises(AssertionError):
        assert_proven(rows)


@pytest.mark.parametrize("change", [{"passed": False}, {"passed": None}, {"budget": "smoke"}])
def test_a_run_that_did_not_pass_is_no_evidence(change, monkeypatch, tmp_path):
    import realign_core
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "full.json").write_text(json.dumps([{**r, **change} for r in KEPT]))
    monkeypatch.setattr(realign_core, "__file__", str(tmp_path / "realign_core" / "__init__.py"))
    guide.refresh()
    assert not [row for row in tables.support() if any(row[p].startswith("yes") for p in tables.PLACES)]
    monkeypatch.undo()
    guide.refresh()


COMPARED = [  # 001's comparison: method, data, volume, complexity, best for, compute, risk
    ("sft", "sft", "1K–5K", "low", "new capabilities", "low", "overfitting"),
    ("dpo", "preference", "1K–3K", "medium", "quality refinement", "low", "pair quality"),
    ("kto", "unpaired", "2K–5K", "low", "binary feedback", "low", "label noise"),
    ("grpo", "online", "5K–20K", "high", "online learning", "high", "reward hacking")]


@pytest.mark.parametrize(("name", "data", "rows", "complexity", "purpose", "compute", "risk"), COMPARED,
                         ids=[case[0] for case in COMPARED])
def test_comparison_of_001(name, data, rows, complexity, purpose, compute, risk):
    row = next(r for r in tables.comparison() if r["method"] == f"`{name}`")
    assert row["data"] == data and rows in row["rows"] and row["complexity"] == complexity and purpose in row["best for"]
    assert row["compute"] == compute and row["risk"] == risk


HELD = [("ppo", 4, True), ("grpo", 2, False), ("rloo", 2, False), ("dpo", 2, False), ("orpo", 1, False), ("simpo", 1, False),
        ("cpo", 1, False)]   # 004's table of PPO, GRPO and RLOO; 002 §3 and 004 §3: no reference


@pytest.mark.parametrize(("name", "models", "critic"), HELD)
def test_models_in_memory(name, models, critic):
    held = guide.catalogue()[name].card.held
    assert len(held) == models and ("critic" in held) == critic
    row = next(r for r in tables.comparison() if r["method"] == f"`{name}`")
    assert row["models held"].count("+") == models - 1 and "GiB" in row["memory, 7B"]


@pytest.mark.parametrize(("stage", "name"), [(1, "sft"), (2, "dpo"), (3, "grpo"), (3, "rlvr"), (4, "calibration"),
                                             (5, "honesty")])
def test_order_of_000(stage, name):
    assert f"`{name}`" in tables.order()[stage - 1]["methods"]


@pytest.mark.parametrize("sequence", ["`sft` → `dpo`", "`sft` → `grpo`", "`cpt` → `sft`", "`reward` → `ppo`"])
def test_combinations_of_001(sequence):
    assert sequence in {row["first to last"] for row in tables.combinations()}


def test_no_combination_starts_with_a_preference():
    assert not [row for row in tables.combinations() if row["first to last"].startswith(("`dpo`", "`grpo`"))]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_valid_row(name):
    row = guide.EXAMPLES[name]
    assert parse(row, name).format == name == detect(row)


SEED_ROWS = [  # the rows that 000 and 001 show
    ("instruction", {"instruction": "Add.", "output": "5"}), ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ("groups", {"prompt": "p", "responses": [{"text": "a", "score": 0.5}]}),
    ("verifiable", {"problem": "p", "solution": "s", "responses": [{"text": "a", "correct": True}]}),
    ("unpaired", {"prompt": "p", "completion": "a", "label": True}), ("prompts", {"prompt": "p"}),
    ("messages", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                               {"role": "assistant", "content": "a"}]})]


@pytest.mark.parametrize(("name", "row"), SEED_ROWS, ids=[name for name, _ in SEED_ROWS])
def test_rows_of_the_guides_are_read(name, row):
    assert parse(row, name).format == name
    shown = next(r for r in tables.formats() if r["format"] == f"`{name}`")
    assert all(f"`{field}`" in shown["fields"] for field in row if field not in ("system",))
