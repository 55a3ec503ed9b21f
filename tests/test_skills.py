"""The skills say what the code says: every limit, every number, every file."""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module

import nbformat
import pytest
import yaml
from conftest import ROOT

from realign_core import cli, guide, skills, tables
from realign_core.errors import OutputError
from realign_core.workflows.dpo import DPO
from realign_core.workflows.learned import LEARNED
from realign_core.workflows.rlvr import RLVR

FLOWS = {"rlvr-workflow": RLVR, "dpo-workflow": DPO, "learned-reward-workflow": LEARNED}
PAGES = {"rlvr-workflow": "01_rlvr", "dpo-workflow": "02_dpo", "learned-reward-workflow": "03_learned"}


@pytest.fixture(scope="module")
def built() -> dict[str, str]:
    return skills.build()


def test_folders_and_indexes(built):
    assert {name.split("/")[0] for name in built} == {"training-methods", *FLOWS}
    for skill in ("training-methods", *FLOWS):
        index = built[f"{skill}/SKILL.md"]
        assert len(index.splitlines()) < 500
        _, front, _ = index.split("---\n", 2)
        matter = yaml.safe_load(front)
        assert matter["name"] == skill and 40 < len(matter["description"]) < 1024 and matter["description"].startswith("Use when")


def test_index_names_every_file_and_no_other(built):
    for skill in ("training-methods", *FLOWS):
        files = {name.split("/")[1] for name in built if name.startswith(f"{skill}/")} - {"SKILL.md"}
        assert set(re.findall(r"`(\w+\.md)`", built[f"{skill}/SKILL.md"])) == files


LIMITS = [  # 003's thresholds: figure, direction, limit, and the setting and stage that hold it
    ("verifiability", "≥", 0.8, "design", "least_verifiable"),
    ("false positives, its own answers", "<", 0.05, "verification", "most_false"),
    ("false positives, spoilt solutions", "<", 0.05, "verification", "most_false"),
    ("KL from the tuned policy", "≤", 0.1, "optimisation", "most_kl"),
    ("KL from the tuned policy", "≤", 0.1, "evaluation", "most_kl"),
    ("change of the pass rate", ">", 0.0, "optimisation", "least_change"),
    ("…, kept", "≥", 0.95, "evaluation", "least_kept")]


@pytest.mark.parametrize(("figure", "direction", "limit", "stage", "setting"), LIMITS)
def test_thresholds_of_003(built, figure, direction, limit, stage, setting):
    function = next(s for s in RLVR.stages if s.__name__ == stage)
    assert inspect.signature(function).parameters[setting].default == limit   # the code's
    assert f"| {stage} | {figure} | {direction} {limit:g} | {setting}={limit:g} |" in built["rlvr-workflow/thresholds.md"]


