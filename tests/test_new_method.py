"""A method is one notebook: with its module in the package it is in the guide, the tables, the command line and the skills."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ASKED = """
import json, sys
from realign_core import cli, guide, skills, tables
from realign_core.methods import get
from realign_core.methods.registry import entries, names
plan = guide.recommend("style", data="pairs")
seen = {
    "registry": "toy" in names() and "toy" in entries() and get("toy", penalty=2.0).params["penalty"] == 2.0,
    "guide": any("(toy)" in text for text in plan.steps[0].others),
    "page": "(toy)" in guide.page().text,
    "matrix": any("(`toy`)" in row["method"] for row in tables.support()),
    "comparison": any(row["method"] == "`toy`" for row in tables.comparison()),
    "order": any("`toy`" in row["methods"] for row in tables.order()),
    "formats": any("`toy`" in row["methods"] for row in tables.formats()),
    "skills": all("toy" in text for name, text in skills.build().items()
                  if name in ("training-methods/SKILL.md", "training-methods/methods.md", "training-methods/tables.md")),
}
print(json.dumps(seen))
sys.exit(cli.main(["list"]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "A copy of the project with one more method, Toy: the module and the notebook of DPO-Positive under another name."
    top = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "realign_core", top / "realign_core", ignore=skip)
    shutil.copytree(ROOT / "nbs", top / "nbs", ignore=skip)
    shutil.copy(ROOT / "settings.ini", top)
    for source, target in ((top / "realign_core/methods/dpop.py", top / "realign_core/methods/toy.py"),
                           (top / "nbs/methods/16_dpop.ipynb", top / "nbs/methods/99_toy.ipynb")):
        text = source.read_text(encoding="utf-8").replace("16_dpop", "99_toy")
        target.write_text(text.replace("dpop", "toy").replace("DPO-Positive", "Toy"), encoding="utf-8")
    return top


def test_it_appears_everywhere(checkout):
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", ASKED], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, listed = done.stdout.partition("\n")
    assert [place for place, there in json.loads(first).items() if not there] == []
    assert re.search(r"^  toy +Toy$", listed, re.MULTILINE)                  # among the methods
    assert len(re.findall(r"^  toy ", listed, re.MULTILINE)) == 2            # and among the notebooks


def test_it_is_in_the_sidebar(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("site_tool", ROOT / "tools" / "site.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "NBS", checkout / "nbs")
    assert "          - methods/99_toy.ipynb\n" in tool.sidebar()


def test_its_run_is_in_the_report_and_becomes_evidence(checkout, tmp_path):
    code = """
import json, sys
from pathlib import Path
from realign_core import guide, tables
from realign_core.notebook import finish
from realign_core.report import collect, write_report
out = Path(sys.argv[1])
def cells(): return next(row for row in tables.support() if "(`toy`)" in row["method"])
before = cells()["PyTorch"]
finish("toy", backend="torch", model="tinyworld-instruct", out=out / "toy", effect=dict(value=2.0, low=1.0, high=3.0, n=4))
write_report(collect(out), out, keep=Path("results/full"))
guide.refresh()
print(json.dumps([before, cells()["PyTorch"], cells()["MLX"], "| toy |" in (out / "report.md").read_text()]))
"""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, other, reported = json.loads(done.stdout)
    assert before == other == "not shown" and after.startswith("yes: [1 seed]") and reported


def test_no_other_module_knows_dpo_positive():
    "Its own module, and nbdev's generated index; everything else finds it by itself."
    knowing = {p.relative_to(ROOT).as_posix() for p in (ROOT / "realign_core").rglob("*.py") if "dpop" in p.read_text().lower()}
    assert knowing == {"realign_core/methods/dpop.py", "realign_core/_modidx.py"}


def test_it_is_in_the_real_thing():
    from realign_core import cli, guide, tables
    assert any("(dpop)" in text for text in guide.recommend("style", data="pairs").steps[0].others)
    assert any("(`dpop`)" in row["method"] for row in tables.support())
    assert cli.find_notebook("dpop").path.name == "16_dpop.ipynb"
    assert "methods/16_dpop.ipynb" in (ROOT / "nbs" / "sidebar.yml").read_text()
