"""GRPO of ReAlign, TRL and mlx-lm-lora: whole steps, answers written and learned from, timed side by side.

    python benchmarks/online.py                          every comparison, on both models
    python benchmarks/online.py --only trl --sizes large one of them; its result replaces the former one in online.json
    python benchmarks/online.py --only trl --variant own the peer as it comes: what it chooses for itself stays

As in peers.py, both sides run at the same time, each in a process of its own, and take turns: ours does a step, then theirs a
step on the same prompts. The first step is not counted; the ratio is the median over the pairs of the others, in `--rounds`
fresh processes with other prompts. nbs/hardware/01_online.ipynb shows the results and says what was held equal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import LORA, ROOT, cores, keep, one_round, prepare, processor, python_for, versions

BACKENDS = {"trl": "torch", "mlx-lm-lora": "mlx"}
# Answers per second, ours over theirs at least; peak memory, ours over theirs at most.
TARGETS = {"trl": {"grpo": (3.0, 0.5)}, "mlx-lm-lora": {"grpo": (2.0, None)}}
# prompts a step, steps of which the first is not counted, learning rate
SIZES = {"small": {"prompts": 8, "steps": 9, "lr": 2e-3}, "large": {"prompts": 1, "steps": 5, "lr": 2e-3}}
SETTINGS = {"n": 8, "max_tokens": 64, "beta": 0.04, "clip": 0.2}
PROMPT = 128  # tokens of a prompt of the large model


def prompts(size: str, n: int, seed: int) -> list[dict]:
    "Sums of the tiny world with the number that is right, or random words without."
    if size == "small":
        from realign_core.data.verifiable import sums
        return [{"prompt": row["problem"], "solution": str(row["verify"]["value"])} for row in sums(n, seed=seed)]
    import numpy as np
    rng = np.random.default_rng(seed)
    return [{"prompt": " ".join(f"w{i}" for i in rng.integers(0, 31996, PROMPT - 1)), "solution": ""} for _ in range(n)]


def make_plan(work: Path, size: str, peer: str, seed: int, args: argparse.Namespace) -> dict:
    "All that both sides need: rows as text for ours, as token ids in `fit`'s order for theirs."
    from realign_core.data.formats import read
    from realign_core.engine.batching import Order
    from realign_core.engine.encoding import Encoder, encode_rows, load_tokenizer
    from realign_core.methods import registry
    backend, batch, steps = BACKENDS[peer], SIZES[size]["prompts"], args.steps or SIZES[size]["steps"]
    snapshot, adapters = prepare(work, size, backend, ends=False)
    folder = work / f"{size}-{peer}"
    folder.mkdir(exist_ok=True)
    plain = prompts(size, batch * steps, seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    kind, encoder = registry.get("grpo", max_tokens=SETTINGS["max_tokens"]), Encoder(load_tokenizer(snapshot))
    examples = encode_rows(read(folder / "rows.jsonl", format=kind.format), kind.encode, encoder)
    order = Order([len(e) for e in examples], batch, seed, pool=1).epoch(0)
    plan = {"sides": "online_sides.py", "backend": backend, "threads": args.threads, "steps": steps, "batch": batch,
            "lr": SIZES[size]["lr"], "lora": LORA, "seed": seed, "variant": args.variant, **SETTINGS,
            "snapshot": str(snapshot), "adapters": str(adapters), "folder": str(folder), "rows_file": str(folder / "rows.jsonl"),
            "rows": [{**plain[i], "ids": examples[i].sequences[0].ids.tolist()} for step in order for i in step],
            "order": [[examples[i].row for i in step] for step in order]}
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def summary(runs: list[dict], answers: int) -> dict:
    "Figures of one side: medians over the steps but the first of each run, and every step as it was."
    def later(key): return [value for run in runs for value in run[key][1:]]
    seconds = statistics.median(later("seconds"))
    parts = [part | {"rest": whole - sum(part.values())} for part, whole in zip(later("parts"), later("seconds"), strict=True)]
    return {"seconds_per_step": seconds, "completions_per_second": answers / seconds,
            "tokens_per_second": answers * statistics.median(
                length / whole for length, whole in zip(later("length"), later("seconds"), strict=True)),
            "parts": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
            **{key: statistics.median(run[key] for run in runs) for key in ("peak_mib", "loaded_mib")},
            **{names: [run[key] for run in runs] for key, names in
               (("seconds", "seconds"), ("loss", "losses"), ("reward", "rewards"), ("length", "lengths"))}}


def compare(work: Path, size: str, peer: str, python: str, args: argparse.Namespace) -> dict:
    "One comparison, as it goes into online.json."
    ours, theirs, ratios, cpu = [], [], [], []
    for seed in range(args.rounds):
        plan = make_plan(work, size, peer, seed, args)
        a, b = one_round(plan, peer, python, stock=args.variant == "own")
        ours.append(a)
        theirs.append(b)
        ratios += [y / x for x, y in zip(a["seconds"][1:], b["seconds"][1:], strict=True)]
        cpu += [y / x for x, y in zip(a["cpu"][1:], b["cpu"][1:], strict=True)]
    answers = plan["batch"] * plan["n"]
    a, b = summary(ours, answers), summary(theirs, answers)
    return {"size": size, "peer": peer, "variant": args.variant, "backend": plan["backend"], "prompts": plan["batch"],
            "completions": answers, "prompt_tokens": statistics.mean(len(row["ids"]) for row in plan["rows"]), **SETTINGS,
            "lr": plan["lr"], "steps": plan["steps"], "rounds": args.rounds, "threads": args.threads,
            "pairs_timed": len(ratios), "ours": a, "theirs": b, "ratio": statistics.median(ratios), "ratio_low": min(ratios),
            "ratio_high": max(ratios), "ratios": ratios, "cpu_ratio": statistics.median(cpu),
            "memory_ratio": a["peak_mib"] / b["peak_mib"],
            "grown_ratio": (a["peak_mib"] - a["loaded_mib"]) / (b["peak_mib"] - b["loaded_mib"])}


def shown(key: str, r: dict) -> str:
    def side(s): return f"{s['completions_per_second']:.2f}/s {s['tokens_per_second']:.0f} tokens/s {s['peak_mib']:.0f} MiB " \
        f"(loaded {s['loaded_mib']:.0f}) " + " ".join(f"{name} {1e3 * t:.0f}" for name, t in s["parts"].items()) + " ms"
    return (f"{key}: {r['ratio']:.2f}x ({r['ratio_low']:.2f} to {r['ratio_high']:.2f}; CPU time {r['cpu_ratio']:.2f}x), memory "
            f"{r['memory_ratio']:.2f}x, grown {r['grown_ratio']:.2f}x\n  ours   {side(r['ours'])}\n  theirs {side(r['theirs'])}")


def measure(work: Path, size: str, peer: str, args: argparse.Namespace) -> bool:
    "Make one comparison, keep and print it; False when it failed."
    key, load = f"{size} {peer} {args.variant}", os.getloadavg()[0]
    try:
        python = python_for(peer, args.envs)
        result = compare(work, size, peer, python, args)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"{key}: failed: {error}", flush=True)
        return False
    keep(args.out, "results", key, {
        **result, "date": f"{datetime.date.today()}", "python": platform.python_version(), "load_before": load,
        "machine": f"{platform.machine()}, {cores()} cores", "processor": processor(),
        "versions": versions(sys.executable) | versions(python)}, TARGETS)
    print(shown(key, result), flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), help="peers; default: all")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--variant", choices=["tuned", "own"], default="tuned",
                        help="the peer with the settings that are fastest here, or with its own")
    parser.add_argument("--steps", type=int, help="steps of a round, the first not counted")
    parser.add_argument("--rounds", type=int, default=3, help="times that each comparison is made in fresh processes")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each side; default: all cores")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "realign" / "peers",
                        help="where the peers' environments are, or are made")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="online-") as folder:
        return int(not all([measure(Path(folder), size, peer, args) for size in args.sizes for peer in args.only]))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
