"Calibration measures against hand-worked tables, plain loops and SciPy; what they refuse; temperatures; stated confidence."

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from conftest import BACKENDS

from realign_core import fit, load
from realign_core.engine.batching import collate
from realign_core.engine.encoding import Encoder, Example
from realign_core.engine.encoding import Sequence as Tokens
from realign_core.engine.policy import Completion
from realign_core.errors import DataError
from realign_core.evaluate import calibration as cal
from realign_core.evaluate.metrics import ask
from realign_core.methods import calibration as method
from realign_core.methods import grpo
from realign_core.tinyworld import measure as tiny

NAN = float("nan")


def columns(n: int = 300, seed: int = 0, steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    "Confidences with many ties, from 0 to 1 inclusive, and outcomes that depend on them."
    rng = np.random.default_rng(seed)
    c = rng.integers(0, steps + 1, n) / steps
    return c, (rng.random(n) < 0.2 + 0.5 * c).astype(float)


# Against something independent

@pytest.mark.parametrize("bins", [1, 2, 4, 8, 256])
def test_ece_equals_a_loop_over_bins(bins):
    c, h = columns(steps=32)  # bins and confidences are exact in binary, so that none is on the wrong side of an edge
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(c)) if b / bins <= c[i] < (b + 1) / bins or b == bins - 1 and c[i] == 1]
        total += abs(sum(c[i] for i in inside) - sum(h[i] for i in inside)) / len(c)
    assert cal.ece(c, h, bins) == pytest.approx(total, abs=1e-12) == pytest.approx(tiny.ece(c, h, bins), abs=1e-12)


def test_bins_of_equal_mass_are_equal_and_never_part_ties():
    c = np.random.default_rng(0).random(100)
    assert np.bincount(cal.bin_of(c, 10, adaptive=True)).tolist() == [10] * 10
    tied, _ = columns()
    where = cal.bin_of(tied, 8, adaptive=True)
    assert all(len(set(where[tied == value])) == 1 for value in set(tied))
    assert set(where) == set(range(where.max() + 1)) and (np.diff(where[np.argsort(tied)]) >= 0).all()
    order = np.random.default_rng(0).permutation(len(tied))
    assert (cal.bin_of(tied[order], 8, adaptive=True) == where[order]).all()
    assert cal.bin_of(np.full(5, 0.3), 4, adaptive=True).tolist() == [0] * 5


def test_auroc_equals_all_pairs_and_scipy():
    c, h = columns()
    right, wrong = c[h == 1], c[h == 0]
    pairs = (right[:, None] > wrong).mean() + 0.5 * (right[:, None] == wrong).mean()
    assert cal.auroc(c, h) == pytest.approx(pairs, abs=1e-12)
    stats = pytest.importorskip("scipy.stats")
    u = stats.mannwhitneyu(right, wrong).statistic
    assert cal.auroc(c, h) == pytest.approx(u / (len(right) * len(wrong)), abs=1e-12)


def test_auroc_is_one_zero_or_a_half():
    h = np.array([0, 1, 0, 1, 1])
    assert cal.auroc(h * 0.5, h) == 1 and cal.auroc(1 - h, h) == 0 and cal.auroc(np.full(5, 0.7), h) == 0.5


def test_aurc_is_the_mean_over_random_orders_of_ties():
    c, h = columns(40, steps=4)
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        shuffled = rng.permutation(len(c))
        order = shuffled[np.argsort(-c[shuffled], kind="stable")]
        found.append((np.cumsum(1 - h[order]) / np.arange(1, len(c) + 1)).mean())
    assert cal.aurc(c, h) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 4000**0.5)
    coverage, risk = cal.risk_coverage(c, h)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(1 - h.mean())


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_brier_score_is_the_sum_of_its_terms(adaptive):
    c, h = columns()
    parts = cal.decomposition(c, h, 10, adaptive)
    assert parts["brier"] == pytest.approx(np.mean([(a - b) ** 2 for a, b in zip(c, h, strict=True)]))
    assert parts["brier"] == pytest.approx(parts["reliability"] - parts["resolution"] + parts["uncertainty"] + parts["within"])
    alone = cal.decomposition(*columns(steps=5), bins=100)  # each bin holds one confidence
    assert alone["within"] == pytest.approx(0, abs=1e-12)


