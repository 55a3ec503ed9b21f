"""DPO in rounds: whose pairs, whose reference, and going on after a kill."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest

from realign_core import load
from realign_core.data.formats import read
from realign_core.data.verifiable import sums
from realign_core.engine.batching import collate
from realign_core.engine.encoding import Encoder
from realign_core.engine.rollout import Rollout, encode_prompt
from realign_core.errors import DataError, ReAlignError
from realign_core.methods.iterative_dpo import draw_pairs, iterate
from realign_core.methods.online_dpo import pair

ROWS = sums(24)
SETTINGS = dict(rounds=2, prompts=8, n=3, max_tokens=16, steps=2, batch_size=4, lr=1e-3, held_out=0, progress=False)


def length(row, answer):
    "Longer is better: pairs are found at once."
    return float(len(answer))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    @functools.cache
    def get(backend):
        out = tmp_path_factory.mktemp(f"rounds-{backend}")
        policy = load("tinyworld-instruct", backend, threads=1)
        return policy, iterate(policy, ROWS, length, out=out, **SETTINGS), out
    return get


@pytest.fixture
def trained(backend, runs):
    return runs(backend)


def test_each_round_is_anchored_to_the_model_that_wrote_its_pairs(trained):
    _, done, _ = trained
    for made in done:
        assert made.run.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy = reference before the first step
        assert made.run.history[-1]["margin"] != 0


def test_the_file_says_what_the_tokens_say(trained):
    policy, done, out = trained
    for k, made in enumerate(done, 1):
        rows = [json.loads(line) for line in (out / f"round-{k}" / "pairs.jsonl").read_text().splitlines()]
        assert len(rows) == len(made.pairs) and made.prompts == 8
        for row, made_of in zip(rows, made.pairs, strict=True):
            texts = [policy.tokenizer.decode(s.ids[s.mask].tolist(), skip_special_tokens=True) for s in made_of.sequences]
            assert [row["chosen"], row["rejected"]] == texts and len(texts[0]) > len(texts[1])
            assert row["prompt"] == made_of.task["prompt"]
    asked = [{p.task["prompt"] for p in made.pairs} for made in done]
    assert not asked[0] & asked[1]  # 16 of 24 prompts, each once


def test_the_second_round_is_written_by_the_trained_model(trained, backend):
    _, done, _ = trained
    first, one = (load("tinyworld-instruct", backend, threads=1) for _ in range(2))
    iterate(one, ROWS, length, **{**SETTINGS, "rounds": 1})
    encoder, order = Encoder(first.tokenizer, first.max_length), np.random.default_rng(0).permutation(len(ROWS))
    part = [encode_prompt(row, encoder, 16) for row in (read(ROWS, "online")[i] for i in order[8:16])]
    ask = Rollout(length, n=3, max_tokens=16, shape=pair)

    def ids(pairs): return [s.ids.tolist() for p in pairs for s in p.sequences]

    untrained, trained = (ids(draw_pairs(policy, part, ask, (0, 1), None)[0]) for policy in (first, one))
    assert trained == ids(done[1].pairs) != untrained


def test_the_same_call_again_goes_on_where_it_was(trained, backend):
    policy, done, out = trained
    again = load("tinyworld-instruct", backend, threads=1)
    rounds = iterate(again, ROWS, length, out=out, **SETTINGS)
    assert [r.run.history for r in rounds] == [r.run.history for r in done]
    batch = collate(done[0].pairs)
    np.testing.assert_array_equal(again.score(batch), policy.score(batch))


def test_prompts_come_again_when_all_had_their_turn(backend):
    policy = load("tinyworld-instruct", backend, threads=1)
    done = iterate(policy, ROWS[:6], length, **{**SETTINGS, "rounds": 2, "prompts": 4})
    assert [r.prompts for r in done] == [4, 4]
    assert iterate(policy, ROWS[:6], length, **{**SETTINGS, "rounds": 1, "prompts": 24})[0].prompts == 6


@pytest.mark.parametrize(("settings", "text"), [
    ({"rounds": 0}, "rounds=0"), ({"prompts": 0}, "prompts=0"), ({"n": 1}, "n=1"), ({"beta": 0.0}, "beta"),
    ({"nll": -1.0}, "nll"), ({"max_tokens": 0}, "max_tokens")])
def test_settings_without_sense(settings, text):
    with pytest.raises(ReAlignError, match=text):
        iterate(None, ROWS, length, **{**SETTINGS, **settings})


def test_a_reward_that_tells_nothing_apart(trained, tmp_path):
    policy, _, _ = trained
    with pytest.raises(DataError, match="no prompt has a better and a worse answer"):
        iterate(policy, ROWS, lambda row, answer: 1.0, out=tmp_path / "none", **SETTINGS)
    assert not (tmp_path / "none").exists()
