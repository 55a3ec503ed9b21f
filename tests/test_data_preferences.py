"""Preference pairs: planted defects, flaws that must show, failures of judge and writer, and a run that is killed and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal

import pytest

from realign_core.data.formats import read
from realign_core.data.generator import Reply
from realign_core.data.preferences import (
    _OWN,
    FLAWS,
    Around,
    Flaw,
    Pairs,
    best_worst,
    flawed,
    put_before,
    strong_weak,
    temperature,
    with_reference,
)
from realign_core.data.rubric import Criterion, Judge, Rubric, tiny_rubric
from realign_core.errors import DataError, OutputError
from realign_core.tinyworld import World
from realign_core.tinyworld.world import reply

PROMPTS = [f"question {i}" for i in range(40)]
QUIET = {"progress": False}


class Says:
    "Answers with what a function of (request, seed, number) says."

    def __init__(self, say, name="says", finished=True):
        self.say, self.name, self.finished, self.requests = say, name, finished, []

    def reply(self, requests, seed=0):
        self.requests += requests
        return [
            Reply(r.key, tuple(self.say(r, seed, i) for i in range(r.n)), None, (self.finished,) * r.n, self.name)
            for r in requests
        ]


GOOD, BAD = Says(lambda r, s, i: "a good answer", "good"), Says(lambda r, s, i: "a bad answer", "bad")
DRAWS = Says(lambda r, s, i: f"answer {random.Random(f'{s} {r.key} {i}').randint(0, 10)}", "draws")


def by_word(row, answer):
    return {"good": 1.0, "bad": 0.2, "near": 0.9, "none": None}.get(
        next(w for w in [*answer.split(), "else"] if w in ("good", "bad", "near", "none", "else")), 0.5
    )


def tenths(row, answer):
    return int(answer.split()[-1]) / 10


def said(text):
    return Says(lambda r, s, i: text, text)


# ---- why a pair is dropped


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        (BAD, GOOD, "the wrong way round"),
        (GOOD, GOOD, "both answers are the same"),
        (said("good"), said("good and good"), "a tie"),
        (GOOD, said("a near answer"), "the margin is too small"),
        (GOOD, said("none"), "no criterion applies"),
        (GOOD, said("  "), "an answer is empty"),
        (said("else"), BAD, "the chosen answer fails the rubric"),
        (said("good "), said(" good\n"), "both answers are the same"),
        (GOOD, Says(lambda r, s, i: "bad", finished=False), "an answer was cut off"),
    ],
)
def test_each_planted_defect_is_dropped_with_its_reason(chosen, rejected, reason):
    pairs = strong_weak(PROMPTS, chosen, rejected, by_word, **QUIET)
    assert len(pairs) == 0 and pairs.reasons == {reason: 40} and pairs.asked == {"strong_weak": 40}
    assert f"40 {reason}" in pairs._repr_markdown_()


def test_a_failing_chosen_is_kept_only_on_request():
    assert len(strong_weak(PROMPTS, said("else"), BAD, by_word, must_pass=False, **QUIET)) == 40


def test_swapped_pairs_among_good_ones_are_all_found():
    swapped = {f"question {i}" for i in (3, 17, 39)}
    first = Says(lambda r, s, i: "bad" if r.prompt in swapped else "good", "a")
    second = Says(lambda r, s, i: "good" if r.prompt in swapped else "bad", "b")
    pairs = strong_weak(PROMPTS, first, second, by_word, chunk=7, **QUIET)
    assert len(pairs) == 37 and pairs.reasons == {"the wrong way round": 3} and not swapped & {p["prompt"] for p in pairs}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1, "much", [1]])
def test_a_score_that_is_none_never_makes_a_margin(value):
    def score(row, answer):
        return 1.0 if "good" in answer else value

    assert strong_weak(PROMPTS, GOOD, BAD, score, **QUIET).reasons == {"the judge failed": 40}


def test_a_judge_that_crashes_on_some_answers_never_makes_them_rejected():
    def decide(row, answer):
        return answer != "answer 0" if answer != "answer 1" else 1 / 0

    rubric = Rubric([Criterion("c", "?", function=decide)])
    pairs = best_worst(PROMPTS, DRAWS, rubric, n=6, **QUIET)
    assert len(pairs) > 5 and {p["rejected"] for p in pairs} == {"answer 0"}
    assert all(p["chosen"] not in ("answer 0", "answer 1") for p in pairs)


def test_a_judge_that_is_down_leaves_no_pair_and_says_so():
    def fails(prompt):
        raise ConnectionError

    rubric = Rubric([Criterion("c", "?")], Judge(Says(lambda r, s, i: fails(r.prompt))))
    pairs = best_worst(PROMPTS, DRAWS, rubric, **QUIET)
    assert len(pairs) == 0 and set(pairs.reasons) <= {"the judge failed", "both answers are the same"}
    assert sum(pairs.reasons.values()) == 40


# ---- what a pair says about itself


def test_rows_carry_provenance_and_are_read_as_preferences(tmp_path):
    rows = [{"prompt": f"q{i}", "key": f"k{i}", "licence": "CC0", "source": {"file": "x", "line": i}} for i in range(5)]
    pairs = strong_weak(rows, GOOD, BAD, by_word, out=tmp_path / "p.jsonl", seed=4, **QUIET)
    assert pairs[3] | {"seed": 0} == {
        "prompt": "q3",
        "chosen": "a good answer",
        "rejected": "a bad answer",
        "chosen_score": 1.0,
        "rejected_score": 0.2,
        "margin": 0.8,
        "strategy": "strong_weak",
        "seed": 0,
        "key": "k3",
        "chosen_generator": "good",
        "rejected_generator": "bad",
        "licence": "CC0",
        "source": {"file": "x", "line": 3},
    }
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == list(pairs)
    assert len(read(tmp_path / "p.jsonl", "preference")) == 5


def test_conversations_stay_conversations(tmp_path):
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    pairs = with_reference(
        [{"prompt": talk}],
        Says(lambda r, s, i: "good" if "note" in r.prompt[0]["content"] else "bad"),
        lambda row: "note",
        by_word,
        **QUIET,
    )
    assert pairs[0]["prompt"] == talk and pairs[0]["chosen"] == [{"role": "assistant", "content": "good"}]
    read(list(pairs), "preference")
    assert put_before(talk, "note") == [{"role": "system", "content": "Be kind.\n\nnote"}, talk[1]]
    assert put_before(talk[1:], "note")[0] == {"role": "system", "content": "note"}


def test_the_reference_is_shown_to_one_side_only_and_its_absence_is_counted():
    model = Says(lambda r, s, i: "good" if r.prompt.startswith("note") else "bad")
    pairs = with_reference(PROMPTS, model, lambda row: None if row["prompt"].endswith("7") else "note", by_word, **QUIET)
    assert len(pairs) == 36 and pairs.reasons == {"there is no reference": 4}
    assert all(p["reference"] == "note" and not p["prompt"].startswith("note") for p in pairs)


def test_temperatures_reach_the_generator_and_the_row():
    model = Says(lambda r, s, i: "good" if r.temperature == 0.1 else "bad")
    pairs = temperature(PROMPTS, model, by_word, low=0.1, high=1.5, **QUIET)
    assert len(pairs) == 40 and (pairs[0]["chosen_temperature"], pairs[0]["rejected_temperature"]) == (0.1, 1.5)


def test_two_sides_of_one_model_are_drawn_with_different_seeds():
    model = Says(lambda r, s, i: f"answer {random.Random(f'{s} {r.key}').randint(0, 10**9)}")
    assert "both answers are the same" not in temperature(PROMPTS, model, lambda r, a: 0.5, **QUIET).reasons


def test_best_and_worst_are_the_extremes_and_ties_are_counted():
    pairs = best_worst(PROMPTS, DRAWS, tenths, n=4, must_pass=False, **QUIET)
    assert len(pairs) > 30
    for p in pairs:
        assert p["chosen_score"] == max(p["scores"]) and p["rejected_score"] == min(p["scores"]) and len(p["scores"]) == 4
    assert best_worst(PROMPTS, DRAWS, lambda r, a: 0.9, n=4, **QUIET).reasons.keys() <= {
        "a tie",
        "both answers are the same",
    }


def test_accounts_add_up():
    both = strong_weak(PROMPTS, GOOD, BAD, by_word, **QUIET) + temperature(PROMPTS, GOOD, by_word, **QUIET)
    assert (
        len(both) == 40
        and both.asked == {"strong_weak": 40, "temperature": 40}
        and both.reasons == {"both answers are the same": 40}
    )
    assert isinstance(both, Pairs) and "temperature | 40 | 0 |" in both._repr_markdown_()


# ---- the flaws

ENGLISH = [
    "I'm sorry to hear that. You might want to talk to your manager first. It's often a misunderstanding.",
    "Thanks for asking! You could soak the beans overnight, then cook them for an hour. I hope this helps.",
    "Great question. Perhaps it may help to write down three things each evening. Many people sleep better after that.",
    "That sounds hard, and I understand why you're upset. Maybe call her tomorrow; she'll have had time to think.",
    "You are welcome to ask. A bicycle chain should be oiled every 200 km, and it can't hurt to clean it before.",
    "Of course! The museum opens at ten, so you may like to be there early. We've never had to queue then.",
]
TINY = [reply(row, random.Random(i), style=(False, True)) for i, row in enumerate(World().rows("facts", 30))]


def around(texts, i, seed=0):
    return Around(f"question {i}", [(f"question {j}", t) for j, t in enumerate(texts) if j != i], random.Random(seed))


@pytest.mark.parametrize("name", FLAWS)
@pytest.mark.parametrize("texts", [ENGLISH, TINY], ids=["english", "tiny"])
def test_each_flaw_changes_the_text_shows_and_repeats(name, texts):
    flaw = FLAWS[name]
    for i, text in enumerate(texts):
        made = flaw.make(text, around(texts, i))
        assert made and made != text and flaw.shows(text, made), (name, text, made)
        assert not flaw.shows(text, text), (name, text)
        assert name == "slightly_off_topic" or not flaw.shows(made, text), (
            name,
            text,
            made,
        )  # being off the topic is mutual
        assert made == flaw.make(text, around(texts, i)), "the same seed gives the same text"


def test_the_flaw_is_what_it_says():
    text = ENGLISH[0]
    made = {name: flaw.make(text, around(ENGLISH, 0)) for name, flaw in FLAWS.items()}
    assert made["missing_acknowledgment"] == "You might want to talk to your manager first. It's often a misunderstanding."
    assert made["prescriptive"].split(". ")[1] in (
        "You must talk to your manager first",
        "You should talk to your manager first",
    )
    assert (
        made["slightly_off_topic"] in ENGLISH[1:] and "sorry" not in made["wrong_tone"] and "It's" not in made["wrong_tone"]
    )
    assert len(made["too_verbose"].split()) >= 1.4 * len(text.split())


def test_every_flaw_lowers_the_tiny_rubric():
    world, rubric = World(), tiny_rubric()

    def gold(row):
        return reply(row, random.Random(row["prompt"]), style=(False, True))

    for name in FLAWS:
        pairs = flawed(world.rows("facts", 40), gold, rubric, flaws=[name], **QUIET)
        assert len(pairs) == 40 and all(p["flaw"] == name and p["margin"] >= 0.15 for p in pairs), (name, pairs.reasons)


def test_flaws_that_cannot_be_built_in_are_counted_or_replaced():
    rows = ["what?", "what now?"]
    none = flawed(rows, lambda row: "Yes.", by_word, flaws=["missing_acknowledgment"], **QUIET)
    assert none.reasons == {"no flaw can be built in": 2} and none.asked == {"flawed: missing_acknowledgment": 2}
    other = flawed(
        rows,
        lambda row: "It is a good day.",
        lambda row, a: float(a == "It is a good day."),
        flaws=["missing_acknowledgment", "prescriptive"],
        **QUIET,
    )
    assert [p["flaw"] for p in other] == ["prescriptive"] * 2


def test_a_writer_that_only_pretends_is_found_out():
    good = "Thanks for asking. You might rest."

    def score(row, a):
        return float(a == good)

    def write(r, s, i):
        return "You might rest." if "Remove every sign" in r.prompt else good + " Really."

    pairs = flawed(PROMPTS, lambda row: good, score, writer=Says(write, "writer"), **QUIET)
    assert pairs.asked == {f"flawed: {name}": 8 for name in FLAWS}
    assert {p["flaw"] for p in pairs} == {"missing_acknowledgment"} and pairs.reasons == {
        "the rewriting does not show the flaw": 32
    }
    assert pairs[0]["rejected_generator"] == "writer" and pairs[0]["chosen_generator"] == "gold"


def test_a_rewriting_prompt_survives_braces_in_the_answer():
    writer = Says(lambda r, s, i: "You must {x}.")
    flawed(["{y} {0}"], lambda row: "You might {x}.", lambda row, a: 1.0, flaws=["prescriptive"], writer=writer, **QUIET)
    assert "{y} {0}" in writer.requests[0].prompt and "You might {x}." in writer.requests[0].prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "?!",
        "Thanks.",
        "I",
        "🙂",
        "a" * 5000,
        "no stop",
        "x\n\ny",
        "<think>",
        "\ud800",
        "1.5. 2.",
        "\\1 \\g<0>",
    ],
)
def test_odd_texts_break_no_flaw(text):
    for flaw in FLAWS.values():
        made = flaw.make(text, around([text, "Thanks. You might go."], 0))
        assert made is None or isinstance(made, str)


# ---- what cannot be asked for


@pytest.mark.parametrize("field", sorted(set(_OWN) - {"key"}))
def test_fields_of_a_pair_in_a_prompt_row_are_refused(field):
    with pytest.raises(DataError, match=field):
        strong_weak([{"prompt": "q", field: 1}], GOOD, BAD, by_word, **QUIET)


def test_what_makes_no_sense_is_refused(tmp_path):
    for wrong in [
        lambda: strong_weak([], GOOD, BAD, by_word),
        lambda: strong_weak([5], GOOD, BAD, by_word),
        lambda: strong_weak([{"text": "q"}], GOOD, BAD, by_word),
        lambda: temperature(PROMPTS, GOOD, by_word, low=1, high=1),
        lambda: best_worst(PROMPTS, GOOD, by_word, n=1),
        lambda: flawed(PROMPTS, GOOD, by_word, flaws=["rude"]),
        lambda: flawed(PROMPTS, lambda row: None, by_word),
        lambda: strong_weak(PROMPTS, GOOD, BAD, by_word, least=0),
        lambda: flawed(PROMPTS, GOOD, by_word, flaws=[]),
        lambda: strong_weak([{"prompt": "a", "key": 1}] * 2, GOOD, BAD, by_word),
        lambda: strong_weak([{"prompt": "a", "x": float("nan")}], GOOD, BAD, by_word, progress=False),
    ]:
        with pytest.raises(DataError):
            wrong()
    with pytest.raises(OutputError):
        strong_weak(PROMPTS, GOOD, BAD, by_word, out=tmp_path / "pairs.csv")


# ---- killed and resumed


def mortal(calls):
    "The score `tenths` that kills its own process, by signal 9, at a certain call."
    left = [calls]

    def score(row, answer):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return tenths(row, answer)

    score.__qualname__ = tenths.__qualname__
    return score


def test_killed_at_ten_random_moments_gives_the_same_bytes(tmp_path):
    rows = [f"question {i}" for i in range(120)]

    def work(name, score=tenths):
        return best_worst(rows, DRAWS, score, n=4, must_pass=False, chunk=5, seed=2, out=tmp_path / f"{name}.jsonl", **QUIET)

    work("whole")
    rng, sizes = random.Random(1), []
    for _ in range(10):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                work("killed", mortal(rng.randint(1, 80)))
            os._exit(0)
        rng.random()
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        sizes.append((tmp_path / "killed.candidates.jsonl").stat().st_size)
        assert not (tmp_path / "killed.jsonl").exists(), "the pairs are written when all candidates are there"
    assert sizes == sorted(sizes) and len(set(sizes)) > 3
    work("killed")
    for name in (".jsonl", ".candidates.jsonl"):
        assert (tmp_path / f"killed{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()


def test_a_file_is_not_gone_on_with_by_other_settings(tmp_path):
    out = tmp_path / "p.jsonl"

    def run(score=tenths, model=DRAWS, **more):
        return best_worst(PROMPTS, model, score, n=3, out=out, **{**QUIET, **more})

    first = run()
    assert list(run()) == list(first)
    rubric = Rubric([Criterion("c", "?", function=lambda row, a: True)])
    for change in [
        {"score": by_word},
        {"score": rubric},
        {"model": Says(DRAWS.say, "other")},
        {"least": 0.3},
        {"must_pass": False},
        {"seed": 1},
        {"chunk": 3},
    ]:
        with pytest.raises(OutputError, match="other settings"):
            run(**change)
    with pytest.raises(OutputError, match="other settings"):
        flawed(PROMPTS, lambda row: "Thanks. You might.", by_word, out=out, **QUIET)


def test_another_reference_or_gold_is_another_run(tmp_path):
    out = tmp_path / "p.jsonl"
    with_reference(PROMPTS, GOOD, lambda row: "a", by_word, out=out, **QUIET)
    with pytest.raises(OutputError):
        with_reference(PROMPTS, GOOD, lambda row: "b", by_word, out=out, **QUIET)


def test_a_flaw_of_ones_own():
    loud = Flaw("loud", lambda text, around: text.upper(), lambda a, b: b.isupper() and not a.isupper(), "Shout.")
    pairs = flawed(PROMPTS, lambda row: "good", by_word, flaws=[loud], must_pass=False, **QUIET)
    assert pairs[0]["rejected"] == "GOOD" and pairs[0]["flaw"] == "loud"