def test_a_reliability_diagram_has_all_answers():
    c, h = columns()
    diagram = cal.reliability(c, h)
    assert diagram.counts.sum() == len(c)
    assert diagram.counts @ diagram.confidence == pytest.approx(c.sum())
    assert sum(k * a.value for k, a in zip(diagram.counts, diagram.accuracy, strict=True)) == pytest.approx(h.sum())
    gap = diagram.counts / len(c) @ np.abs(diagram.confidence - [a.value for a in diagram.accuracy])
    assert gap == pytest.approx(cal.ece(c, h))


# Intervals

def test_intervals_hold_the_truth_about_as_often_as_they_say():
    levels, rng, hits = np.arange(0.05, 1, 0.1), np.random.default_rng(0), 0
    for _ in range(100):
        pick = rng.integers(0, 10, 400)
        c, h = levels[pick], (rng.random(400) < 0.5 + 0.4 * (levels[pick] - 0.5)).astype(float)
        hits += not cal.interval(cal.ece, c, h, draws=150).excludes(0.15)
    assert hits >= 80


def test_the_floor_is_what_calibrated_answers_show():
    c = columns(400)[0]
    rng = np.random.default_rng(3)
    found = [cal.ece(c, rng.random(400) < c) for _ in range(300)]
    assert cal.floor(c).value == pytest.approx(np.mean(found), abs=0.003)
    assert cal.floor(np.repeat(c, 16)).value < 0.4 * cal.floor(c).value  # about a quarter, with sixteen times as many
    calibrated = cal.interval(cal.ece, c, (np.random.default_rng(4).random(400) < c).astype(float))
    assert calibrated.low == 0


def test_a_change_pairs_the_questions():
    c, h = columns()
    assert cal.change(cal.auroc, (c, h), (c, h)).high == 0 == cal.change(cal.ece, (c, h), (c, h)).low
    better = cal.change(cal.brier, (np.ones(300), h), (np.full(300, h.mean()), h))
    assert better.high < 0
    with pytest.raises(DataError, match="not the same questions"):
        cal.change(cal.ece, (c, h), (c[:-1], h[:-1]))


def test_the_report_has_every_measure_and_bears_one_class():
    c, h = columns()
    made = cal.calibration(c, h, draws=50)
    assert made.ece.value == cal.ece(c, h) and made.auroc.value == cal.auroc(c, h)
    assert made.brier.value == pytest.approx(cal.brier(c, h))
    assert "AUROC" in made._repr_markdown_() and "n = 300" in made._repr_markdown_()
    assert cal.calibration(c, np.ones(300), draws=50).auroc is None


# Temperature

def test_the_temperature_is_the_best_of_a_grid():
    rng = np.random.default_rng(0)
    z = 3 * rng.normal(size=(300, 4))
    y = np.array([rng.choice(4, p=p) for p in cal.scaled(z, 3.0)])
    grid = np.exp(np.linspace(np.log(0.5), np.log(20), 2000))
    nll = [-np.log(cal.scaled(z, t)[np.arange(300), y]).mean() for t in grid]
    assert cal.fit_temperature(z, y) == pytest.approx(grid[int(np.argmin(nll))], rel=0.01)
    shifted = z + rng.normal(size=(300, 1))  # a constant added to all candidates of a question says nothing
    assert cal.fit_temperature(shifted, y) == pytest.approx(cal.fit_temperature(z, y), rel=1e-6)


def test_one_confidence_is_two_candidates():
    c, h = columns()
    z = cal.log_odds(c)
    assert cal.fit_temperature(z, h) == pytest.approx(cal.fit_temperature(np.stack([0 * z, z], 1), h))
    assert np.allclose(cal.scaled(z, 1.7), cal.scaled(np.stack([0 * z, z], 1), 1.7)[:, 1])
    assert np.allclose(cal.scaled(cal.log_odds(c), 1.0), np.clip(c, 1e-6, 1 - 1e-6))
    assert cal.auroc(cal.scaled(z, 7.0), h) == cal.auroc(c, h) and cal.scaled([0.0], 9.0) == 0.5


def test_a_temperature_beyond_the_range_is_its_end():
    assert cal.fit_temperature([[5.0, 0.0]] * 4, [0, 0, 0, 0]) == pytest.approx(0.02)
    assert cal.fit_temperature([[5.0, 0.0]] * 4, [1, 1, 1, 0]) == pytest.approx(50)
    assert np.isfinite(cal.scaled([[1e6, -1e6]], 0.02)).all()


