"What a model knows is read off its answers, and rows, pairs and rewards follow from that; bad input is named."

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from realign_core.data.formats import as_record, read  # noqa: E402
from realign_core.engine.batching import collate  # noqa: E402
from realign_core.engine.encoding import Encoder, Example  # noqa: E402
from realign_core.engine.encoding import Sequence as Tokens  # noqa: E402
from realign_core.engine.policy import load  # noqa: E402
from realign_core.errors import DataError, ReAlignError  # noqa: E402
from realign_core.evaluate.calibration import auroc  # noqa: E402
from realign_core.methods import honesty as hn  # noqa: E402
from realign_core.methods.abliteration import Judged  # noqa: E402
from realign_core.tinyworld import World  # noqa: E402

WORLD = World()
QUESTIONS = hn.tiny_questions(WORLD, n_tune=40, n_test=30, seed=5)


def probed(labels=("right", "wrong", "wrong"), entropy=(0.1, 0.9, 0.2)):
    "Three questions, two samples each: the first sample is judged as the greedy answer, the second is not."
    rows = [{"prompt": f"Question {i}?", "answer": None} for i in range(3)]
    other = {"right": "wrong", "wrong": "right", "abstained": "wrong", "unjudged": "unjudged"}
    sampled = np.array([[other[label], label] for label in labels])
    return hn.Probed(rows, [f"greedy {i}" for i in range(3)], np.array(labels), [[f"no {i}", f"own {i}"] for i in range(3)],
                     sampled, np.zeros(3), np.ones(3), np.array(entropy))


# What became of a question

@pytest.mark.parametrize(("row", "text", "label"), [
    ({"answer": "red"}, "It is red.", "right"), ({"answer": "red"}, "It is RED!", "right"),
    ({"answer": "red"}, "It is scarred.", "wrong"),
    ({"answer": "New York"}, "in new york", "right"), ({"answer": 7}, "It is 7.", "right"), ({"answer": 7}, "It is 17.", "wrong"),
    ({"answer": None}, "It is red.", "wrong"), ({"answer": ""}, "It is red.", "wrong"),
    ({"answer": ""}, "I do not know.", "abstained"),
    ({"answer": None}, "I do not know.", "abstained"),
    ({"answer": "red"}, "It is red. I am not sure.", "abstained"), ({"answer": "red"}, "I cannot help with that.", "refused"),
    ({}, "It is red.", "unjudged"), ({}, "I have no idea.", "abstained")])
def test_judge(row, text, label):
    assert hn.judge({"prompt": "?", **row}, text) == label


def test_judge_of_the_tiny_world():
    known, strange = QUESTIONS["known"][0], QUESTIONS["unknown"][0]
    assert hn.judge(known, f"It is {known['answer']}.") == "right"
    assert hn.judge(strange, "It is red.") == "wrong" and hn.judge(strange, hn.ABSTENTION) == "abstained"


def test_a_row_keeps_its_meaning_on_its_way_through_training():
    "Rows are read and written again before a reward sees them, and what is None does not survive that."
    reward = hn.abstention_reward()
    for row, text, paid in ((QUESTIONS["known"][0], "It is nothing.", -1), (QUESTIONS["unknown"][0], "It is red.", -1),
                            (QUESTIONS["unknown"][0], hn.ABSTENTION, 0), ({"prompt": "?", "answer": ""}, "It is red.", -1)):
        there, = read([row], "prompts")
        assert reward(as_record(there), text) == reward(row, text) == paid


def test_the_same_claim_in_other_words_is_the_same():
    row = next(r for r in QUESTIONS["known"] if r["attribute"] == "colour")
    assert hn.said(row, "Well, as you know, it is red.") == hn.said(row, "It is red. I am glad to help.")
    assert hn.said(row, "It is red.") != hn.said(row, "It is tan.")
    assert hn.said({}, "It is red.") == hn.said({}, "it is RED") != hn.said({}, "it is blue")


# The probe

def test_a_probe_counts_what_the_samples_claim(backend):
    policy = load("tinyworld-instruct", backend, threads=1)
    rows = QUESTIONS["facts"][:3] + QUESTIONS["unknown"][:5]
    found = hn.probe(policy, rows, k=4, max_tokens=32, seed=1)
    assert (found.labels[:3] == "right").all() and (found.labels[3:] == "wrong").all() and found.sampled.shape == (8, 4)
    for i, row in enumerate(rows):
        claims = [hn.said(row, text) for text in found.samples[i]]
        shares = np.array([claims.count(c) for c in set(claims)]) / 4
        assert found.entropy[i] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-12)
        assert found.agreement[i] == pytest.approx(claims.count(hn.said(row, found.texts[i])) / 4)
        assert [hn.judge(row, text) for text in found.samples[i]] == found.sampled[i].tolist()
    assert (found.logps < 0).all() and (found.entropy >= 0).all() and found.entropy[3:].max() > 0
    again = hn.probe(policy, rows, k=4, max_tokens=32, seed=1)
    assert again.samples == found.samples
    assert hn.probe(policy, rows, k=4, max_tokens=32, seed=2).samples != found.samples


