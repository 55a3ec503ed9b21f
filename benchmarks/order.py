"""The recommended order of training and one changed order, with a scorecard after every stage, on questions never tuned on.

    python benchmarks/order.py                  both orders on three seeds, torch; half an hour on an idle core
    python benchmarks/order.py --backend mlx    the same on MLX; its results stand beside the others in the JSON file

What is done is kept in the folder of --out, so a run that was stopped goes on there. Float32, one thread. Every stage is
measured on 130 held-out questions of each kind, the same for both orders. nbs/workflows/04_order.ipynb shows the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # so that it runs from a clone that is not installed

import numpy as np  # noqa: E402

from realign_core.evaluate.metrics import Interval  # noqa: E402
from realign_core.workflows import order  # noqa: E402

FILE = ROOT / "benchmarks" / "order.json"
SEEDS = (101, 102, 103)
ORDERS = {"recommended": order.ORDER, "changed": order.CHANGED}


def share_prefix(done: Path, folder: Path, name: str) -> None:
    "Copy the stages that both orders begin with, which are the same to the bit."
    for i, (a, b) in enumerate(zip(ORDERS["recommended"], ORDERS[name], strict=True), 1):
        if a != b:
            return
        if not (folder / f"{i}-{a}" / "stage.json").is_file():
            shutil.copytree(done / f"{i}-{a}", folder / f"{i}-{a}", dirs_exist_ok=True)


def run(place: Path, backend: str, seed: int) -> dict[str, dict]:
    "Both orders on one seed: order -> stage -> what it left."
    kit, found = order.tiny_kit(backend, seed), {}
    for name, stages in ORDERS.items():
        folder = place / f"{backend}-{seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        if name != "recommended":
            share_prefix(place / f"{backend}-{seed}-recommended", folder, name)
        # nothing blocks here: what a stage did not do belongs into the record
        found[name] = order.workflow(stages, kit).run(folder, least=-9.0).outputs
    return found


def pooled(cards: list[order.Scores]) -> order.Scores:
    "The questions of all seeds as one set; the KL is the mean, with the widest ends."
    def joined(columns): return {key: [x for c in columns for x in c[key]] for key in columns[0]}
    kls = [card.kl for card in cards]
    apart = Interval(float(np.mean([k.value for k in kls])), min(k.low for k in kls), max(k.high for k in kls),
                     sum(k.n for k in kls), kls[0].unit)
    return order.Scores(joined([c.values for c in cards]), joined([c.claims for c in cards]), apart)


def together(runs: list[dict]) -> dict:
    "The outputs of all seeds as those of one run."
    def as_dict(card): return asdict(card) | {"kl": card.kl}
    found = {}
    for stage, first in runs[0].items():
        starts = [order.Scores(**r[stage].start) for r in runs if r[stage].start]
        found[stage] = replace(first, scores=as_dict(pooled([r[stage].card for r in runs])),
                               start=as_dict(pooled(starts)) if starts else {})
    return found


def plain(value):
    "Intervals as dictionaries, numbers with as many digits as they can have."
    if isinstance(value, Interval):
        return plain(asdict(value))
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def summary(outputs: dict[str, dict]) -> dict:
    "Scorecards of both orders, what is kept, and where they end up against each other."
    end = {name: list(found.values())[-1].card for name, found in outputs.items()}
    return {"lines": {name: order.lines(found) for name, found in outputs.items()},
            "kept": {name: [{"figure": f.name, "measured": f.measured, "holds": f.holds} for f in
                            order.kept(found, order.MINE).figures] for name, found in outputs.items()},
            "changed against recommended": end["changed"].against(end["recommended"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "order-benchmark", help="where snapshots go")
    args = parser.parse_args()
    found = {seed: run(args.out, args.backend, seed) for seed in args.seeds}
    made = {"hardware": f"{os.cpu_count()} cores, one thread, {platform.machine()}", "date": datetime.date.today().isoformat(),
            "framework": f"{args.backend}, float32", "seeds": list(found),
            "each seed": {str(seed): summary(each) for seed, each in found.items()},
            "all seeds": summary({name: together([each[name] for each in found.values()]) for name in ORDERS})}
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    FILE.write_text(json.dumps(kept | {args.backend: plain(made)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