def test_platt_scaling_is_the_best_of_its_neighbours():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 400)
    y = (rng.random(400) < cal.scaled(0.6 * z - 1, 1.0)).astype(int)
    target = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / (400 - y.sum() + 2))
    def nll(a, b):
        p = cal.scaled(a * z + b, 1.0)
        return -(target * np.log(p) + (1 - target) * np.log1p(-p)).sum()
    a, b = cal.fit_platt(z, y)
    assert all(nll(a, b) < nll(a + i * 0.01, b + j * 0.01) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)
    assert all(np.isfinite(cal.fit_platt([3.0, 2.0, 9.0], [k, k, k])).all() for k in (0, 1))  # one class alone
    for logits, label, words in (([1.0], [0, 1], "belong together"), ([NAN], [1], "belong together"), ([1.0], [0.5], "neither")):
        with pytest.raises(DataError, match=words):
            cal.fit_platt(logits, label)


# More than one number

def test_logistic_regression_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)) * [1, 10, 0.1] + [0, 5, 1]
    y = (rng.random(200) < cal.scaled(x[:, 0] + 0.2 * (x[:, 1] - 5), 1.0)).astype(float)
    fitted = cal.fit_logistic(x, y, 0.01)
    z = (x - x.mean(0)) / x.std(0)

    def loss(w, b):
        p = cal.scaled(z @ w + b, 1.0)
        return -np.mean(np.log(np.where(y == 1, p, 1 - p))) + 0.005 * w @ w
    least = loss(fitted.weights, fitted.offset)
    for i in range(4):
        for by in (-1e-3, 1e-3):
            moved = np.append(fitted.weights, fitted.offset) + by * (np.arange(4) == i)
            assert loss(moved[:3], moved[3]) > least
    assert np.allclose(fitted(x), cal.scaled(fitted.log_odds(x), 1.0))
    assert np.allclose(cal.fit_logistic(x * [2, 3, 4] - 7, y, 0.01)(x * [2, 3, 4] - 7), fitted(x))  # units do not matter
    assert np.isclose(cal.fit_logistic(x, y, 1e6)(x), y.mean(), atol=1e-3).all()  # all penalty: the average alone


def test_logistic_regression_bears_constants_and_perfect_separation():
    x, y = np.c_[np.arange(20.0), np.full(20, 3.0)], (np.arange(20) > 9).astype(int)
    fitted = cal.fit_logistic(x, y, 1e-4)
    assert np.isfinite(fitted.weights).all() and fitted.weights[1] == 0
    assert ((fitted(x) > 0.5) == y).all()
    assert np.allclose(fitted(np.c_[np.arange(20.0), np.full(20, 9.0)]), fitted(x))  # what was constant has no say later


def test_beta_calibration_holds_platt_and_can_level_off():
    c = np.random.default_rng(0).random(500)
    terms = cal.beta_terms(c)
    assert np.allclose(terms.sum(axis=1), cal.log_odds(c, 1e-4)) and np.isfinite(cal.beta_terms([0.0, 1.0])).all()
    h = (np.random.default_rng(1).random(500) < 0.6 * c**2).astype(int)
    beta = cal.fit_logistic(terms, h)(terms)
    a, b = cal.fit_platt(cal.log_odds(c), h)
    assert abs(beta - 0.6 * c**2).mean() < abs(cal.scaled(a * cal.log_odds(c) + b, 1.0) - 0.6 * c**2).mean()


def test_isotonic_steps_are_the_best_rising_fit():
    c, h = columns(60, steps=12)
    steps = cal.fit_isotonic(c, h)
    assert (np.diff(steps.heights) > 0).all() and np.isclose(steps(c).mean(), h.mean())
    levels = np.unique(c)
    shares = np.array([h[c == x].mean() for x in levels])
    counts = np.array([(c == x).sum() for x in levels])
    for i, x in enumerate(levels):  # max-min formula of isotonic regression (Barlow et al. 1972)
        best = max(min(shares[a:b] @ counts[a:b] / counts[a:b].sum() for b in range(i + 1, len(levels) + 1))
                   for a in range(i + 1))
        assert steps([x])[0] == pytest.approx(best)
    assert steps([0.0])[0] == steps.heights[0] and steps([1.0])[0] == steps.heights[-1]


