"""Everything that has to hold before a commit: `make test` runs this.

Exports, clean notebooks, README and style come first, because they take seconds; the tests come last. What the first
two change they leave changed, so running this twice mends what it complained about.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = os.environ.get("REALIGN_WORKERS", "2")


def run(*command: str) -> tuple[int, str]:
    "Run a command in the project's folder, show what it prints, and return its status and its last line."
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing when it is set
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shown = b""
    while piece := os.read(process.stdout.fileno(), 4096):  # by pieces, not by lines: pytest prints a dot at a time
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        shown = (shown + piece)[-4096:]
    lines = [line.strip() for line in shown.decode(errors="replace").splitlines() if line.strip()]
    return process.wait(), lines[-1] if lines else ""


def hashes(*patterns: str) -> dict[str, str]:
    "A digest of every file that a step may rewrite."
    files = [p for pattern in patterns for p in ROOT.glob(pattern) if "__pycache__" not in p.parts]
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


def unchanged(command: str, *patterns: str) -> tuple[int, str]:
    "Run `command`; fail when it changes a file that matches `patterns`."
    before = hashes(*patterns)
    status, _ = run(sys.executable, "-c", command)
    after = hashes(*patterns)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return (1, "changed " + ", ".join(changed)) if changed else (status, "")


def steps() -> list[tuple[str, object]]:
    "Name and call of each step, in order."
    pytest = [sys.executable, "-m", "pytest", "-n", WORKERS, "--maxschedchunk", "1", "--durations", "15", *sys.argv[1:]]
    export = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()"
    return [
        ("the package is what the notebooks export", lambda: unchanged(export, "realign_core/**/*.py", "pyproject.toml")),
        ("the notebooks are clean", lambda: unchanged(clean, "nbs/**/*.ipynb")),
        ("README.md and the sidebar are up to date", lambda: run(sys.executable, "tools/site.py", "--check")),
        ("ruff finds nothing", lambda: run(sys.executable, "-m", "ruff", "check", "--output-format", "concise", ".")),
        ("the tests pass, notebooks included", lambda: run(*pytest)),
    ]


def main() -> int:
    "Run every step, whatever the ones before it said, and end with a summary."
    results = []
    for name, step in steps():
        print(f"\n── {name} ──", flush=True)
        began = time.monotonic()
        status, note = step()
        results.append((name, status, time.monotonic() - began, note))
    print("\n── summary ──")
    for name, status, seconds, note in results:
        print(f"  {'ok  ' if status == 0 else 'FAIL'}  {name:<44} {seconds:6.0f} s{'' if status == 0 else '   ' + note}")
    print(re.sub(r"\x1b\[[0-9;]*m", "", results[-1][3]), flush=True)  # pytest's closing line
    return 1 if any(status for _, status, _, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
