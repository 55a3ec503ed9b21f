"""As people use it: a wheel in an environment of its own, a plain script, and a batch of notebooks with one summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

from realign_core import cli

SCRIPT = """
import sys
import realign_core
assert not {"torch", "mlx", "transformers"} & set(sys.modules), "importing is light"

from realign_core import fit, load
from realign_core.methods import dpo
from realign_core.tinyworld import World, preference_rows

policy = load("tinyworld-instruct", "torch")
rows = preference_rows(World(), "style", n=24)
run = fit(policy, dpo.method(beta=0.1), rows, steps=3, batch_size=4, out="run", progress=False)
run.policy.save("model")
print(realign_core.__file__, run.summary["steps"], load("model", "torch").backend)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment that holds the wheel and nothing else of ours.

    The requirements come from the environment that the tests run in, by its path. Such a path brings no `.pth` files with
    it, and so not the editable installation.
    """
    pytest.importorskip("torch")
    top = tmp_path_factory.mktemp("install")
    source = top / "source"
    source.mkdir()
    shutil.copytree(ROOT / "realign_core", source / "realign_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", top, source], check=True, env=outside())
    venv.create(top / "venv", with_pip=False)
    python = top / "venv" / "bin" / "python"
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, text=True,
                          capture_output=True, env=outside()).stdout.strip()
    wheel, = top.glob("realign_core-*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, env=outside())
    Path(site, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def outside() -> dict[str, str]:
    "The environment's variables without those that lead back to the checkout."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "REALIGN_RUNS", "VIRTUAL_ENV")}


def run(folder: Path, *command) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=outside(), capture_output=True, text=True, check=False)


@pytest.mark.seconds(30)
def test_the_wheel_trains_the_shipped_model_from_a_plain_script(installed, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run(tmp_path, installed / "python", "train.py")
    assert done.returncode == 0, done.stderr[-2000:]
    where, steps, backend = done.stdout.split()
    assert Path(where).is_relative_to(installed.parent) and (steps, backend) == ("3", "torch")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_installed_command_works_outside_a_checkout(installed, tmp_path):
    listed = run(tmp_path, installed / "realign", "list")
    assert listed.returncode == 0, listed.stderr
    assert "Direct Preference Optimization" in listed.stdout and "git clone" in listed.stdout
    refused = run(tmp_path, installed / "realign", "run", "dpo")
    assert refused.returncode == 2 and "checkout" in refused.stderr and "Traceback" not in refused.stderr
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}) + "\n")
    checked = run(tmp_path, installed / "realign", "check", "pairs.jsonl")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.seconds(60)
def test_a_batch_of_three_methods_and_two_models_has_one_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models, methods = ("tinyworld-base", "tinyworld-instruct"), ("orpo", "cpo", "simpo")
    assert cli.main(["run", *methods, "--models", *models, "--budget", "smoke", "--out", "batch", "--quiet"]) == 0
    last = capsys.readouterr().out.split("\n\n")[-1]
    ends = [(line.split()[0], line.split()[-1]) for line in last.splitlines()[2:]]
    assert sorted(ends) == sorted((m, "ok") for m in methods for _ in models), last
    assert cli.main(["report", "batch"]) == 0
    assert "6 runs, 0 with a gate that does not hold" in capsys.readouterr().out
    rows = [line.split(" | ")[:3] for line in Path("batch/report.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert {(name.strip("| "), model) for name, _, model in rows} == {(n, m) for n in methods for m in models}
