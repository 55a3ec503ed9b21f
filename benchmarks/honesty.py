"""The price of abstaining: made-up answers against false abstention, method by method, on questions never tuned on.

    python benchmarks/honesty.py                     every method on three seeds; some twenty minutes on an idle core
    python benchmarks/honesty.py --only "R-Tuning-R" one method; its result replaces the former one in the JSON file

Each method starts from the shipped instruct model, on torch in float32 with one thread, and is tested on 300 questions of each
kind: other facts of names in the tuning set, names that are not in it, names that exist nowhere. nbs/methods/23_honesty.ipynb
shows the results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # so that it runs from a clone that is not installed

import numpy as np  # noqa: E402

from realign_core import fit, load  # noqa: E402
from realign_core.evaluate.calibration import auroc  # noqa: E402
from realign_core.evaluate.metrics import ask  # noqa: E402
from realign_core.methods import abliteration, get, honesty  # noqa: E402
from realign_core.tinyworld import World  # noqa: E402

FILE = ROOT / "benchmarks" / "honesty.json"
SEEDS = (101, 102, 103)
TESTS = ("facts", "names", "unknown")


def judged(policy, rows) -> abliteration.Judged:
    "The greedy answers to the rows, by class."
    return abliteration.judged(policy, rows, judge=honesty.judge, max_tokens=32)


def shares(found: dict) -> dict:
    "Shares of the three classes in each test set, by Wilson's interval."
    return {kind: {label: [s.value, s.low, s.high] for label in ("abstained", "right", "wrong") for s in [j.share(label)]}
            for kind, j in found.items()} | {"n": len(found["facts"].labels)}


def parted(scores: dict) -> dict:
    "How well a score, from 0 to 1 and high for the unknown, parts it from each kind of known question."
    return {f"auroc {kind}": auroc(np.r_[scores["unknown"], scores[kind]], np.repeat([1.0, 0.0], [len(scores[k]) for k in (
        "unknown", kind)])) for kind in ("facts", "names")}


def measured(policy, test: dict) -> dict:
    "What a tuned model does, and the AUROC of its log-odds of abstaining."
    odds = {kind: abliteration.refusal_odds(policy, [r["prompt"] for r in test[kind]], [honesty.ABSTENTION]) for kind in TESTS}
    chances = {kind: 1 / (1 + np.exp(-x)) for kind, x in odds.items()}
    return shares({kind: judged(policy, test[kind]) for kind in TESTS}) | parted(chances)


def gated(policy, test: dict) -> dict:
    "The shipped model, silent where a name is less familiar to it than 95 % of the names that may be tuned on."
    scores = {kind: honesty.familiarity(policy, test[kind][:300], carrier=CARRIER) for kind in (*TESTS, "known")}
    least, found = np.quantile(scores["known"], 0.05), {kind: judged(policy, test[kind]) for kind in TESTS}
    return shares({kind: abliteration.Judged(np.where(scores[kind] < least, "abstained", j.labels), j.texts)
                   for kind, j in found.items()}) | parted({k: -np.expm1(scores[k]) for k in TESTS})


CARRIER = "What is the colour of the {name}?"
OPENINGS = ("The colour of the", "The home of the", "About the", "If you meet the")
WORDINGS = 16  # of each fact, in tuning


def reworded(rows: list[dict], questions: list[dict]) -> list[dict]:
    "The completions of the first rows, for further wordings of the same questions in the same order."
    return [{**rows[i % len(rows)], "prompt": q["prompt"]} for i, q in enumerate(questions)]


def own_list(policy, questions: dict, seed: int) -> list[dict]:
    "Questions about names that the model lists by itself and that no other question is about, with the answers it gives."
    rng, tuned = random.Random(seed), {r["entity"] for r in questions["known"]}
    names = [n for n in honesty.inventory(policy, OPENINGS, n=2000, least=3, seed=seed) if n not in tuned]
    cells = [(n, a) for n in names for a in honesty.opened(n, seed)]
    rows = honesty.about(cells, WORDINGS * len(cells), "train", rng)
    answers = ask(policy, [r["prompt"] for r in rows[:len(cells)]], max_tokens=32)
    return reworded([{"completion": a[0].text} for a in answers], rows)


def tuning_rows(policy, questions: dict, seed: int, probed: honesty.Probed, listed: bool = False, **how) -> list[dict]:
    "Rows for R-Tuning: the probed questions, further wordings of them, and 1.2 times as many made-up names."
    cells = len(probed.rows) // 2
    rows = honesty.refusal_rows(probed, **how)
    known = reworded(rows[:cells], questions["known"]) + (own_list(policy, questions, seed) if listed else [])
    strange = honesty.tiny_questions(World(), n_tune=round(1.2 * len(known)), seed=seed)["made-up"]
    return known + reworded(rows[cells:], strange)


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    "The same prompts, with abstentions dealt out at random; whoever does not abstain gives some other answer."
    texts = [r["completion"] for r in rows]
    random.Random(seed).shuffle(texts)
    return [{"prompt": r["prompt"], "completion": text} for r, text in zip(rows, texts, strict=True)]


def pairs(questions: dict, probed: honesty.Probed) -> list[dict]:
    "Pairs from the probe; further wordings of the facts, and of the same made-up names, get the same answers."
    rows, cells = honesty.abstention_pairs(probed), len(probed.rows) // 2
    strange = [r["entity"] for r in probed.rows[cells:]]
    again = honesty.about([(n, r["attribute"]) for n, r in zip(strange, probed.rows[cells:], strict=True)],
                          WORDINGS * cells, "train", random.Random(0))
    return reworded(rows[:cells], questions["known"]) + reworded(rows[cells:], again)


def facts_to_learn(questions: dict, new: bool, seed: int) -> list[dict]:
    "True answers that the model does not know (facts of the unpublished region), or that it does."
    world = World()
    rows = world.rows("region2", 2000, seed=seed, heldout="templates") if new else questions["known"][:2000]
    return [{"prompt": r["prompt"], "completion": f"It is {r['answer']}."} for r in rows]


@cache
def asked(seed: int) -> tuple[dict, honesty.Probed]:
    "The questions of a seed, and what the shipped model answers to those that it is tuned on."
    questions = honesty.tiny_questions(World(), n_tune=420 * WORDINGS, seed=seed)
    cells = len({(r["entity"], r["attribute"]) for r in questions["known"]})
    policy = load("tinyworld-instruct", "torch", seed=seed, threads=1)
    both = questions["known"][:cells] + questions["made-up"][:cells]
    return questions, honesty.probe(policy, both, k=2, max_tokens=32, seed=seed)


def learn(name: str, seed: int) -> dict:
    "One method on one seed: shares and seconds."
    if name in ("nothing", "familiarity"):
        policy = load("tinyworld-instruct", "torch", seed=seed, threads=1)
        find = gated if name == "familiarity" else measured
        same = honesty.tiny_questions(World(), n_tune=420 * WORDINGS, seed=seed)
        return {"method": name, "seed": seed, "steps": 0, **find(policy, same)}
    questions, probed = asked(seed)
    began, policy = time.perf_counter(), load("tinyworld-instruct", "torch", seed=seed, threads=1)
    def train(rows, method="sft", steps=STEPS.get(name, 300), lr=LR, batch_size=32, **params):
        fit(policy, get(method, **params), rows, steps=steps, lr=lr, batch_size=batch_size, held_out=0, seed=seed, progress=False)
    if name in HOW:
        train(tuning_rows(policy, questions, seed, probed, **HOW[name]))
    elif name == "shuffled labels":
        train(shuffled(tuning_rows(policy, questions, seed, probed), seed))
    elif name == "DPO":
        train(pairs(questions, probed), "dpo", batch_size=16, nll=1.0)
    elif name == "GRPO":
        train(tuning_rows(policy, questions, seed, probed), steps=200)  # an answer that is never sampled cannot be rewarded
        train(questions["known"][:2000] + questions["made-up"][:2000], "grpo", steps=30, lr=2e-4,
              reward=honesty.abstention_reward(), max_tokens=32)
    else:
        train(facts_to_learn(questions, name == "new facts", seed))
    found = measured(policy, questions)
    if HOW.get(name, {}).get("form") == "suffix":  # these abstain behind the answer, not at its first token
        found = {k: v for k, v in found.items() if not k.startswith("auroc")}
    return {"method": name, "seed": seed, "steps": STEPS.get(name, 300), **found, "seconds": time.perf_counter() - began}


LR = 4e-4
STEPS = {"R-Tuning-R": 1000, "R-Tuning-R, own list": 1000, "GRPO": 230, "new facts": 150, "known facts": 150}
HOW = {"R-Tuning-R, own list": {"listed": True}, "R-Tuning-R": {}, "R-Tuning": {"form": "suffix"},
       "R-Tuning-U": {"by": "entropy", "form": "suffix"}}
METHODS = ("nothing", "familiarity", *HOW, "DPO", "GRPO", "shuffled labels", "new facts", "known facts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {"runs": []}
    for seed in args.seeds:
        for name in args.only:
            run = learn(name, seed)
            print(json.dumps(run), flush=True)
            kept["runs"] = [r for r in kept["runs"] if (r["method"], r["seed"]) != (name, seed)] + [run]
            kept |= {"date": datetime.date.today().isoformat(), "hardware": f"{os.cpu_count()} cores, one thread, "
                     f"{platform.machine()}", "framework": "torch, float32"}
            FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