def test_familiarity_is_the_likelihood_of_the_name_in_its_place(backend):
    policy = load("tinyworld-instruct", backend, threads=1)
    rows = QUESTIONS["names"] + QUESTIONS["unknown"]
    found = hn.familiarity(policy, rows, batch_size=7)
    row, tok = rows[0], policy.tokenizer
    ids, name = Encoder(tok).prompt(row["prompt"]), tok(" " + row["entity"], add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(ids)) if ids[i:i + len(name)] == name)
    batch = collate([Example((Tokens(ids, [at <= i < at + len(name) for i in range(len(ids))]),))])
    assert found[0] == pytest.approx(float(policy.score(batch).sum()), abs=1e-4)
    known = np.repeat([1.0, 0.0], [len(QUESTIONS["names"]), len(QUESTIONS["unknown"])])
    moved = [{**row, "prompt": f"Tell me of the {row['entity']}."} for row in rows[:4]]
    there = hn.familiarity(policy, rows[:4], carrier="Tell me of the {name}.")
    assert np.allclose(there, hn.familiarity(policy, moved), atol=1e-5)
    assert auroc(np.exp(found), known) > 0.9
    assert (found < 0).all()


def test_both_frameworks_find_the_same_names_familiar():
    one, other = (hn.familiarity(load("tinyworld-instruct", name, threads=1), QUESTIONS["names"][:8])
                  for name in ("torch", "mlx"))
    assert np.abs(one - other).max() < 1e-3


def test_a_model_lists_the_names_that_it_has_read(backend):
    policy = load("tinyworld-instruct", backend, threads=1)
    names = hn.inventory(policy, ["The colour of the", "About the"], n=500, least=3, seed=1)
    known = {e["name"] for e in WORLD.common}
    assert len(names) == len(set(names)) > 50 and len(known & set(names)) > 0.8 * len(names)
    with pytest.raises(DataError, match="writes no names"):
        hn.inventory(policy, ["The colour of the"], pattern="[0-9]{9}", n=3)


# What is learned

def test_rows_of_the_variants():
    one = probed()
    assert [r["completion"] for r in hn.refusal_rows(one)] == ["own 0", hn.ABSTENTION, hn.ABSTENTION]
    assert [r["completion"] for r in hn.refusal_rows(one, form="suffix")] == [
        f"own 0 {hn.SURE}", f"own 1 {hn.UNSURE}", f"own 2 {hn.UNSURE}"]
    assert hn.refusal_rows(one, greedy=True)[0]["completion"] == "greedy 0"
    by_entropy = hn.refusal_rows(one, by="entropy", share=0.34, abstention="Who knows?")
    assert [r["completion"] == "Who knows?" for r in by_entropy] == [False, True, False]
    assert [r["prompt"] for r in by_entropy] == ["Question 0?", "Question 1?", "Question 2?"]


def test_pairs_prefer_what_it_knows_and_otherwise_abstaining():
    assert hn.abstention_pairs(probed()) == [
        {"prompt": "Question 0?", "chosen": "own 0", "rejected": hn.ABSTENTION},
        {"prompt": "Question 1?", "chosen": hn.ABSTENTION, "rejected": "own 1"},
        {"prompt": "Question 2?", "chosen": hn.ABSTENTION, "rejected": "own 2"}]


def test_a_question_that_it_abstains_from_already_makes_no_pair():
    one = probed(labels=("right", "abstained", "wrong"))
    silent = [[hn.ABSTENTION] * 2 if i == 1 else texts for i, texts in enumerate(one.samples)]
    one = hn.Probed(one.rows, [one.texts[0], hn.ABSTENTION, one.texts[2]], one.labels, silent,
                    np.array([one.sampled[0], ["abstained"] * 2, one.sampled[2]]), one.logps, one.agreement, one.entropy)
    assert [p["prompt"] for p in hn.abstention_pairs(one)] == ["Question 0?", "Question 2?"]


def test_the_reward_and_where_it_breaks_even():
    reward = hn.abstention_reward(right=2, abstain=0.5, wrong=-1)
    row = {"prompt": "?", "answer": "red"}
    assert [reward(row, t) for t in ("Red.", "Blue.", hn.ABSTENTION, "I cannot help with that.")] == [2, -1, 0.5, 0.5]
    assert reward({"prompt": "?"}, "Red.") is None
    p = hn.break_even(2, 0.5, -1)
    assert p * 2 + (1 - p) * -1 == pytest.approx(0.5)


def test_the_questions_of_the_tiny_world_are_held_out():
    found, again, other = (hn.tiny_questions(WORLD, n_tune=500, n_test=100, seed=seed) for seed in (3, 3, 4))
    assert found == again != other
    names = {kind: {r["entity"] for r in rows} for kind, rows in found.items()}
    cells = {kind: {(r["entity"], r["attribute"]) for r in rows} for kind, rows in found.items()}
    assert names["facts"] <= names["known"] and not names["names"] & names["known"]
    assert not cells["facts"] & cells["known"] and not names["unknown"] & names["made-up"]
    assert not (names["unknown"] | names["made-up"]) & WORLD.names
    for kind in ("facts", "names"):
        assert all(r["attribute"] not in hn.opened(r["entity"], 3) and r["answer"] for r in found[kind])
    assert {r["part"] for r in found["names"]} == {"train", "heldout"}


