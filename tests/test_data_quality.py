"""The checks of a data set: planted defects are named by row, and bad input ends in a typed error."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from realign_core.data.formats import read
from realign_core.data.quality import (
    assess_rlvr_verifiability,
    calculate_ifd_score,
    check_reward,
    checklist,
    corruptions,
    length_bias,
    match_lengths,
    validate_dpo_pairs,
)
from realign_core.errors import DataError

WORDS = [f"w{i}" for i in range(300)]


def pairs(n=100, seed=0):
    "Clean pairs: scores apart, lengths balanced, nothing twice."
    rng = random.Random(seed)
    def text(k): return " ".join(rng.sample(WORDS, k))
    scores = {"chosen_score": 0.9, "rejected_score": 0.4}
    return [{"prompt": text(9), "chosen": text(8 + i % 2), "rejected": text(9 - i % 2), **scores} for i in range(n)]


def swap(row):
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"], "chosen_score": row["rejected_score"],
            "rejected_score": row["chosen_score"]}


def turns(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_clean_pairs_pass():
    report = validate_dpo_pairs(pairs())
    assert report.passed and report.bad == [] and report.n == 100


DEFECTS = {
    "order": (lambda r: swap(r), {"order", "margin", "chosen passes"}),
    "two answers": (lambda r: {**r, "rejected": f" {r['chosen']}\n"}, {"two answers"}),
    "margin": (lambda r: {**r, "rejected_score": 0.76}, {"margin"}),
    "chosen passes": (lambda r: {**r, "chosen_score": 0.79}, {"chosen passes"}),
    "same prompt": (lambda r: {**r, "prompt": None, "chosen": turns("a?", r["chosen"]), "rejected": turns("b?", r["rejected"])},
                    {"same prompt"}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_pair_is_named(name):
    spoil, expected = DEFECTS[name]
    rows = pairs()
    rows[37] = spoil(rows[37])
    report = validate_dpo_pairs(rows)
    assert {c.name for c in report.checks.values() if not c.passed} == expected
    assert report[name].rows == (37,) and report.bad == [37] and report.good(rows) == rows[:37] + rows[38:]


def test_swaps_are_seen_by_a_score_function_too():
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in pairs()]
    good = {r["chosen"] for r in rows}
    rows[3], rows[90] = ({**rows[i], "chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]} for i in (3, 90))
    assert validate_dpo_pairs(rows, lambda row, answer: answer in good)["order"].rows == (3, 90)


def test_the_threshold_is_used():
    rows = [{**r, "rejected_score": 0.7} for r in pairs()]
    assert validate_dpo_pairs(rows, gap_threshold=0.2).passed and not validate_dpo_pairs(rows, gap_threshold=0.25).passed
    exactly = [{**r, "chosen_score": 0.85, "rejected_score": 0.70} for r in pairs()]
    assert validate_dpo_pairs(exactly)["margin"].passed, "0.85 - 0.70 is a margin of 0.15"


def test_constant_length_contradictions_and_repeats():
    longer = [{**r, "chosen": r["chosen"] + " x" * 7} for r in pairs()]
    assert not validate_dpo_pairs(longer)["length"].passed
    rows = pairs() + [swap(pairs()[5])]
    assert validate_dpo_pairs(rows)["contradictions"].rows == (100,)
    rows = pairs() + [{**r, "prompt": r["prompt"].upper()} for r in pairs()[:5]]
    assert validate_dpo_pairs(rows)["repeats"].rows == tuple(range(100, 105))


def test_what_is_not_measured_does_not_pass():
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in pairs()]
    report = validate_dpo_pairs(rows)
    assert report["margin"].passed is None and not report.passed
    assert "not measured" in report._repr_markdown_()


def test_typed_rows_and_implicit_prompts():
    rows = [{**{k: v for k, v in r.items() if k != "prompt"}, "chosen": turns(r["prompt"], r["chosen"]),
             "rejected": turns(r["prompt"], r["rejected"])} for r in pairs()]
    assert validate_dpo_pairs(rows).passed and validate_dpo_pairs(read(rows, "preference")).passed


@pytest.mark.parametrize("spoil", [lambda r: {"prompt": "x", "chosen": "y"}, lambda r: {**r, "chosen": 7}, lambda r: 7,
                                   lambda r: {**r, "chosen_score": math.nan}, lambda r: {**r, "rejected_score": "0.3"},
                                   lambda r: {**r, "chosen_score": 8}])
def test_bad_rows_are_typed_errors(spoil):
    rows = pairs(5)
    rows[2] = spoil(rows[2])
    with pytest.raises(DataError):
        validate_dpo_pairs(rows)


@pytest.mark.parametrize("score", [lambda row, answer: 1 / 0, lambda row, answer: math.nan, lambda row, answer: "good",
                                   lambda row, answer: 7.0])
def test_a_bad_score_function_names_the_row(score):
    with pytest.raises(DataError, match="row 1"):
        validate_dpo_pairs(pairs(3), score)


def test_no_pairs():
    with pytest.raises(DataError):
        validate_dpo_pairs([])


def test_lengths_are_matched_within_bins():
    rng = random.Random(1)
    rows = [{"prompt": f"q{i}", "chosen": "a " * rng.randint(5, 40), "rejected": "b " * rng.randint(2, 12)} for i in range(600)]
    assert length_bias(rows).warns
    kept = match_lengths(rows)
    found = length_bias(kept)
    assert found.share.value == 0.5 and abs(found.difference.mean()) < 1.5 and len(kept) > 20
    assert match_lengths(rows) == kept
    with pytest.raises(DataError, match="always longer"):
        match_lengths([{"prompt": "q", "chosen": "a b", "rejected": "a"}])


class Fake:
    "A policy whose token log-probabilities are known: -1 behind a prompt, -2 behind an empty one."
    max_length = 64

    def __init__(self, tiny):
        from transformers import AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(tiny)

    def score(self, batch, reference=False):
        starts = batch.mask.argmax(axis=1)
        return np.where(batch.mask, np.where(starts[:, None] > starts.min(), -1.0, -2.0), 0.0).astype(np.float32)


def test_ifd_is_the_ratio_of_perplexities(tiny):
    policy = Fake(tiny)
    found = calculate_ifd_score(policy, ["a longer question"] * 3, ["one", "two words", "three"], batch_size=64)
    assert np.allclose(found.scores, math.exp(1 - 2)) and len(found.unhelped) == 0
    assert np.allclose(calculate_ifd_score(policy, ["a longer question"], ["one"], kind="loss").scores, 0.5)


@pytest.mark.parametrize(("prompts", "answers", "settings"), [
    (["a"], [""], {}), (["a"], ["b", "c"], {}), ([], [], {}), (["a"], ["b"], {"kind": "length"}), (["a"], ["b " * 500], {})])
def test_ifd_refuses(tiny, prompts, answers, settings):
    with pytest.raises(DataError):
        calculate_ifd_score(Fake(tiny), prompts, answers, **settings)


def test_ifd_of_a_batch_is_that_of_its_rows(tiny, backend):
    from realign_core import load
    policy = load(tiny, backend=backend)
    prompts, answers = ["one", "two three four", "five six"], ["seven", "eight nine ten one two", "three"]
    whole = calculate_ifd_score(policy, prompts, answers).scores
    single = [calculate_ifd_score(policy, [p], [a]).scores[0] for p, a in zip(prompts, answers, strict=True)]
    assert np.allclose(whole, single, atol=1e-4)


def number(answer, value):
    return answer.strip(".").split()[-1:] == [str(value)]


def verifiable(n=40):
    return [{"problem": f"{i}+{i}?", "solution": f"It is {2 * i}.", "verify": {"name": "number", "value": 2 * i}}
            for i in range(n)]


def test_verifiability_counts_every_row():
    rows = verifiable()
    rows[1] = {**rows[1], "solution": "It is 99."}
    rows[2] = {**rows[2], "verify": {"name": "lax"}}
    rows[3] = {**rows[3], "verify": {"name": "crash"}}
    rows[4] = {"problem": "how are you?", "solution": "well"}
    rows[5] = {**rows[5], "solution": ""}
    rows[6] = {**rows[6], "verify": {"name": "number", "wrong": 1}}
    verifiers = {"number": number, "lax": lambda answer: True, "crash": lambda answer: 1 / 0}
    found = assess_rlvr_verifiability(rows, verifiers)
    assert {k: v for k, v in found.outcomes.items() if k != "verifiable"} == {
        "gold fails": [1], "corrupted gold passes": [2], "verifier crashed": [3, 6], "no verifier": [4], "no solution": [5]}
    assert found.share.value == 34 / 40 and found.share.n == 40 and found.passed
    assert sum(map(len, found.outcomes.values())) == 40


def test_too_many_unverifiable_rows_fail_and_so_does_a_lax_verifier():
    rows = verifiable(20)
    assert not assess_rlvr_verifiability(rows[:15] + [{"problem": "?", "solution": "!"}] * 5, {"number": number}).passed
    assert not assess_rlvr_verifiability(rows, {"number": lambda answer, value: True}).passed


def test_an_unknown_verifier_is_an_error_and_no_rows_too():
    with pytest.raises(DataError, match="numbr"):
        assess_rlvr_verifiability([{**verifiable(1)[0], "verify": {"name": "numbr"}}])
    with pytest.raises(DataError):
        assess_rlvr_verifiability([])


def test_all_shipped_verifiers_by_default():
    from realign_core.data.verifiable import functions, sums
    assert assess_rlvr_verifiability(sums(30) + functions(30)).share.value == 1.0


@pytest.mark.parametrize("gold", ["It is 9.", "yes", "", "9" * 5000, "٣", "a" * 100_000 + "!", None])
def test_corruptions_never_hold_the_gold(gold):
    wrong = corruptions({"solution": gold}, "another")
    assert "another" in wrong and all(w.split() != (gold or "").split() for w in wrong)


def test_edge_cases_of_rewards():
    rows = [{"prompt": "2+2?", "solution": "4"}]
    crashing = check_reward(lambda row, answer: float(answer[0] == "4"), rows)
    assert not crashing["crashes"].passed and "empty (IndexError)" in crashing["crashes"].figure
    assert not check_reward(lambda row, answer: math.nan if not answer.strip() else 1.0, rows)["no number"].passed
    assert "10,000 words" in check_reward(lambda row, answer: len(answer), rows)["junk above gold"].figure
    rng = random.Random(0)
    assert not check_reward(lambda row, answer: rng.random(), rows)["not repeatable"].passed
    assert check_reward(lambda row, answer: float(answer.strip() == "4"), rows).passed


def labelled(n=60):
    return [{"prompt": "p", "completion": f"{'good' if i % 2 else 'bad'} {i}", "label": bool(i % 2)} for i in range(n)]


def judge(row, answer):
    return float(answer.startswith("good"))


def sft_rows(n=200, seed=0):
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.sample(WORDS, 12)), "completion": f"good {i}", "axis": "ab"[i % 2]} for i in range(n)]


def complete(tiny, **changes):
    from transformers import AutoTokenizer

    from realign_core.data.taxonomy import Taxonomy
    rows = sft_rows(220)
    return dict(rows=rows[:200], held=rows[200:], score=judge, labelled=labelled(), taxonomy=Taxonomy({"axis": ["a", "b"]}),
                production=[{"axis": "a"}, {"axis": "b"}] * 100, tokenizer=AutoTokenizer.from_pretrained(tiny)) | changes


def failing(**given):
    return [name for name, check in checklist(given.pop("rows"), **given).checks.items() if check.passed is not True]


def test_the_checklist_passes_when_all_is_well(tiny):
    given = complete(tiny)
    assert failing(**given) == [] and len(checklist(given.pop("rows"), **given).checks) == 6


def test_the_checklist_finds_each_defect(tiny):
    rows = sft_rows(220)
    late = [{**r, "completion": "bad"} if i > 150 else r for i, r in enumerate(rows[:200])]
    leak = [*rows[:199], {"prompt": rows[210]["prompt"].upper(), "completion": "good long " * 60}]
    cases = {"rubric validated": [dict(labelled=[{**r, "label": i % 3 > 0} for i, r in enumerate(labelled())]), dict(labelled=()),
                                  dict(labelled=[r for r in labelled() if r["label"]])],
             "taxonomy covers production": [dict(rows=[{**r, "axis": "a"} for r in rows[:200]]), dict(production=None),
                                            dict(production=[{"axis": "a"}] * 150 + [{"axis": "b"}] * 20)],
             "pass rate stable": [dict(rows=late)],
             "format matches the trainer": [dict(rows=[*rows[:199], {**rows[199], "completion": "good\0"}], method="dpo"),
                                            dict(tokenizer=None)],
             "held-out split": [dict(held=None), dict(held=rows[200:202]), dict(rows=leak)],
             "reward on edge cases": [dict(reward=lambda row, answer: float(answer[0] == "g"))]}
    for name, changes in cases.items():
        for change in changes:
            found = failing(**complete(tiny, **change))
            assert name in found and len(found) <= 2, (name, change.keys(), found)


def test_thirty_per_cent_negatives_too_many():
    balanced = [{**row, "label": i % 20 < 13} for i, row in enumerate(sft_rows(200))]
    skewed = [{**r, "label": i % 20 < 7} for i, r in enumerate(balanced)]
    assert checklist(balanced)["balance of labels"].passed and not checklist(skewed)["balance of labels"].passed


def test_the_checklist_of_pairs_looks_at_margins(tiny):
    rows = pairs()
    assert checklist(rows, method="dpo")["margin of pairs"].passed
    rows[3] = swap(rows[3])
    assert "wrong way round" in checklist(rows, method="dpo")["margin of pairs"].figure


def test_kl_is_measured_by_the_policy(tiny):
    from realign_core import load
    policy, other = load(tiny, seed=0), load(tiny, seed=0)
    rows = pairs(8)
    same = validate_dpo_pairs(rows, policy=policy, reference=other, n_kl=4)
    assert same["KL"].passed and same["KL"].figure.startswith("0.000")
