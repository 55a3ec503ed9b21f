"""Every notebook runs headless, from any folder: in full on the default framework, a few steps on the other."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import BACKENDS, ROOT

from realign_core.cli import list_notebooks, run_notebook
from realign_core.engine.policy import pick_backend

DEFAULT = pick_backend("auto")
OTHERS = [b for b in BACKENDS if b != DEFAULT and importlib.util.find_spec(b)]
LIMIT = 60  # seconds that a notebook may state for two idle cores


def cases():
    "One run of each notebook, and a smoke run on the other framework when it takes a backend."
    for notebook in list_notebooks(ROOT / "nbs"):
        name = f"{notebook.room}/{notebook.path.stem}"
        runs = [({}, name)]
        if "backend" in notebook.parameters:
            runs = [({"backend": DEFAULT}, f"{name}-{DEFAULT}"),
                    *[({"backend": b, "budget": "smoke"}, f"{name}-{b}-smoke") for b in OTHERS]]
        for parameters, label in runs:
            yield pytest.param(notebook, parameters, id=label, marks=pytest.mark.seconds(notebook.seconds + len(runs)))


@pytest.mark.parametrize(("notebook", "parameters"), cases())
def test_runs(notebook, parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "out" in notebook.parameters:
        parameters = {**parameters, "out": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    outcome = run_notebook(notebook, parameters, tmp_path / "out", progress=False)
    assert not outcome.error, outcome.error
    if "backend" in parameters:
        assert outcome.metrics is not None, "a notebook that takes a backend ends with finish(...)"
        assert outcome.metrics["backend"] == parameters["backend"]
        assert outcome.metrics["passed"] is (None if parameters.get("budget") == "smoke" else True)


@pytest.mark.parametrize("notebook", list_notebooks(ROOT / "nbs"), ids=lambda n: f"{n.room}/{n.path.stem}")
def test_states_its_time(notebook):
    assert 0 < notebook.seconds <= LIMIT, "the third line says: *Reading time N minutes · runs in N s · …*"
