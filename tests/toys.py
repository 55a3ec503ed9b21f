"""The smallest methods and data, shared by the tests of the training loop and of the policies."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from realign_core.engine.encoding import Example, Sequence
from realign_core.engine.policy import Batch
from realign_core.engine.training import BigramPolicy

VOCAB = 12


def examples(n=60, seed=0, group=1):
    draw = np.random.default_rng(seed)
    return [Example(tuple(_sequence(draw) for _ in range(group)), row=i + 1) for i in range(n)]


def _sequence(draw):
    length = int(draw.integers(3, 9))
    return Sequence(draw.integers(1, VOCAB, length), [True] * length)


def objective(logps, batch):
    count = batch.mask.sum()
    return -logps.sum() / count, {"nll": (-logps.sum(), count)}


def method(**changes):
    settings = dict(name="nll", format="text", encode=None, objective=objective, weight=lambda batch: batch.targets, params={},
                    defaults={"lr": 0.05, "batch_size": 8}, reference=False, watch=("loss",), check=None, prepare=None,
                    rollout=None, critic=None)
    return SimpleNamespace(**{**settings, **changes})


class Chatty(BigramPolicy):
    "A bigram policy with a tokenizer, so that it can be given rows of text."
    def __init__(self, max_length=64, **settings):
        from snapshots import make_tokenizer
        self.tokenizer = make_tokenizer()
        self.max_length = max_length
        super().__init__(len(self.tokenizer), **settings)


PROMPTS = [[int(x) for x in np.random.default_rng(i).integers(6, 300, 3 + 2 * i)] for i in range(7)]


def make_batch(rows=4, width=20, vocab=300, seed=0):
    "Right-padded rows of random lengths, the second half of each a target."
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((rows, width), dtype=np.int32), np.zeros((rows, width), dtype=bool)
    for row in range(rows):
        length = width if row == 0 else int(rng.integers(width // 2, width))
        ids[row, :length] = rng.integers(6, vocab, length)
        mask[row, length // 2: length] = True
    return Batch(ids, mask, rows=tuple(range(1, rows + 1)))


def mean_loss(logps, batch):
    "Negative log-likelihood per target."
    return -logps.sum() / batch.mask.sum(), {"nll": (-logps.sum(), batch.mask.sum())}
