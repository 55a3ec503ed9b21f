"""The price of abstaining: made-up answers against false abstention, method by method, on questions never tuned on.

    python benchmarks/honesty.py                     every method on three seeds; some thirty minutes on an idle core
    python benchmarks/honesty.py --only "R-Tuning-R" one method; its result replaces the former one in the JSON file
    python benchmarks/honesty.py --control           the page's control on further seeds

Each method starts from the shipped instruct model, on torch in float32 with one thread, and is tested on 300 questions of each
kind: other facts of names in the tuning set, names that are not in it, names that exist nowhere. All that are tuned see the same
questions, 16 answers a step. nbs/methods/23_honesty.ipynb shows the results.

Runs under "earlier" in the JSON file were made by this script as it was in commit 21e85ba: 1000 steps of 32 answers, sampled
by the model, and 150 steps for facts.
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
from realign_core.evaluate.calibration import auroc, risk_coverage  # noqa: E402
from realign_core.evaluate.metrics import ask  # noqa: E402
from realign_core.methods import abliteration, get, honesty, lora  # noqa: E402
from realign_core.tinyworld import World  # noqa: E402

FILE = ROOT / "benchmarks" / "honesty.json"
SEEDS = (101, 102, 103)
TESTS = ("facts", "names", "unknown")
SILENT = ("abstained", "refused")
LR, LORA_LR, BATCH, WORDINGS = 4e-4, 3e-3, 16, 16  # wordings of each fact, in tuning
CARRIER = "What is the colour of the {name}?"
OPENINGS = ("The colour of the", "The home of the", "About the", "If you meet the")


def shipped(seed: int, **how):
    return load("tinyworld-instruct", "torch", seed=seed, threads=1, **how)


# What is asked

@cache
def asked(seed: int) -> dict:
    "The questions of a seed."
    return honesty.tiny_questions(World(), n_tune=420 * WORDINGS, seed=seed)


@cache
def before(seed: int) -> dict:
    "What the shipped model answers to the test questions."
    return {kind: abliteration.judged(shipped(seed), asked(seed)[kind], judge=honesty.judge, max_tokens=32) for kind in TESTS}


@cache
def listed(seed: int) -> list[dict]:
    "Questions about names that the model lists by itself and that no other question is about."
    taken = {r["entity"] for r in asked(seed)["known"]}
    names = [n for n in honesty.inventory(shipped(seed), OPENINGS, n=2000, least=3, seed=seed) if n not in taken]
    cells = [(n, a) for n in names for a in honesty.opened(n, seed)]
    return honesty.about(cells, WORDINGS * len(cells), "train", random.Random(seed))


def own(seed: int, rows: list[dict]) -> list[dict]:
    "The rows with the shipped model's greedy answer, which it is asked for in one wording of each question."
    firsts = list({(r["entity"], r["attribute"]): r for r in rows}.values())
    said = {(r["entity"], r["attribute"]): a[0].text
            for r, a in zip(firsts, ask(shipped(seed), [r["prompt"] for r in firsts], max_tokens=32), strict=True)}
    return [{**r, "completion": said[r["entity"], r["attribute"]]} for r in rows]


@cache
def answered(seed: int, own_list: bool) -> tuple[list[dict], list[dict]]:
    "Questions of known names, the user's and perhaps the model's own, and 1.2 times as many of 5000 made-up ones, with answers."
    known = asked(seed)["known"] + (listed(seed) if own_list else [])
    strange = honesty.tiny_questions(World(), n_tune=5000, seed=seed)["made-up"]
    again = honesty.about([(r["entity"], r["attribute"]) for r in strange], round(1.2 * len(known)), "train", random.Random(seed))
    return own(seed, known), own(seed, again)


# What is learned

def replaced(seed: int, own_list: bool = True) -> list[dict]:
    "R-Tuning-R: to abstain in place of what it makes up."
    known, strange = answered(seed, own_list)
    return known + [{**r, "completion": honesty.ABSTENTION} for r in strange]


def suffixed(seed: int) -> list[dict]:
    "R-Tuning: its answer, then how sure."
    return [{**r, "completion": f"{r['completion']} {said}"} for rows, said in
            zip(answered(seed, True), (honesty.SURE, honesty.UNSURE), strict=True) for r in rows]


def by_entropy(seed: int) -> list[dict]:
    "R-Tuning-U: the same by the entropy of four samples, for each known fact and for 500 made-up names."
    known, strange = answered(seed, True)
    cells = {(r["entity"], r["attribute"]): r for r in known} | {(r["entity"], r["attribute"]): r for r in strange[:500]}
    lost = dict(zip(cells, honesty.unsure(honesty.probe(shipped(seed), list(cells.values()), k=4, max_tokens=32, seed=seed),
                                          by="entropy", share=0.5), strict=True))
    again = own(seed, honesty.about([(r["entity"], r["attribute"]) for r in strange[:500]], len(strange), "train",
                                    random.Random(seed)))
    return [{**r, "completion": f"{r['completion']} {honesty.UNSURE if lost[r['entity'], r['attribute']] else honesty.SURE}"}
            for r in known + again]


def pairs(seed: int) -> list[dict]:
    "For DPO: its answer before abstaining where it knows, abstaining before its answer where it makes up."
    known, strange = answered(seed, True)
    return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": honesty.ABSTENTION} for r in known] + [
        {"prompt": r["prompt"], "chosen": honesty.ABSTENTION, "rejected": r["completion"]} for r in strange]


def facts_to_learn(seed: int, new: bool) -> list[dict]:
    "True answers that the model does not know (facts of the unpublished region), or that it does."
    rows = World().rows("region2", 2000, seed=seed, heldout="templates") if new else asked(seed)["known"][:2000]
    return [{"prompt": r["prompt"], "completion": f"It is {r['answer']}."} for r in rows]


# What comes of it

def silence(policy, rows: list[dict], texts: list[str], suffix: bool) -> np.ndarray:
    "Log-odds of abstaining: at the start of the answer, or behind it."
    if not suffix:
        return abliteration.refusal_odds(policy, [r["prompt"] for r in rows], [honesty.ABSTENTION, "I cannot help with that."])
    odds, stems = np.empty(len(rows)), np.array([bare(text) for text in texts])
    for stem in set(stems):
        at = np.flatnonzero(stems == stem)
        odds[at] = np.subtract(*(abliteration.refusal_odds(policy, [rows[i]["prompt"] for i in at], [f"{stem} {said}"])
                                 for said in (honesty.UNSURE, honesty.SURE)))
    return odds


def bare(text: str) -> str:
    "An answer without what it says about how sure it is."
    for said in (honesty.SURE, honesty.UNSURE):
        text = text.replace(said, "")
    return text.strip() or "It is"


def ranked(scores: dict, kind: str) -> tuple[np.ndarray, np.ndarray]:
    "Ranks from 0 to 1 of the known and the unknown together, and which are known."
    s = np.concatenate([scores[k] for k in (kind, "unknown")])
    return np.searchsorted(np.unique(s), s) / len(s), np.repeat([1.0, 0.0], [len(scores[kind]), len(scores["unknown"])])


def letters(labels: np.ndarray) -> str:
    "One letter a question: abstained, right or wrong."
    return "".join("a" if x in SILENT else x[0] for x in labels)


def record(labels: dict, scores: dict, right: dict) -> dict:
    """What is kept of a run: a letter for each test question; AUROC and risk at twenty coverages by a score, high for the known.

    `right` says of each question whether it would be answered rightly if it had to be."""
    kept: dict = {"labels": {k: letters(labels[k]) for k in TESTS}}
    for kind in ("facts", "names"):
        s, known = ranked(scores, kind)
        risk = risk_coverage(s, np.concatenate([right[kind], right["unknown"]]).astype(float))[1]
        kept |= {f"auroc {kind}": round(auroc(s, known), 4), f"aurc {kind}": round(float(risk.mean()), 4),
                 f"risk {kind}": [round(float(risk[round(c / 20 * len(risk)) - 1]), 4) for c in range(1, 21)]}
    return kept


def measured(policy, seed: int, suffix: bool = False) -> dict:
    "What a tuned model does."
    found = {kind: abliteration.judged(policy, asked(seed)[kind], judge=honesty.judge, max_tokens=32) for kind in TESTS}
    scores = {k: -silence(policy, asked(seed)[k], found[k].texts, suffix) for k in TESTS}
    if suffix:
        right = {k: np.array([honesty.judge(row, bare(text)) == "right" for row, text in
                              zip(asked(seed)[k], found[k].texts, strict=True)]) for k in TESTS}
    else:  # where it abstains, the shipped model is asked in its place
        right = {k: np.where(np.isin(found[k].labels, SILENT), before(seed)[k].labels, found[k].labels) == "right" for k in TESTS}
    return record({k: found[k].labels for k in TESTS}, scores, right)


def untrained(name: str, seed: int) -> dict:
    "The shipped model, silent where a score is below that of 95 % of the known names that may be tuned on."
    policy, questions = shipped(seed), {**{k: asked(seed)[k] for k in TESTS}, "known": asked(seed)["known"][:300]}
    if name == "familiarity":
        scores = {k: honesty.familiarity(policy, rows, carrier=CARRIER) for k, rows in questions.items()}
    elif name == "self-consistency":
        scores = {k: honesty.probe(policy, rows, k=5, max_tokens=32, seed=seed).agreement for k, rows in questions.items()}
    else:
        scores = {k: np.array([a[0].logps.sum() for a in ask(policy, [r["prompt"] for r in rows], max_tokens=32)])
                  for k, rows in questions.items()}
    least = -np.inf if name == "nothing" else np.quantile(scores["known"], 0.05)
    labels = {k: np.where(scores[k] < least, "abstained", before(seed)[k].labels) for k in TESTS}
    return record(labels, scores, {k: before(seed)[k].labels == "right" for k in TESTS})


class Counted:
    "The abstention reward, counting what it pays for."

    def __init__(self) -> None:
        self.pay, self.values = honesty.abstention_reward(right=1, abstain=0, wrong=-1), []

    def __call__(self, row: dict, text: str) -> float:
        self.values.append(self.pay(row, text))
        return self.values[-1]

    def told(self, n: int = 8) -> dict:
        "Answers, abstentions among them, and groups whose rewards are all equal and which teach nothing."
        groups = np.reshape(self.values, (-1, n))
        return {"answers": groups.size, "abstentions": int((groups == 0).sum()), "groups": len(groups),
                "equal groups": int((groups == groups[:, :1]).all(axis=1).sum())}


def train(policy, rows: list[dict], steps: int, seed: int, method: str = "sft", lr: float = LR, batch_size: int = BATCH,
          **params):
    "Tune the policy, and return it."
    fit(policy, get(method, **params), rows, steps=steps, lr=lr, batch_size=batch_size, held_out=0, seed=seed, progress=False)
    return policy


@cache
def cold(seed: int, steps: int):
    "The model after so many steps of R-Tuning-R."
    return train(shipped(seed), replaced(seed), steps, seed)


def rewarded(policy, seed: int, steps: int) -> dict:
    """Train by GRPO on as many known questions as made-up ones; what was sampled.

    About names that the model lists, what it said before counts as right. Advantages are not divided by their deviation, since in
    a group of two rewards they would then be the same whatever the two are."""
    known, strange = answered(seed, True)
    known = [r if r["kind"] == "facts" else {**r, "kind": "facts", "answer": honesty.said(r, r["completion"])} for r in known]
    reward, rng = Counted(), random.Random(seed)
    rows = rng.sample(known, 16 * steps) + rng.sample(strange, 16 * steps)
    train(policy, rows, steps, seed, "grpo", GRPO_LR, 32, reward=reward, max_tokens=32, scale="none")
    return reward.told()


def tuned(name: str, seed: int) -> tuple:
    "The model that a method makes; how many steps; whatever else there is to tell."
    steps, more = STEPS.get(name, EQUAL), {}
    if name in ("new facts", "known facts"):
        return train(shipped(seed), facts_to_learn(seed, name == "new facts"), steps, seed, batch_size=32), steps, more
    if name.startswith("GRPO"):
        policy = shipped(seed) if name == "GRPO" else cold(seed, COLD[name])
        more = {"sampled": rewarded(policy, seed, steps)}
        cold.cache_clear()  # it is not what it was
        return policy, steps + COLD.get(name, 0), more
    if name == "DPO":
        rows = random.Random(seed).sample(pairs(seed), steps * BATCH // 2)  # each is scored by the reference first
        return train(shipped(seed), rows, steps, seed, "dpo", batch_size=BATCH // 2, nll=1.0), steps, more
    if name == "R-Tuning-R":
        return cold(seed, steps), steps, more
    if name.startswith("R-Tuning-R"):
        rows, adapted = replaced(seed, "no list" not in name), "LoRA" in name
        policy = shipped(seed, lora=lora.adapter(rank=16)) if adapted else shipped(seed)
        return train(policy, rows, steps, seed, lr=LORA_LR if adapted else LR), steps, more
    return train(shipped(seed), (suffixed if name == "R-Tuning" else by_entropy)(seed), steps, seed), steps, more


def learn(name: str, seed: int) -> dict:
    "One method on one seed; the seconds are of this process, with the rows that it is tuned on and the test."
    began, steps, more = time.process_time(), 0, {}
    if name in UNTRAINED:
        found = untrained(name, seed)
    else:
        policy, steps, more = tuned(name, seed)
        found = measured(policy, seed, name in ("R-Tuning", "R-Tuning-U"))
    return {"method": name, "seed": seed, "steps": steps, **found, "seconds": round(time.process_time() - began, 1), **more}


EQUAL, GRPO_LR = 400, 1e-4  # steps of every method that is tuned, unless in STEPS
STEPS = {"R-Tuning-R, longer": 1500, "GRPO": 6, "GRPO, cold start": 15,
         "new facts": 150, "known facts": 150}
COLD = {"GRPO, cold start": EQUAL}  # steps of R-Tuning-R before
UNTRAINED = ("nothing", "likelihood", "self-consistency", "familiarity")
TUNED = ("R-Tuning-R, no list", "R-Tuning-R, no list, LoRA", "R-Tuning-R", "R-Tuning-R, LoRA", "R-Tuning-R, longer", "R-Tuning",
         "R-Tuning-U", "DPO", "GRPO", "GRPO, cold start")
METHODS = (*UNTRAINED, *TUNED, "new facts", "known facts")


# The control of the page: how far from zero is one that teaches nothing?

CONTROLS = tuple(range(201, 207))


def control(seed: int) -> dict:
    "The page's control: answers and abstentions dealt out at random, with replay; and its log-odds of abstaining, as AUROC."
    world, policy = World(), shipped(seed)
    questions = honesty.tiny_questions(world, n_tune=24 * 420, seed=seed)
    firsts = list({(r["entity"], r["attribute"]): r for r in questions["known"]}.values())[:280]
    picked = {(r["entity"], r["attribute"]) for r in firsts}
    probed = honesty.probe(policy, firsts + questions["made-up"][:280], k=2, max_tokens=32, seed=seed)
    learned = honesty.refusal_rows(probed, greedy=True)
    again = [r for r in questions["known"] if (r["entity"], r["attribute"]) in picked]
    prompts = again + questions["made-up"][:len(again)]
    texts = [learned[i % 280 + 280 * side]["completion"] for side in (0, 1) for i in range(len(again))]
    random.Random(seed).shuffle(texts)
    others = [r for k in ("arithmetic", "code", "format", "chance", "mood") for r in world.rows(k, 50, seed=seed)]
    texts_of = [a[0].text for a in ask(policy, [r["prompt"] for r in others], temperature=1.0, seed=seed)]
    replay = [{"prompt": r["prompt"], "completion": t} for r, t in zip(others, texts_of, strict=True) if t.strip()]
    rows = [{"prompt": r["prompt"], "completion": t} for r, t in zip(prompts, texts, strict=True)]
    first = {k: silence(policy, questions[k], [], False) for k in TESTS}
    rows += replay * max(1, round(len(rows) / 5 / len(replay)))
    fit(policy, get("sft"), rows, steps=120, lr=5e-4, batch_size=32, held_out=0, seed=seed, progress=False)
    found = {k: abliteration.judged(policy, questions[k], judge=honesty.judge, max_tokens=32).labels for k in TESTS}
    odds = {k: silence(policy, questions[k], [], False) for k in TESTS}

    def apart(odds): return {k: round(auroc(*ranked({q: -x for q, x in odds.items()}, k)), 4) for k in TESTS[:2]}
    return {"seed": seed, "labels": {k: letters(found[k]) for k in TESTS}, "auroc": apart(odds), "auroc before": apart(first)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--control", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds or (CONTROLS if args.control else SEEDS):
        for name in (None,) if args.control else args.only:
            run, kind = (control(seed), "controls") if args.control else (learn(name, seed), "runs")
            print(json.dumps(brief(run)), flush=True)
            kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
            kept[kind] = [r for r in kept.get(kind, []) if (r.get("method"), r["seed"]) != (name, seed)] + [run]
            kept |= {"date": datetime.date.today().isoformat(), "hardware": f"{os.cpu_count()} cores, one thread, "
                     f"{platform.machine()}", "framework": "torch, float32", "n_tune": 420 * WORDINGS}
            FILE.write_text(written(kept))


def brief(run: dict) -> dict:
    "A run's shares, for the screen."
    shares = {kind: {"a": s.count("a") / len(s), "r": s.count("r") / len(s)} for kind, s in run["labels"].items()}
    return {k: v for k, v in run.items() if k != "labels" and not k.startswith("risk")} | {
        k: {c: round(100 * x, 1) for c, x in v.items()} for k, v in shares.items()}


def written(kept: dict) -> str:
    "JSON with a line for each run."
    lists = {k: sorted(v, key=lambda r: (METHODS.index(r["method"]) if "method" in r else 0, r["seed"]))
             for k, v in kept.items() if isinstance(v, list)}
    parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items() if k not in lists]
    parts += [f"{json.dumps(k)}: [\n" + ",\n".join(map(json.dumps, v)) + "\n]" for k, v in lists.items()]
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    main()
