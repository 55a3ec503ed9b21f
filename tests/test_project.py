"""What holds for the project as a whole: imports, notebooks, packaging, the command line."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT

from realign_core import cli, guide, notebook, report
from realign_core.engine.checkpoints import write_json
from realign_core.errors import DataError, GateFailed, OutputError, ReAlignError
from realign_core.methods import registry

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(s.startswith((".", "_")) for s in p.parts))
HEAVY = ("torch", "mlx", "transformers", "peft", "datasets", "matplotlib", "nbdev", "fastcore")


def shell(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def python(code: str) -> str:
    "What a fresh Python prints."
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def read(path: Path):
    return nbformat.read(path, as_version=4)


def names(path: Path) -> str:
    return path.relative_to(ROOT / "nbs").as_posix()


# Importing

def test_import_is_fast_and_loads_no_framework():
    timed = "import sys, time; t = time.perf_counter(); import realign_core; print(time.perf_counter() - t, *sys.modules)"
    best = min(float(python(timed).split()[0]) for _ in range(3))
    loaded = {name.split(".")[0] for name in python(timed).split()[1:]}
    assert best <= 0.3
    assert not loaded & set(HEAVY)


def test_library_modules_load_no_framework_either():
    own = ("__init__.py", "torch_policy.py", "mlx_policy.py")  # these two import their framework, and are imported late
    modules = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
               for p in (ROOT / "realign_core").rglob("*.py") if p.name not in own]
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in python(code).split()}
    assert not loaded & {"torch", "mlx", "nbdev", "fastcore"}


def test_load_fit_and_run_come_on_first_use():
    import realign_core
    from realign_core.engine.policy import load
    assert realign_core.load is load and {"load", "fit", "Run"} <= set(dir(realign_core))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        realign_core.lode  # noqa: B018


# Notebooks

def test_each_module_has_one_owning_notebook():
    owners = {}
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            for name in re.findall(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.MULTILINE):
                owners.setdefault(name, []).append(names(path))
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}
    exported = {p.relative_to(ROOT / "realign_core").with_suffix("").as_posix().replace("/", ".")
                for p in (ROOT / "realign_core").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert exported == set(owners)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
class TestNotebook:
    def test_front_matter_title_and_claim(self, path):
        front, title = read(path).cells[:2]
        assert front.cell_type == "raw" and front.source.startswith("---") and front.source.rstrip().endswith("---")
        matter = yaml.safe_load(front.source.strip().strip("-"))
        heading = re.match(r"# (.+)\n\n> \S.+\n\n\*Reading time \d+ minutes? · runs in (about )?\d+ (s|min)\b[^*]*\*$",
                           title.source)
        assert heading, "the second cell is: # title, > claim, *Reading time N minutes · runs in N s · …*"
        assert matter["title"] == heading[1] and matter["description"]

    def test_cells(self, path):
        cells = read(path).cells
        assert sum("parameters" in c.metadata.get("tags", []) for c in cells) <= 1
        assert not [c.source for c in cells if re.search(r"^#\|\s*eval:\s*false", c.source, re.MULTILINE)]
        assert not [c.source for c in cells if re.search(r"\b(TODO|FIXME|XXX)\b", c.source)]
        assert not [c.source for c in cells if c.cell_type == "code" and "nbdev_export(" in c.source]

    def test_imports_stand_alone(self, path):
        for cell in read(path).cells:
            if cell.cell_type != "code" or cell.source.startswith(("%", "!")) or "prepare_mlx()" in cell.source:
                continue  # the BLAS is loaded between two imports, and that order matters
            body = [n for n in ast.parse(cell.source).body if not _is_docstring(n)]
            imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert len(imports) in (0, len(body)), f"a cell that imports does nothing else:\n{cell.source}"

    def test_outputs_are_small_quiet_and_without_paths_of_a_machine(self, path):
        notebook = read(path)
        outputs = json.dumps([c.get("outputs", []) for c in notebook.cells])
        assert len(outputs) < 1_000_000
        assert not re.search(r"(/home/|/Users/|/root/|/work/|/tmp/|/private/var/|site-packages|C:\\\\)", outputs)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error", cell.source
                assert "Warning" not in output.get("text", ""), cell.source
        assert not re.search(r"(/home/|/Users/|/root/|/work/)", "\n".join(c.source for c in notebook.cells))

    def test_metadata_serves_papermill(self, path):
        assert read(path).metadata.kernelspec.get("language") == "python"


def _is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_method_notebooks_have_parameters_and_finish():
    for path in NOTEBOOKS:
        found = cli.read_notebook(path)
        if found.room == "methods" and path.stem != "00_registry":
            wanted = {"backend", "model", "steps", "seed", "out", "budget"}
            wanted |= {"data"} if found.name in registry.names() else set()
            assert wanted <= set(found.parameters), names(path)  # what is no method of its own may measure the tiny world alone
        if "backend" in found.parameters:
            assert re.search(r"\bfinish\(", "\n".join(c.source for c in read(path).cells)), names(path)
            assert "budget" in found.parameters, names(path)


# Made files

def test_the_readme_table_has_every_method_with_its_page_and_its_kept_effect():
    text = (ROOT / "README.md").read_text()
    rows = {name: entry for name, entry in guide.catalogue().items() if entry.page.startswith("methods/")}
    assert set(registry.names()) <= set(rows)
    for name, entry in rows.items():
        start = f"| **{entry.title}** [`{name}`](nbs/{entry.page}) |"
        line = next(line for line in text.splitlines() if line.startswith(start)).replace("\u00a0", " ")
        for r in guide.records(entry):
            if r["seed"] == 0 and r["effect"]:
                assert notebook.interval_text(r["effect"]) in line


def test_the_readme_example_runs(tmp_path, monkeypatch):
    from realign_core.tinyworld import World, preference_rows
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    rows = preference_rows(World(), "style", n=24)
    Path("pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    scope = {}
    exec(code.replace("steps=200", "steps=2, progress=False"), scope)
    assert len([r for r in scope["run"].history if "loss" in r]) == 2 and any(Path("out/dpo").glob("*.safetensors"))


def test_the_wheel_holds_the_package_and_the_shipped_models(tmp_path):
    done = shell(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                 "--disable-pip-version-check", "-w", str(tmp_path), ".", cwd=_copy_of_package(tmp_path / "src"))
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob("realign_core-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for model in ("base", "instruct"):
        wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {f"realign_core/tinyworld/{model}/{name}" for name in wanted} <= held
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "realign_core").rglob("*.py")}
    assert modules <= held
    entry = next(n for n in held if n.endswith("entry_points.txt"))
    assert "realign=realign_core.cli:main" in zipfile.ZipFile(wheel).read(entry).decode().replace(" ", "")


def _copy_of_package(folder: Path) -> Path:
    "What a wheel is built from, elsewhere, so that no build folder appears in the checkout."
    import shutil
    folder.mkdir()
    shutil.copytree(ROOT / "realign_core", folder / "realign_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_pins_are_exact_and_say_nothing_about_this_machine():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0" and pins["nbdev"] == "2.4.14"
    assert pins["execnb"] < "0.2" and pins["fastcore"] < "2" and pins["ghapi"] < "2"


def test_no_file_names_a_machine_or_a_registry():
    for name in shell("git", "ls-files", "-co", "--exclude-standard").stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".ini", ".yml", ".md", ".txt", "") and path.is_file() and path != Path(__file__):
            found = re.search(r"(/work/(env|main|shared)|/root/|/opt/pypi|file:///|index-url)", path.read_text(errors="ignore"))
            assert not found, f"{name}: {found[0]}"


def test_nbdev_uses_the_one_quarto_configuration():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == (ROOT / "_quarto.yml").resolve()
    assert yaml.safe_load(link.read_text())["metadata-files"] == ["nbdev.yml", "sidebar.yml"]


# The command line

def write_notebook(folder: Path, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.cells[0].metadata["tags"] = ["parameters"]
    path = folder / "00_sample.ipynb"
    nbformat.write(nb, path)
    return path


FINISH = """from realign_core.notebook import finish
finish("sample", backend=backend, model="none", out=out, budget=budget,
       effect={"value": steps, "low": steps - 1, "high": 9, "n": 4},
       table=[{"asked": "facts", "before": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unit": "%"}, "after": 0.75}])"""
PARAMETERS = 'backend = "auto"\nsteps = 2\nout = None\nbudget = "full"'


@pytest.fixture
def sample(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write_notebook(tmp_path, PARAMETERS, FINISH))


def test_list_shows_methods_and_notebooks(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "dpo" in shown and "Direct Preference Optimization" in shown and "command_line" in shown


def test_unknown_name_says_what_is_known(capsys):
    assert cli.main(["run", "no-such-notebook"]) == 2
    error = capsys.readouterr().err
    assert "no-such-notebook" in error and "quickstart" in error and "Traceback" not in error


def test_nothing_to_run(capsys):
    assert cli.main(["run"]) == 2
    assert "--all" in capsys.readouterr().err


def test_unknown_parameter_is_refused(sample, capsys):
    assert cli.main(["run", sample, "-p", "stepz", "3"]) == 2
    assert "no parameter 'stepz'; it has backend, steps" in capsys.readouterr().err


def test_run_writes_and_shows_what_was_found(sample, capsys):
    assert cli.main(["run", sample, "-p", "steps", "5", "--out", "here", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "5.000 [4.000, 9.000], n = 4" in shown and "50.0 % [40.0, 60.0]" in shown and "everything is in here" in shown
    assert json.loads(Path("here/metrics.json").read_text())["passed"] is True
    assert Path("here/notebook.ipynb").is_file()


def test_a_gate_that_does_not_hold_fails_the_run(sample, capsys):
    assert cli.main(["run", sample, "-p", "steps", "1", "--out", "here", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "GateFailed" in shown and "effect above zero" in shown and "Traceback" not in shown
    assert json.loads(Path("here/metrics.json").read_text())["passed"] is False


def test_a_smoke_run_has_no_gates(sample):
    assert cli.main(["run", sample, "-p", "steps", "1", "--budget", "smoke", "--out", "here", "--quiet"]) == 0


def test_a_failing_cell_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_notebook(tmp_path, "out = None", "# why\nrows = []\nrows[3]")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "metrics.json").write_text('{"stale": true}')
    assert cli.main(["run", str(path), "--out", "here", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "IndexError: list index out of range" in shown and "rows = []" in shown and "Traceback" not in shown
    assert not Path("here/metrics.json").exists()  # an older run's figures are not this one's


def test_a_batch_gives_each_run_its_folder(sample, capsys):
    assert cli.main(["run", sample, "-p", "steps", "1", "--backends", "torch", "mlx", "--out", "all", "--quiet"]) == 1
    assert sorted(p.name for p in Path("all").iterdir()) == ["sample-mlx", "sample-torch"]
    assert "GateFailed" in capsys.readouterr().out.splitlines()[-1]


def test_unknown_backend_is_refused_before_anything_runs(sample, capsys):
    assert cli.main(["run", sample, "-p", "backend", "jax", "--quiet"]) == 2
    assert "unknown backend 'jax'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_file_that_is_no_notebook(tmp_path, content, capsys):
    path = tmp_path / "broken.ipynb"
    path.write_text(content)
    assert cli.main(["run", str(path)]) == 2
    assert "broken.ipynb: not a notebook" in capsys.readouterr().err


def test_report_of_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no metrics.json" in capsys.readouterr().err


def test_report_gathers_runs(sample, tmp_path, capsys):
    cli.main(["run", sample, "-p", "steps", "5", "--out", "runs/a", "--quiet"])
    cli.main(["run", sample, "-p", "steps", "1", "--out", "runs/b", "--quiet"])
    assert cli.main(["report", "--keep", "results/kept"]) == 0
    assert "2 runs, 1 with a gate that does not hold" in capsys.readouterr().out
    assert Path("runs/report.html").read_text().count("<tr") == 3
    kept = Path("results/kept.json").read_text()
    assert len(json.loads(kept)) == 2 and str(tmp_path) not in kept


def test_report_names_a_broken_record(tmp_path):
    (tmp_path / "metrics.json").write_text('{"notebook": ')
    with pytest.raises(DataError, match="metrics.json"):
        report.collect(tmp_path)


# Folders and records

def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        notebook.run_folder("dpo", out=tmp_path / "file" / "dpo")


def test_read_only_output_folder(tmp_path, monkeypatch, sample, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere: let the system call say what it says to others
        import tempfile

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied", str(locked))
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert cli.main(["run", sample, "--out", str(locked), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "locked" in error and "Permission denied" in error and "out=" in error
    assert list(locked.iterdir()) == []


def test_a_full_disk_leaves_no_half_written_record(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text('{"old": 1}')

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        write_json(tmp_path / "metrics.json", {"new": 2})
    assert (tmp_path / "metrics.json").read_bytes() == b'{"old": 1}'


def test_not_a_number_never_passes_a_gate(tmp_path):
    lost = {"value": float("nan"), "low": float("nan"), "high": 1.0, "n": 1}
    with pytest.raises(GateFailed):
        notebook.finish("x", backend="torch", out=tmp_path, effect=lost)
    assert json.loads((tmp_path / "metrics.json").read_text())["effect"]["low"] is None


def test_run_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("REALIGN_RUNS", str(tmp_path))
    assert notebook.run_folder("dpo", "torch") == (tmp_path / "dpo-torch").resolve()


def test_notebooks_folder_outside_a_checkout(tmp_path, monkeypatch):
    import realign_core
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(realign_core, "__file__", str(tmp_path / "site" / "realign_core" / "__init__.py"))
    with pytest.raises(ReAlignError, match="checkout"):
        cli.notebooks_folder()


@pytest.mark.parametrize(("message", "calls", "error"), [
    ("Kernel didn't respond in 60 seconds", 2, ""), ("Kernel died before replying to kernel_info", 2, ""),
    ("Kernel died", 1, "RuntimeError: Kernel died")])
def test_a_kernel_that_does_not_come_up_is_started_once_more(tmp_path, monkeypatch, message, calls, error):
    import papermill
    seen = []
    def execute(*args, **kwargs):
        seen.append(args)
        if len(seen) == 1:
            raise RuntimeError(message)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    outcome = cli.run_notebook(cli.find_notebook("quickstart"), {}, tmp_path, progress=False)
    assert len(seen) == calls and outcome.error == error