def test_who_is_held_out_is_not_fitted_to():
    rng = np.random.default_rng(0)
    groups = np.repeat([f"thing {i}" for i in range(10)], 6)
    x, y = rng.normal(size=(60, 2)), rng.integers(0, 2, 60)
    p = cal.held_out(x, y, groups, 0.1, folds=10)
    for name in set(groups):  # one fold a group: each is judged by a fit to all the others
        out = groups == name
        assert np.allclose(p[out], cal.fit_logistic(x[~out], y[~out], 0.1)(x[out]))
    turned = np.where(groups == "thing 3", 1 - y, y)
    assert np.allclose(cal.held_out(x, turned, groups, 0.1, folds=10)[groups == "thing 3"], p[groups == "thing 3"])
    assert (cal.held_out(x, y, groups, 0.1) == cal.held_out(x, y, groups, 0.1)).all()


@pytest.mark.parametrize(("call", "words"), [
    (lambda: cal.fit_logistic([[1.0], [2.0]], [1, 1]), "all answers are of one class; found '2 right of 2'"),
    (lambda: cal.fit_logistic([[1.0], [NAN]], [0, 1]), "row 2, field 'features': a number that is not finite"),
    (lambda: cal.fit_logistic([["a"], ["b"]], [0, 1]), "not numbers"),
    (lambda: cal.fit_logistic([1.0, 2.0], [0, 1]), "not a table of numbers"),
    (lambda: cal.fit_logistic(np.zeros((0, 3)), []), "not a table of numbers"),
    (lambda: cal.fit_logistic([[1.0], [2.0]], [0, 1, 1]), "nothing to fit"),
    (lambda: cal.fit_logistic([[1.0], [2.0]], [0, 1], penalty=0.0), "nothing to fit"),
    (lambda: cal.fit_logistic([[1.0], [2.0]], [0, 0.5]), "neither right nor wrong"),
    (lambda: cal.fit_logistic([[1.0], [2.0]], [0, 1])([[1.0, 2.0]]), "numbers of another width; found 2; wanted 1"),
    (lambda: cal.held_out([[1.0]] * 4, [0, 1, 0, 1], ["a", "a", "b", "b"]), "cannot be held out"),
    (lambda: cal.held_out([[1.0]] * 4, [0, 1, 0, 1], ["a", "b"], folds=2), "cannot be held out"),
    (lambda: cal.held_out([[1.0]] * 4, [0, 0, 1, 1], ["a", "a", "b", "b"], folds=2), "all answers are of one class"),
    (lambda: cal.beta_terms([0.5, 1.5]), "row 2, field 'confidence'"),
    (lambda: cal.fit_isotonic([0.5, 1.5], [0, 1]), "row 2, field 'confidence'"),
    (lambda: cal.fit_isotonic([0.5], [0.3]), "neither right nor wrong"),
    (lambda: cal.fit_isotonic([0.5], [1])([2.0]), "not a probability"),
])
def test_a_fit_refuses_what_it_cannot_take(call, words):
    with pytest.raises(DataError, match=words):
        call()


# What is refused

TWO = [cal.ece, cal.adaptive_ece, cal.brier, cal.decomposition, cal.auroc, cal.reliability, cal.risk_coverage, cal.aurc,
       cal.calibration]


@pytest.mark.parametrize("measure", TWO, ids=lambda m: m.__name__)
@pytest.mark.parametrize(("confidence", "correct", "words"), [
    ([0.5, 1.2], [1, 0], "row 2, field 'confidence': not a probability; found 1.2"),
    ([-0.1, 0.2], [1, 0], "row 1, field 'confidence'"),
    ([0.5, NAN], [1, 0], "row 2, field 'confidence': not a probability; found nan"),
    ([0.5, float("inf")], [1, 0], "found inf"),
    ([0.5, 0.5], [1, NAN], "row 2, field 'correct'"),
    ([0.5, 0.5], [1, 2], "row 2, field 'correct'"),
    ([0.5, 0.5], [1], "do not belong together"),
    ([], [], "do not belong together"),
    (0.5, 1, "do not belong together"),
    ([[0.5]], [[1]], "do not belong together"),
    (["high", "low"], [1, 0], "not numbers"),
    ([0.5, None], [1, 0], "row 2, field 'confidence'"),
])
def test_columns_that_are_no_probabilities(measure, confidence, correct, words):
    with pytest.raises(DataError, match=words):
        measure(confidence, correct)


