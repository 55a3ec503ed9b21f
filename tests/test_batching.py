"""Batches: padding, order, packing."""

from __future__ import annotations

import numpy as np
import pytest

from realign_core.engine.batching import Order, collate, first_fit, micro_batches, pack, padding
from realign_core.engine.encoding import Example, Sequence
from realign_core.engine.policy import load
from realign_core.errors import DataError
from realign_core.methods import sft


def random_examples(n, vocab, seed=0, longest=40, group=1):
    draw = np.random.default_rng(seed)
    def sequence():
        length = int(draw.integers(4, longest))
        mask = draw.random(length) < 0.6
        mask[-1] = True
        return Sequence(draw.integers(6, vocab, length), mask)
    return [Example(tuple(sequence() for _ in range(group)), row=i + 1) for i in range(n)]


def test_collate_pads_on_the_right_and_masks_padding():
    examples = random_examples(5, 50, group=2)
    batch = collate(examples, pad_id=3)
    for b, s in enumerate(s for e in examples for s in e.sequences):
        assert (batch.ids[b, : len(s)] == s.ids).all() and (batch.ids[b, len(s):] == 3).all()
        assert (batch.mask[b, : len(s)] == s.mask).all() and not batch.mask[b, len(s):].any()
    assert batch.examples == 5 and batch.group == 2 and batch.rows == (1, 2, 3, 4, 5)


def test_extras_are_per_example_or_per_token():
    sequences = (Sequence([1, 2, 3], [0, 1, 1]), Sequence([1, 2], [0, 1]))
    batch = collate([Example(sequences, {"margin": 2, "ref_logps": (np.array([0, -1, -2]), np.array([0, -3]))})] * 2)
    assert batch.extras["margin"].tolist() == [2, 2]
    assert batch.extras["ref_logps"].tolist() == [[0, -1, -2], [0, -3, 0]] * 2


def test_mixed_groups_are_refused():
    with pytest.raises(DataError):
        collate(random_examples(1, 20, group=1) + random_examples(1, 20, group=2))


@pytest.mark.parametrize("n,size", [(1, 4), (7, 3), (64, 8), (100, 7)])
def test_each_epoch_visits_every_example_once(n, size):
    order = Order(np.random.default_rng(0).integers(1, 99, n), size, seed=5)
    for epoch in range(3):
        seen = np.concatenate([order[epoch * order.per_epoch + i] for i in range(order.per_epoch)])
        assert sorted(seen) == list(range(n))


def test_order_is_a_pure_function_of_seed_and_step():
    lengths = np.random.default_rng(0).integers(1, 99, 200)
    one, other = Order(lengths, 8, seed=1), Order(lengths, 8, seed=1)
    steps = list(range(100))
    forward = [one[s].tolist() for s in steps]
    assert forward == [other[s].tolist() for s in reversed(steps)][::-1]
    assert forward != [Order(lengths, 8, seed=2)[s].tolist() for s in steps]
    assert forward[:25] != forward[25:50], "epochs differ"


def test_micro_batches_cover_the_batch():
    assert [list(m) for m in micro_batches(np.arange(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(micro_batches(np.arange(7), None)) == 1


def test_first_fit_places_everything_within_the_room():
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    rows = first_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.23 * -(-sum(lengths) // 64), "near the optimum, as first-fit decreasing promises"


def test_packing_keeps_tokens_targets_and_positions():
    examples = random_examples(20, 50)
    packed, padded = pack(examples, 64), collate(examples)
    assert packed.targets == padded.targets and packed.ids.size < padded.ids.size and packed.ids.shape[1] <= 64
    assert sorted(packed.ids[packed.segments > 0]) == sorted(np.concatenate([e.sequences[0].ids for e in examples]))
    starts = packed.positions == 0
    assert not packed.mask[starts].any(), "the first token of a segment is never a target"
    assert (packed.segments[starts & (packed.segments > 0)] > 0).all()


def test_pairs_are_not_packed():
    with pytest.raises(DataError, match="cannot be packed"):
        pack(random_examples(2, 20, group=2), 64)


def test_padding_report_orders_the_three_ways():
    waste = padding(np.random.default_rng(0).lognormal(4, 0.8, 1000).astype(int) + 1, batch_size=16)
    assert waste.packed < waste.buckets < waste.random < 1
    assert "length buckets" in waste._repr_markdown_()


def test_packed_equals_padded_on_the_policy(backend, tiny):
    policy = load(tiny, backend)
    examples = random_examples(12, policy.config["vocab_size"])
    packed, padded = pack(examples, 64), collate(examples)
    by_row = policy.score(padded)
    expected = {tuple(e.sequences[0].ids): by_row[i, : len(e)] for i, e in enumerate(examples)}
    scores, seen = policy.score(packed), 0
    for b in range(len(packed.ids)):
        for segment in range(1, packed.segments[b].max() + 1):
            part = packed.segments[b] == segment
            np.testing.assert_allclose(scores[b, part], expected[tuple(packed.ids[b, part])], atol=1e-5)
            seen += 1
    assert seen == 12


def test_packed_gradients_equal_padded_ones(backend, tiny):
    policy, method = load(tiny, backend), sft.method()
    examples = random_examples(8, policy.config["vocab_size"], seed=1)
    found = []
    for batch in (collate(examples), pack(examples, 64)):
        policy.backward(batch, method.objective)
        found.append(policy.gradients())
        policy.step(0.0)
    for name, one in found[0].items():
        np.testing.assert_allclose(found[1][name], one, atol=1e-5 * max(1.0, float(np.abs(one).max())), err_msg=name)