@pytest.mark.parametrize("skill", FLOWS)
def test_limits_are_those_that_the_workflow_s_page_was_measured_against(skill):
    "The page's own table of gates, from a run, against the limits that were read from the code without one."
    notebook = nbformat.read(ROOT / "nbs" / "workflows" / f"{PAGES[skill]}.ipynb", as_version=4)
    shown = next(text for cell in notebook.cells for output in cell.get("outputs", [])
                 if "| stage | figure |" in (text := "".join(output.get("data", {}).get("text/markdown", ""))))
    ran = [[part.strip() for part in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")][2:]

    def number(text):
        value = float(re.search(r"-?[\d.]+", text)[0])
        return value / 100 if "%" in text or "points" in text else value

    known = skills.limits(FLOWS[skill])
    for stage, figure, _, wanted, _ in ran:
        match = [each for each in known if each.stage == stage and each.direction == wanted.split()[0]
                 and re.fullmatch(re.escape(each.figure).replace("…", ".*"), figure)]
        assert match, (stage, figure)
        if re.fullmatch(r"-?[\d.e+-]+", match[0].limit):
            assert float(match[0].limit) == pytest.approx(number(wanted)), (stage, figure)
    seen = {(stage, figure) for stage, figure, *_ in ran}
    assert all(any(stage == each.stage and re.fullmatch(re.escape(each.figure).replace("…", ".*"), figure)
                   for stage, figure in seen) for each in known)


@pytest.mark.parametrize("skill", FLOWS)
def test_every_figure_in_the_code_is_in_the_skill(skill):
    known = skills.limits(FLOWS[skill])
    for stage in FLOWS[skill].stages:
        written = inspect.getsource(stage).count("Figure(") + ("_progress_gate(" in inspect.getsource(stage)) * 2
        assert sum(each.stage == stage.__name__ for each in known) == written > 0, stage.__name__


def test_a_changed_limit_changes_the_text(monkeypatch):
    design = next(s for s in RLVR.stages if s.__name__ == "design")
    monkeypatch.setitem(design.__kwdefaults__, "least_verifiable", 0.9)
    files = skills.workflow_skill(skills.WORKFLOWS[0])
    for name in ("SKILL.md", "workflow.md", "thresholds.md"):
        assert "verifiability ≥ 0.9" in files[name] or "verifiability | ≥ 0.9" in files[name]
        assert "verifiability ≥ 0.8" not in files[name]


def test_a_changed_card_changes_the_text(monkeypatch):
    from dataclasses import replace

    from realign_core.methods import kto
    monkeypatch.setattr(kto, "CARD", replace(kto.CARD, use="the moon is full", rows={"any size": (12345, 67890)}))
    guide.refresh()
    built = skills.build()
    assert "the moon is full" in built["training-methods/methods.md"] and "67.89K" in built["training-methods/tables.md"]
    monkeypatch.undo()
    guide.refresh()


def numbers(text: str) -> set[str]:
    return {found.rstrip(".,").replace(",", "") for found in re.findall(r"(?<![\w.])\d[\d.,]*", text)}


def test_every_number_comes_from_the_code(built):
    "Nothing in the skills' own words is a figure: all figures stand in cards, tables, settings, gates and the guide's tree."
    code = [json.dumps([vars(e.card) for e in guide.catalogue().values()], default=str, ensure_ascii=False)]
    code += [json.dumps(rows, ensure_ascii=False) for rows in tables.every_table().values()]
    code += [guide.mermaid(), json.dumps(guide.settled(), ensure_ascii=False), json.dumps(guide.CHECKLIST), *guide.ROLES.values()]
    code += [text for q in guide.QUESTIONS.values() for text in q.options.values()]
    code += [e.page + e.title for e in guide.catalogue().values()]
    allowed = numbers(" ".join(code).replace("_", " "))
    for flow in FLOWS.values():
        for place, stage in enumerate(flow.stages, 1):
            allowed |= {str(place), str(len(flow.stages))}
            allowed |= {n for value in (stage.__kwdefaults__ or {}).values() for n in numbers(f"{value!r} {value}")}
            allowed |= numbers(inspect.getdoc(stage)) | {n for row in skills.settings(stage) for n in numbers(row["meaning"])}
        allowed |= {n for each in skills.limits(flow) for n in numbers(each.limit.lstrip("-"))}
    own = numbers("Shares are from 0 to 1")
    for name, text in built.items():
        assert not numbers(text.replace("_", " ")) - allowed - own, name


def test_checklists_of_003_and_001_are_there(built):
    index = built["rlvr-workflow/SKILL.md"]
    for when in ("### Before", "### During", "### After"):
        assert when in index
    assert index.count("- [ ] ") == 5 + 5 + 5            # 003 has as many in each of its three lists
    for stage in RLVR.stages:
        assert f"`{stage.__name__}`" in index
    assert built["training-methods/checklist.md"].count("- [ ] ") == 7   # and 001 seven


ISSUES = ["redesign tasks", "strengthen verification logic", "reduce the learning rate", "diverse test cases", "roll back"]


@pytest.mark.parametrize("advice", ISSUES)
def test_advice_of_003(built, advice):
    assert advice in built["rlvr-workflow/SKILL.md"]


def test_stages_of_003(built):
    index = built["rlvr-workflow/SKILL.md"]
    for i, name in enumerate(("preparation", "design", "verification", "data", "optimisation", "iteration", "evaluation"), 1):
        assert f"| {i} `{name}` |" in index


METHODS = ["Supervised fine-tuning", "Direct Preference", "Odds Ratio", "Group Relative", "Contrastive", "verifiable rewards",
           "Abliteration", "teering"]   # the eight of 000


@pytest.mark.parametrize("title", METHODS)
def test_methods_of_000(built, title):
    assert title in built["training-methods/SKILL.md"] and title in built["training-methods/methods.md"]


def test_commands_in_the_skills_are_commands(built):
    for name, text in built.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("BILLIONS", "7").splitlines():
                args = cli.parser().parse_args(line.partition("#")[0].split()[1:])
                if args.command == "run":
                    cli.check_parameters(cli.find_notebook(args.name[0]), dict(args.parameter))
        for module in re.findall(r"from (realign_core\.workflows\.\w+) import run", text):
            assert callable(import_module(module).run), name


def test_the_command_writes_them(tmp_path, capsys, built):
    assert cli.main(["skills", "--out", str(tmp_path / "skills")]) == 0
    assert "training-methods/SKILL.md" in capsys.readouterr().out
    assert {p.relative_to(tmp_path / "skills").as_posix(): p.read_text() for p in (tmp_path / "skills").rglob("*.md")} == built


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        skills.write_skills(tmp_path / "file")
    assert cli.main(["skills", "--out", str(tmp_path / "file" / "x")]) == 2