@pytest.mark.parametrize("bins", [0, -1, 2.5, True, None])
def test_bins_that_are_none(bins):
    for measure in (cal.ece, cal.adaptive_ece, cal.reliability, cal.decomposition):
        with pytest.raises(DataError, match="field 'bins'.*at least 1"):
            measure([0.5, 0.6], [0, 1], bins)


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]])
def test_one_class_has_no_auroc(correct):
    with pytest.raises(DataError, match="all answers are of one class; found '[03] right of 3'"):
        cal.auroc([0.2, 0.5, 0.9], correct)
    with pytest.raises(DataError, match="one class"):
        cal.interval(cal.auroc, [0.2, 0.5, 0.9], correct)


def test_a_known_probability_is_no_class():
    with pytest.raises(DataError, match="row 1, field 'correct': neither right nor wrong; found 0.7"):
        cal.auroc([0.2, 0.5], [0.7, 1])
    assert cal.ece([0.7, 0.7], [0.7, 0.7]) == 0


@pytest.mark.parametrize(("logits", "label", "words"), [
    ([[1.0, 2.0]], [2], "not the number of a candidate"),
    ([[1.0, 2.0]], [-1], "not the number of a candidate"),
    ([[1.0, 2.0]], [0, 1], "do not belong together"),
    ([[1.0]], [0], "do not belong together"),
    ([[1.0, NAN]], [0], "do not belong together"),
    ([1.0, 2.0], [0, 0.5], "not the number of a candidate"),
    ([], [], "do not belong together"),
])
def test_logits_that_cannot_be_scaled(logits, label, words):
    with pytest.raises(DataError, match=words):
        cal.fit_temperature(logits, label)


@pytest.mark.parametrize("temperature", [0, -1, NAN, float("inf")])
def test_temperatures_that_are_none(temperature):
    with pytest.raises(DataError, match="not a temperature"):
        cal.scaled([0.5], temperature)


# The method: stated confidence and its reward

def test_numbers_are_said_and_read():
    for value in np.linspace(0, 1, 11):
        assert method.stated(method.say(value)) == pytest.approx(value)
    assert method.say(0.25, 0.05) == "25%" and method.say(0.96) == "100%"
    assert method.stated("It is 30%, or rather 45%.") == pytest.approx(0.45) and method.stated("99.5%") == pytest.approx(0.995)
    for text in ("", "sure", "150%", "70", "x * 3 %5", "7%x"):
        assert method.stated(text) is None
    for value in (-0.1, 1.1, NAN):
        with pytest.raises(DataError, match="not a probability"):
            method.say(value)


def test_the_reward_is_proper_and_pays_for_being_right():
    reward, levels = method.RLCR(), np.arange(0, 101)
    for p in (0.0, 0.13, 0.5, 0.87, 1.0):
        mean = [p * reward({"correct": 1}, f"{k}%") + (1 - p) * reward({"correct": 0}, f"{k}%") for k in levels]
        assert levels[int(np.argmax(mean))] == round(100 * p) and max(mean) == pytest.approx(p * p)
    assert reward({"correct": 1}, "?") == 0 == reward({"correct": 1}, "0%") and reward({"correct": 0}, "?") == -1
    judged = method.RLCR(judge=lambda row, text: row["solution"] in text)
    assert judged({"solution": "62"}, "It is 62. 90%") == pytest.approx(0.99)


@pytest.mark.parametrize("row", [{}, {"correct": None}, {"correct": 0.5}, {"correct": "yes"}])
def test_a_row_that_does_not_say_whether_it_was_right(row):
    with pytest.raises(DataError, match="field 'correct'.*wanted 0 or 1"):
        method.RLCR()(row, "70%")


def test_agreement_and_bins():
    shares = method.agreement([["a", "a", "a"], ["a", "b", "c"], ["a", "a", "b"]])
    assert np.allclose(shares, [[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0]])
    correct = np.array([[1, 1, 1], [0, 0, 1], [1, 1, 0]])
    found = method.binned(shares, correct, bins=3)
    assert np.allclose(found, [[1, 1, 1], [0.25] * 3, [1, 1, 0.25]])
    apart = method.binned(shares, correct, ["x", "x", "y"], bins=3)
    assert np.allclose(apart, [[1, 1, 1], [1 / 3] * 3, [1, 1, 0]])
    assert apart.mean() == pytest.approx(correct.mean())  # counting loses nothing on average
    for readings in ([], [["a"]], [["a", "b"], ["a"]]):
        with pytest.raises(DataError, match="agreement needs siblings"):
            method.agreement(readings)
    for signal, right, groups in ((shares, correct[:2], None), (shares[0], correct[0], None), (shares, correct, ["x"])):
        with pytest.raises(DataError, match="do not belong together"):
            method.binned(signal, right, groups)


