"""How long `check` and `convert` take for 100,000 and 1,000,000 mixed rows, and how much memory.

    python benchmarks/data_check.py [--rows 100000 1000000] [--out benchmarks/data_check.json]

Each measurement runs in a process of its own. Peak memory is that process's largest resident set, interpreter included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ("river stone morning bridge teacher garden answer seven little under never carry window paper silver question "
         "because order market travel winter story island number").split()


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high))).capitalize() + "."


def row(rng: random.Random, n: int) -> dict:
    "One row of eight formats in turn, about 350 bytes long, with a number that keeps it unique."
    text, kind = lambda low, high: sentence(rng, low, high), n % 8
    prompt = f"{n}: {text(8, 20)}"
    if kind == 0:
        return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt},
                             {"role": "assistant", "content": text(15, 40)}]}
    if kind == 1:
        return {"prompt": prompt, "chosen": text(8, 30), "rejected": text(8, 30), "chosen_score": rng.random(),
                "rejected_score": rng.random(), "strategy": "rubric"}
    if kind == 2:
        return {"prompt": prompt, "completion": text(20, 50), "label": rng.random() < 0.65}
    if kind == 3:
        return {"instruction": prompt, "input": text(3, 10), "output": text(20, 45)}
    if kind == 4:
        return {"prompt": prompt, "responses": [{"text": text(6, 14), "score": round(rng.random(), 3)} for _ in range(4)]}
    if kind == 5:
        return {"problem": prompt, "solution": str(n), "responses": [{"text": text(8, 16), "correct": rng.random() < 0.5}] * 3,
                "verify": {"name": "number", "tolerance": 0.5}}
    if kind == 6:
        return {"text": f"{n} {text(40, 70)}"}
    return {"problem": prompt, "reasoning": text(20, 50), "answer": str(n)}


def generate(path: Path, rows: int, chat: bool) -> None:
    "Rows of all formats; or, to be converted into messages, of those that can become messages."
    rng, kinds = random.Random(0), (0, 3, 7)
    with path.open("w") as file:
        for n in range(rows):
            file.write(json.dumps(row(rng, kinds[n % 3] + 8 * n if chat else n)) + "\n")


MEASURE = """
import json, resource, sys, time
task, source, out = sys.argv[1:4]
begun = time.perf_counter()
if task == "check":
    from realign_core.data.checking import check
    report = check(source, "mixed")
    assert report.ok, report.shown
    found = report.rows
else:
    from realign_core.data.converting import convert
    found = convert(source, "messages", out).rows_out
used = resource.getrusage(resource.RUSAGE_SELF)
peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps({"seconds": time.perf_counter() - begun, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": peak,
                  "found": found}))
"""


def measure(task: str, source: Path, out: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", MEASURE, task, str(source), str(out)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            for task, chat in (("check", False), ("convert to Parquet", True)):
                source = Path(folder) / "rows.jsonl"
                generate(source, rows, chat)
                found = measure(task, source, Path(folder) / "rows.parquet")
                assert found.pop("found") == rows
                results.append({"task": task, "rows": rows, "mb": source.stat().st_size / 1e6, **found})
                print("{task:<20} {rows:>9,} rows {mb:6.0f} MB {seconds:7.1f} s {cpu_seconds:7.1f} CPU s {peak_mib:6.0f} MiB"
                      .format(**results[-1]), flush=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(), "load": load,
              "results": results}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
