"""Somebody who has never seen the project, three clicks or commands from the front page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from realign_core import cli, guide

NBS = ROOT / "nbs"
LINK = re.compile(r"\]\(([^)#\s]+\.ipynb)(?:#[^)]*)?\)")


def links(page: Path) -> set[Path]:
    "The notebooks that a page's text leads to."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {(page.parent / target).resolve() for target in LINK.findall(text)}


def clicks() -> dict[str, int]:
    "Page -> links to be followed from the front page, at least."
    found, edge = {}, {NBS / "index.ipynb"}
    while edge:
        found |= dict.fromkeys(edge, len(set(found.values())))
        edge = {target for page in edge for target in links(page)} - set(found)
    return {page.relative_to(NBS).as_posix(): n for page, n in found.items()}


@pytest.mark.parametrize("page", ["start/00_quickstart.ipynb", "start/01_choose.ipynb", "methods/07_kto.ipynb",
                                  "data/00_formats.ipynb", "data/02_checking.ipynb"])
def test_three_clicks(page):
    assert clicks()[page] <= 3


def test_a_trained_model_is_one_command():
    assert re.search(r"^make run\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert "realign run quickstart" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_thumbs_up_and_down_lead_to_a_method_its_format_a_checker_and_the_memory_of_7b(tmp_path, capsys):
    "One command names the method, its rows, how they are checked, and what a model of 7 billion parameters needs."
    assert "realign guide" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert cli.main(["guide", "--goal", "style", "--data", "labels"]) == 0
    said = capsys.readouterr().out
    assert "(kto)" in said and "unpaired" in said and "realign check unpaired.jsonl" in said
    assert re.search(r"\d+ GiB in full, \d+ GiB with adapters.*7B parameters", said)
    step = next(s for s in guide.recommend(goal="style", data="labels").steps if s.name == "kto")
    row = re.search(r"One row: (\{.*\})", said)[1]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(json.dumps(json.loads(row) | {"label": i % 2 == 0, "prompt": f"{i} + 1?"})
                                                     for i in range(6)) + "\n")
    assert cli.main(["check", str(tmp_path / "thumbs.jsonl")]) == 0 and step.format == "unpaired"
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b", "label": "up"}\n')
    assert cli.main(["check", str(tmp_path / "broken.jsonl")]) != 0