def test_a_second_turn_follows_the_first():
    assert [m["role"] for m in method.second_turn("Why?", "So.")] == ["user", "assistant", "user"]
    longer = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert [m["content"] for m in method.second_turn(longer, "So.", ask="How sure?")] == ["Be brief.", "Why?", "So.", "How sure?"]


@pytest.fixture(scope="module", params=[b for b in BACKENDS if importlib.util.find_spec(b)])
def policy(request):
    return load("tinyworld-instruct", request.param)


def test_the_probability_of_the_words_is_that_of_their_tokens(policy):
    question = "What is the colour of the morven?"
    completion = ask(policy, [question], temperature=1.0, seed=3)[0][0]
    pieces = [policy.tokenizer.decode([i]) for i in completion.ids]
    place = max(range(len(pieces)), key=lambda i: len(pieces[i].strip()))
    word = pieces[place].strip()
    found = method.word_probability(completion, word, policy.tokenizer)
    last = max(i for i, piece in enumerate(pieces) if piece.strip() == word)
    assert found == pytest.approx(float(np.exp(completion.logps[last])), rel=1e-5)
    assert method.word_probability(completion, "nowhere", policy.tokenizer) == 0.5
    assert method.word_probability(completion, None, policy.tokenizer) == 0.5


def test_states_of_answers_are_read_where_they_say(policy):
    prompts = ["What is the colour of the morven?", [{"role": "user", "content": "What is 12 + 30?"}], "Tell me 3 + 4."]
    answers = [c[0] for c in ask(policy, prompts, temperature=1.0, seed=1)]
    found = method.answer_states(policy, prompts, answers)
    width, layers = policy.sizes()
    assert tuple(found) == method.READINGS and all(x.shape == (layers + 1, 3, width) for x in found.values())
    encoder = Encoder(policy.tokenizer, policy.max_length)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):  # by hand, one at a time
        head = encoder.prompt(prompt)
        ids = [*head, *answer.ids]
        states = policy.hidden_states(collate([Example((Tokens(ids, [False] * len(head) + [True] * len(answer.ids)),))]))[:, 0]
        for name, wanted in (("prompt", states[:, len(head) - 1]), ("last", states[:, len(ids) - 1]),
                             ("mean", states[:, len(head):len(ids)].mean(axis=1))):
            assert np.allclose(found[name][:, i], wanted, atol=1e-4)
    alone = method.answer_states(policy, prompts, answers, batch_size=1)
    assert all(np.allclose(found[name], alone[name], atol=1e-4) for name in found)


def test_states_of_no_answers_are_refused(policy):
    answer = ask(policy, ["Why?"], max_tokens=4)[0][0]
    for prompts, answers in (([], []), (["Why?"], []), (["Why?"], [answer, answer])):
        with pytest.raises(DataError, match="not an answer to each question"):
            method.answer_states(policy, prompts, answers)
    with pytest.raises(DataError, match="row 2, field 'completions': an answer without tokens"):
        method.answer_states(policy, ["Why?"] * 2, [answer, Completion((), np.zeros(0), True, "")])


def test_who_was_never_taught_states_nothing(policy):
    found = method.confidences(policy, ["What is 12 + 30?"] * 2, ["It is 42.", "It is 5."])
    assert found.shape == (2,) and np.isnan(found).all()
    with pytest.raises(DataError, match="not an answer to each question"):
        method.confidences(policy, ["Why?"], [])


def test_rlcr_trains_on_both_frameworks(policy):
    rows = [{"prompt": method.second_turn(f"What is {a} + 30?", "It is 42."), "correct": int(a == 12)} for a in range(10, 18)]
    paid = grpo.method(method.RLCR(), kind="dr_grpo", n=2, max_tokens=4, beta=0.0)
    run = fit(load("tinyworld-instruct", policy.backend), paid, rows, steps=1, batch_size=4, held_out=0, progress=False)
    assert -1 <= next(r for r in run.history if "loss" in r)["reward"] <= 0  # nothing is stated yet
