"""Exercises: what a check says about an answer, what is remembered, and that the pages have what they should."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import ROOT

from realign_core import cli, errors
from realign_core.exercises import attempt, difference, exercises, progress, progress_file, solved

METHODS = [n for n in cli.list_notebooks(ROOT / "nbs") if n.room == "methods" and n.name != "registry"]


@pytest.mark.parametrize(("found", "wanted", "said"), [
    (1.0, 1.0, ""), (1.0 + 1e-9, 1, ""), (np.float32(2), 2.0, ""), ([1, 2], np.array([1.0, 2.0]), ""), ((3.0, 0.5), (3, 0.5), ""),
    ("a", "a", ""), (True, True, ""), ({"a": [1.0]}, {"a": (1,)}, ""), (None, None, ""), (float("nan"), float("nan"), ""),
    (["It is 5.", 1.0], ["It is 5.", 1], ""),
    (-2.0, 2.0, "right but for its sign"), ([1, 2, 3], [3, 2, 1], "reverse order"), ([2.0, 4.0], [1.0, 2.0], "multiplied by 0.5"),
    ([1.5, 2.0, 3.5], [1.0, 1.5, 3.0], "-0.5 has to be added"),
    ([1.0, 2.0, 4.0], [1.0, 2.0, 3.0], "1 of 3 values differ, the first at (2,)"),
    ([0.0, 0.0], [1.0, 2.0], "2 of 2 values differ"), (0.5, 0.25, "0.5 was returned; 0.25 was wanted"),
    (float("nan"), 1.0, "not a finite number"), ([1, 2], [1, 2, 3], "the shape is (2,); wanted (3,)"),
    ("1", 1.0, "of type str"),
    (None, 1.0, "of type NoneType"), ({"a": 1}, {"b": 1}, "the keys are a; wanted b"),
    ({"a": 2}, {"a": 1}, "'a': 2 was returned"),
    (1, {"a": 1}, "a dictionary was wanted"), ("a", "b", "'a' was returned; 'b' was wanted"),
    (1, True, "1 was returned; True was wanted"),
    (["It is 5.", 2.0], ["It is 5.", 1.0], "item 1: 2 was returned; 1 was wanted"), (["a"], ["a", "b"], "was wanted"),
])
def test_difference(found, wanted, said):
    told = difference(found, wanted)
    assert (said in told) if said else told == ""


def double(x):
    return 2 * x


def test_a_stub_is_not_checked_and_the_solution_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    assert attempt("page 1", lambda x: None, double, (1.0,), hint="twice") is double
    assert solved() == {}


def test_a_wrong_answer_names_the_exercise_the_call_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    with pytest.raises(errors.WrongAnswer, match=r"page 1: <lambda>\(2\): 3 was returned; 4 was wanted. Hint: twice") as caught:
        attempt("page 1", lambda x: x + 1, double, (1.0,), (2.0,), hint="twice")
    assert solved() == {}
    shown = caught.value._render_traceback_()
    assert shown[0].startswith("WrongAnswer: page 1") and "nbs/engine/18_exercises.ipynb" in shown[1]


def test_where_many_answers_are_right_what_is_seen_of_them_is_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    assert attempt("page 1", lambda: None, lambda: "abc", (), hint="three", seen=len)() == "abc"   # a stub is not looked at
    with pytest.raises(errors.WrongAnswer, match="4 was returned; 3 was wanted. Hint: three"):
        attempt("page 1", lambda: "four", lambda: "abc", (), hint="three", seen=len)
    with pytest.raises(errors.WrongAnswer, match="stopped with TypeError"):
        attempt("page 1", lambda: 4, lambda: "abc", (), hint="three", seen=len)
    assert solved() == {}
    assert attempt("page 1", lambda: "xyz", lambda: "abc", (), hint="three", seen=len)() == "xyz" and list(solved()) == ["page 1"]


def test_an_answer_that_stops_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    with pytest.raises(errors.WrongAnswer, match="stopped with ZeroDivisionError: .* Hint: twice"):
        attempt("page 1", lambda x: 1 / 0, double, (1.0,), hint="twice")


def test_an_answer_that_gives_up_half_way_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    with pytest.raises(errors.WrongAnswer, match="None was returned"):
        attempt("page 1", lambda x: 2 * x if x < 2 else None, double, (1.0,), (2.0,), hint="twice")


def test_a_right_answer_is_remembered_once(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    mine = lambda x: x + x
    assert attempt("page 1", mine, double, (1.0,), (2.0,), hint="twice") is mine
    first = progress_file().read_bytes()
    attempt("page 1", mine, double, (1.0,), hint="twice")
    attempt("page 2", mine, double, (1.0,), hint="twice")
    assert list(solved()) == ["page 1", "page 2"] and progress_file().read_bytes() != first


def test_a_right_answer_is_remembered_where_there_are_no_runs_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path / "fresh" / "runs"))
    attempt("page 1", abs, abs, (-1.0,), hint="none")
    assert list(solved()) == ["page 1"]


def test_a_right_answer_counts_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path / "file"))
    assert attempt("page 1", abs, abs, (-1.0,), hint="none") is abs


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_a_damaged_record_is_named(tmp_path, monkeypatch, content, capsys):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    progress_file().write_bytes(content.encode("latin-1"))
    with pytest.raises(errors.DataError, match="progress.json: not a record of solved exercises"):
        solved()
    assert cli.main(["progress"]) == 2 and "progress.json" in capsys.readouterr().err
    attempt("page 1", abs, abs, (-1.0,), hint="none")  # and no answer is refused for it
    assert progress_file().read_bytes() == content.encode("latin-1")


def test_realign_progress_shows_what_was_solved(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    progress_file().write_text(json.dumps({"quickstart 1": "2026-01-01"}))
    assert cli.main(["progress"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"quickstart +1 of 1 +all done", next(line for line in lines if " quickstart " in line))
    assert re.search(r"grpo +0 of 2 +1\. Which tokens", next(line for line in lines if " grpo " in line))
    total = sum(int(re.search(r"of (\d+)", row["solved"])[1]) for row in progress(ROOT / "nbs"))
    assert lines[-1].strip().startswith(f"1 of {total} solved")


# The pages

@pytest.mark.parametrize("notebook", METHODS, ids=lambda n: n.name)
def test_a_method_page_has_two_checked_exercises(notebook):
    found = exercises(notebook.path)
    checked = [e for e in found if e.checked]
    assert len(checked) >= 2, [e.title for e in found]
    assert all(e.minutes and e.difficulty for e in checked)
    cells = json.loads(notebook.path.read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for e in checked:
        call = next(text for text in code if f'attempt("{e.page} {e.number}"' in text)
        stub, solution = re.search(rf'attempt\("{e.page} {e.number}", (\w+), (\w+),', call).groups()
        assert any(f"def {stub}(" in text and "return None  # your turn" in text for text in code), stub
        assert any(f"def {solution}(" in text and "code-fold: true" in text for text in code), solution
        assert re.search(r'hint=\s*f?"[^"]{20,}"', call), f"{e.page} {e.number}: a hint that helps"


@pytest.mark.parametrize("notebook", cli.list_notebooks(ROOT / "nbs"), ids=lambda n: f"{n.room}/{n.name}")
def test_each_exercise_states_minutes_or_open_end_and_each_check_belongs_to_one(notebook):
    found = exercises(notebook.path)
    assert all(e.minutes or e.difficulty == "open" for e in found)
    assert all(e.difficulty for e in found)
    checks = re.findall(r'attempt\(\\"(\w+ \d+)\\"', notebook.path.read_text())
    if notebook.name != "exercises":  # which shows how one is written
        assert sorted(checks) == sorted(f"{e.page} {e.number}" for e in found if e.checked)


# Errors lead to the section that explains them

def kinds(kind=errors.ReAlignError):
    import realign_core.data.generator  # noqa: F401  (has an error of its own)
    import realign_core.engine.encoding  # noqa: F401
    return [kind, *[below for each in kind.__subclasses__() for below in kinds(each)]]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_an_error_names_a_section_that_exists(kind):
    error = kind("something")
    assert str(error) == "something" and error.__notes__ == [f"Explained in nbs/{kind.page}, section “{kind.section}”."]
    cells = json.loads((ROOT / "nbs" / kind.page).read_text())["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    headings = re.findall(r"^##+ (.+)$", prose, re.MULTILINE)
    assert kind.section in headings
