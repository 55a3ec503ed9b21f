"""PPO, GRPO and RLOO side by side: what they learn from equally many answers, how long it takes, and the memory it needs.

    python benchmarks/policy_gradients.py               everything; some five minutes on two cores
    python benchmarks/policy_gradients.py --only memory one part; its result replaces the former one in the JSON file

Every run is a process of its own with one thread, two at a time. Learning: the shipped model, 64 answers a step, the settings
of each method's own page, three seeds. Memory: one step on a random Llama of 60 million parameters, all weights trained,
float32, eight answers of 64 tokens, with one to four models held. nbs/evaluate/05_gradients.ipynb shows the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # so that it runs from a clone that is not installed

FILE = ROOT / "benchmarks" / "policy_gradients.json"
SEEDS, STEPS = (1, 2, 3), 12
LEARNERS = {  # name -> method, its settings, problems a step, learning rate
    "GRPO, 16 × 4": ("grpo", {"n": 4}, 16, 5e-4), "RLOO, 16 × 4": ("rloo", {"n": 4}, 16, 5e-4),
    "PPO, 64 × 1": ("ppo", {"n": 1, "updates": 2, "value_lr": 1e-3}, 64, 3e-4),
    "PPO, 16 × 4": ("ppo", {"n": 4, "updates": 2, "value_lr": 1e-3}, 16, 3e-4)}
HELD = {1: ("grpo", {"beta": 0.0}), 2: ("grpo", {"beta": 0.04}), 3: ("ppo", {"beta": 0.05}), 4: ("ppo", {"beta": 0.05})}


def learn(name: str, seed: int) -> dict:
    "Reward, answers and seconds after every step; held-out accuracy before and after."
    from realign_core import fit, load
    from realign_core.evaluate.metrics import paired
    from realign_core.evaluate.tasks import task_trial
    from realign_core.methods import get
    method, settings, problems, lr = LEARNERS[name]
    trial, policy = task_trial(), load("tinyworld-instruct", "torch", seed=seed, threads=1)
    before = trial.measure(policy, seed)
    run = fit(policy, get(method, **settings), trial.rows, held_out=0, steps=STEPS, lr=lr, batch_size=problems, seed=seed,
              progress=False)
    after = trial.measure(policy, seed)
    gain = paired(before.values["right"], after.values["right"])
    curve = [{"answers": 64 * r["step"], "seconds": r["seconds"], "reward": r["reward"]} for r in run.history if "loss" in r]
    return {"method": name, "seed": seed, "gain": [gain.value, gain.low, gain.high], "n": len(trial.test), "curve": curve}


def memory(models: int) -> dict:
    "Peak memory of one step with so many models held."
    import peers

    from realign_core import fit, load
    from realign_core.engine.history import peak_memory
    from realign_core.methods import get, reward
    name, settings = HELD[models]
    with tempfile.TemporaryDirectory() as folder:
        peers.make_large(Path(folder))
        policy = load(folder, "torch", threads=1)
        policy.stops = set()
        paid = reward.Learned(load(folder, "torch", head="reward", threads=1)) if models == 4 else by_length
        rows = [{"prompt": " ".join(["w1"] * 100)}] * 4
        method = get(name, reward=paid, n=8, max_tokens=64, **settings)
        fit(policy, method, rows, held_out=0, steps=1, batch_size=1, progress=False)
        weights = sum(p.numel() for p in policy.model.parameters())
    return {"models": models, "method": name, "parameters": weights, **peak_memory()}


def by_length(row: dict, answer: str) -> float:
    "A reward that differs between answers."
    return float(len(answer) % 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("learning", "memory"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a child does: part, name, seed
    given = parser.parse_args()
    if given.one:
        part, name, seed = given.one
        print(json.dumps(learn(name, int(seed)) if part == "learning" else memory(int(name))))
        return
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    jobs = {"learning": [(name, seed) for seed in SEEDS for name in LEARNERS], "memory": [(models, 0) for models in HELD]}
    for part in [given.only] if given.only else jobs:
        with ThreadPoolExecutor(2) as pool:  # two at a time, each with one thread
            found[part] = list(pool.map(lambda job, part=part: child(part, *job), jobs[part]))
        found["machine"] = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count(), "processor": platform.machine(),
                            "threads": 1, "dtype": "float32", "backend": "torch"}
        FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def child(part: str, name, seed: int) -> dict:
    "One run in a process of its own."
    print(part, name, seed, flush=True)
    done = subprocess.run([sys.executable, __file__, "--one", part, str(name), str(seed)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
