"""`realign doctor` as a reader meets it: what is missing, whether that matters, and a command that can be typed."""

from __future__ import annotations

import configparser
import importlib.util

import pytest
from conftest import ROOT

from realign_core import cli, doctor


@pytest.fixture
def without(monkeypatch):
    "Pretend that some modules are not installed."
    whole = importlib.util.find_spec
    def pretend(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in names else whole(name, *more))
    return pretend


def test_every_extra_is_looked_at():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    extras = {name.removesuffix("_requirements") for name in settings["DEFAULT"] if name.endswith("_requirements")}
    assert extras - {"torch", "mlx", "all"} == set(doctor.EXTRAS)  # the frameworks have a line of their own


def test_a_gap_in_something_optional_says_what_it_is_for_and_ends_well(without, capsys):
    without("lm_eval")
    assert cli.main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "extra evals" in line)
    assert "gap" in line and "without lm_eval: for lm-evaluation-harness" in line and "pip install -e '.[evals]'" in line


def test_without_a_framework_nothing_can_be_trained_and_the_status_says_so(without, capsys):
    without("torch", "mlx")
    assert cli.main(["doctor"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "GAP" in line]
    assert lines and all("pip install -e '.[torch]', or [mlx]" in line for line in lines)


def test_outside_a_checkout_the_command_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.realign_core, "__file__", str(tmp_path / "realign_core" / "__init__.py"))
    assert doctor._install("torch") == "pip install 'realign_core[torch]'"


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def broken(): raise OSError("no such device")
    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor._python))
    first, second, *_ = doctor.examine()
    assert (first.what, first.ok, first.found) == ("broken", False, "OSError: no such device") and second.ok