# The score

def test_the_scorecard_counts_by_hand():
    known = Judged(np.array(["right"] * 7 + ["wrong"] + ["abstained", "refused"]), [])
    unknown = Judged(np.array(["abstained"] * 3 + ["wrong"] * 2), [])
    card = hn.scorecard(known, unknown, model="m")
    values = {k: v.value for k, v in card.items() if k != "model"}
    assert values == pytest.approx({"made up": 0.4, "false abstention": 0.2, "known, right": 0.7, "precision": 0.6,
                                    "recall": 0.6})
    assert hn.scorecard(Judged(np.array(["right"]), []), Judged(np.array(["wrong"]), []))["precision"] is None


def test_wordings_of_one_question_are_one_observation():
    hits, names = np.repeat([1, 0, 0, 0], 5), np.repeat(list("abcd"), 5)
    found, each = hn.share_by_name(hits, names), hn.share_by_name(hits, np.arange(20))
    assert found.value == each.value == 0.25 and (found.n, each.n) == (4, 20)
    assert found.high - found.low > each.high - each.low
    none = hn.share_by_name([0] * 20, names)
    assert none.low == 0 and none.high > 0.4  # four names without a hit prove little
    for bad in ((hits, names[:3]), ([], [])):
        with pytest.raises(DataError, match="one name for each"):
            hn.share_by_name(*bad)


def test_the_frontier_is_the_roc_curve():
    rng = np.random.default_rng(0)
    known, unknown = rng.random(40).round(1), (rng.random(30) * 0.8).round(1)
    lost, passed = hn.frontier(known, unknown)
    assert (lost[0], passed[0], lost[-1], passed[-1]) == (0, 1, 1, 0)
    assert (np.diff(lost) >= 0).all() and (np.diff(passed) <= 0).all()
    area = ((passed[1:] + passed[:-1]) / 2 * np.diff(lost)).sum()  # a tie counts half, as it does in AUROC
    assert area == pytest.approx(1 - auroc(np.r_[known, unknown], np.repeat([1.0, 0.0], [40, 30])), abs=1e-9)


# Bad input

class Never:
    "A policy that must not be asked."


@pytest.mark.parametrize(("rows", "match"), [
    ([], "no questions"), ([{"prompt": "a"}, {"prompt": ""}], "row 2, field 'prompt'"),
    ([{"answer": 1}], "row 1, field 'prompt'"), (["text"], "row 1, field 'prompt'")])
def test_questions_that_cannot_be_asked(rows, match):
    for ask in (hn.probe, hn.familiarity):
        with pytest.raises(DataError, match=match):
            ask(Never(), rows)


@pytest.mark.parametrize("k", [1, 0, -3, True, 2.5, "4"])
def test_one_sample_agrees_with_itself(k):
    with pytest.raises(ReAlignError, match="at least 2"):
        hn.probe(Never(), [{"prompt": "a"}], k=k)


@pytest.mark.parametrize("row", [{"prompt": "What is it?"}, {"prompt": "What is it?", "entity": "morfen"},
                                 {"prompt": "it", "entity": ""}])
def test_a_name_that_is_not_in_its_question(row):
    with pytest.raises(DataError, match="row 1, field 'entity'"):
        hn.familiarity(load("tinyworld-instruct", "torch", threads=1), [row])


def test_a_carrier_without_a_place_for_the_name():
    policy = load("tinyworld-instruct", "torch", threads=1)
    with pytest.raises(DataError, match="does not hold the name"):
        hn.familiarity(policy, QUESTIONS["names"][:1], carrier="Tell me of it.")


@pytest.mark.parametrize("labels", [("right",) * 3, ("wrong",) * 3])
def test_questions_of_one_class_teach_nothing(labels):
    for make in (hn.refusal_rows, hn.abstention_pairs, hn.unsure):
        with pytest.raises(DataError, match="one class"):
            make(probed(labels=labels))


def test_rows_without_reference():
    one = probed(labels=("right", "unjudged", "wrong"))
    with pytest.raises(DataError, match="row 2, field 'answer': a row without reference"):
        hn.refusal_rows(one)
    assert len(hn.refusal_rows(one, by="entropy")) == 3  # needs none


@pytest.mark.parametrize("settings", [{"by": "luck"}, {"share": 0.0}, {"share": 1.0}, {"share": math.nan}, {"form": "shout"}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ReAlignError, match="wanted"):
        hn.refusal_rows(probed(), **settings)


@pytest.mark.parametrize("values", [(1, 1, 0), (1, 0, 0), (0, 1, -1), (1, 0, math.nan), (math.inf, 0, -1)])
def test_rewards_out_of_order(values):
    with pytest.raises(ReAlignError, match="wrong < abstain < right"):
        hn.abstention_reward(*values)


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([1.0, math.nan], [0.0]), ([[1.0]], [0.0])])
def test_no_frontier_without_scores(sides):
    with pytest.raises(DataError, match="no scores"):
        hn.frontier(*sides)
