"""Intervals: do they cover what they say, and do the model measures count what they should?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from realign_core.errors import DataError
from realign_core.evaluate.metrics import (
    Interval,
    Table,
    Texts,
    accuracy,
    ask,
    bootstrap,
    kl,
    likelihood,
    paired,
    proportion,
)


def test_wilson_by_hand():
    assert proportion(0, 10).low == 0 and proportion(0, 10).high == pytest.approx(3.8416 / 13.8416)
    assert proportion(10, 10).high == 1 and proportion(5, 10).value == 0.5
    low, high = proportion(5, 10).low, proportion(5, 10).high
    assert low + high == pytest.approx(1) and low == pytest.approx(0.2366, abs=1e-4)
    for hits, n in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(DataError):
            proportion(hits, n)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_wilson_covers_the_truth_95_times_in_100(p):
    hits = np.random.default_rng(0).binomial(100, p, 2000)
    inside = [(i := proportion(float(k), 100)).low <= p <= i.high for k in hits]
    assert 0.92 < np.mean(inside) < 0.98


def test_bootstrap_covers_the_truth_and_repeats_itself():
    rng = np.random.default_rng(0)
    inside = [not bootstrap(rng.exponential(size=100), seed=i, draws=500).excludes(1.0) for i in range(300)]
    assert 0.89 < np.mean(inside) < 0.98
    sample = rng.normal(size=50)
    assert bootstrap(sample, seed=3) == bootstrap(sample, seed=3) != bootstrap(sample, seed=4)


def test_bootstrap_of_a_ratio_weighs_tokens():
    interval = bootstrap([10.0, 1.0], counts=[100, 1])
    assert interval.value == pytest.approx(11 / 101)
    assert (interval.low, interval.high) == pytest.approx((0.1, 1.0))


def test_bootstrap_refuses_nothing_and_nonsense():
    for values in ([], [1.0, np.nan], [[1.0, 2.0]]):
        with pytest.raises(DataError):
            bootstrap(values)


def test_paired_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=100)
    before, after = shared, shared + 0.1 + 0.05 * rng.normal(size=100)
    change = paired(before, after)
    assert change.excludes(0) and change.high - change.low < 0.2 * (bootstrap(before).high - bootstrap(before).low)
    with pytest.raises(DataError):
        paired(before, after[:-1])


def test_a_change_where_there_is_none_is_not_found():
    rng = np.random.default_rng(1)
    found = [paired(rng.normal(size=80), rng.normal(size=80), seed=i).excludes(0) for i in range(200)]
    assert np.mean(found) < 0.1


def test_table_shows_shares_in_percent_and_changes_in_points():
    table = Table()
    change = table.add("right", [0, 0, 1, 0], [1, 1, 1, 1])
    assert change.value == 0.75 and change.unit == "points"
    text = table._repr_markdown_()
    assert "25.0 %" in text and "**+75.0 points" in text and text.count("\n") == 2
    assert "[4.6, 69.9]" in text  # Wilson, not the bootstrap


def test_interval_reads_well():
    assert str(Interval(0.5, 0.25, 0.75, 4, "%")) == "50.0 % [25.0, 75.0], n = 4"
    assert Interval(0.5, 0.25, 0.75, 4, "nats")._repr_markdown_() == "**0.500 nats** [0.250, 0.750], n = 4"


@dataclass(frozen=True)
class Verdict:
    ok: bool


def test_accuracy_and_kl_on_both_backends(tiny, backend):
    from realign_core.engine.policy import load
    policy = load(tiny, backend)
    policy.freeze_reference()
    prompts = ["the", "a b", "one two three"]
    answers = ask(policy, prompts, n=2, temperature=1.0, max_tokens=6)
    assert [len(a) for a in answers] == [2, 2, 2]
    result = accuracy(policy, [{"prompt": p} for p in prompts], lambda row, text: Verdict(row["prompt"] == "the"), max_tokens=6)
    assert result.right.tolist() == [1, 0, 0] and result.interval == proportion(1, 3)
    same = kl(policy, prompts, n=4, max_tokens=8)
    assert same.k3.value == same.k1.value == 0 and same.k3.n == 3 and same.tokens > 0


def test_kl_is_positive_from_another_model_and_agrees_between_estimators(tmp_path, tiny, backend):
    from realign_core.engine.policy import load
    from snapshots import make_snapshot
    policy = load(tiny, backend)
    other = load(make_snapshot(tmp_path / "other", width=48), backend)
    far = kl(policy, ["the", "a b", "one two", "b"] * 8, n=2, reference=other, max_tokens=12)
    assert far.k3.low > 0 and far.k1.low < far.k3.high and far.k3.low < far.k1.high


def test_likelihood_agrees_with_scoring_one_row_at_a_time(tiny, backend):
    from realign_core.data.formats import read
    from realign_core.engine.encoding import Encoder
    from realign_core.engine.policy import Batch, load
    from realign_core.methods import dpo
    policy = load(tiny, backend)
    rows = read([{"prompt": "the", "chosen": "A cat.", "rejected": "No."},
                 {"prompt": "a b c", "chosen": "Yes, a dog.", "rejected": "Two."}])
    logps, tokens = likelihood(policy, rows, dpo.encode, batch_size=1)
    together, _ = likelihood(policy, rows, dpo.encode)
    assert logps.shape == tokens.shape == (2, 2) and np.allclose(logps, together, atol=1e-4)
    sequence = dpo.encode(rows[1], Encoder(policy.tokenizer)).sequences[0]
    alone = policy.score(Batch(sequence.ids[None], sequence.mask[None]))
    assert logps[1, 0] == pytest.approx(alone.sum(), abs=1e-4) and tokens[1, 0] == sequence.targets


def test_texts_and_answers_become_tables_with_one_line_a_row():
    table = Texts({"prompt": ["a | b\nc"], "answer": ["<think>x</think> y" + "z" * 200]})._repr_markdown_()
    assert table.count("\n") == 2 and "a \\| b c" in table and "&lt;think>" in table and "…" in table
