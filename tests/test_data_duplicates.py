"""Near-duplicates against brute force, leaks in every format, and splits that nothing straddles."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from realign_core.data.duplicates import (
    Evaluation,
    banding,
    candidate_probability,
    contamination,
    deduplicate,
    jaccard,
    near_duplicates,
    prompt_text,
    row_text,
    shingles,
    split_by_group,
    words,
)
from realign_core.errors import DataError


def corpus(n, seed, length=40, vocabulary=400):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randint(length // 2, length))) for _ in range(n)]


def edited(text, k, rng):
    tokens = text.split()
    for _ in range(k):
        i = rng.randrange(len(tokens))
        rng.choice([lambda i=i: tokens.__setitem__(i, "new"), lambda i=i: tokens.pop(i) if len(tokens) > 3 else None,
                    lambda i=i: tokens.insert(i, "extra")])()
    return " ".join(tokens)


def by_force(texts, threshold):
    "Connected components over all pairs, as labels."
    sets, labels = [shingles(t) for t in texts], list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(sets[i], sets[j]) >= threshold:
                low, high = sorted((labels[i], labels[j]))
                labels = [low if x == high else x for x in labels]
    return labels


@pytest.mark.parametrize(("threshold", "seed"), [(0.8, 0), (0.8, 1), (0.5, 2), (0.95, 3)])
def test_agrees_with_all_pairs(threshold, seed):
    rng, base = random.Random(seed), corpus(60, seed)
    texts = base + [edited(rng.choice(base), rng.randrange(8), rng) for _ in range(140)]
    rng.shuffle(texts)
    found, wanted = near_duplicates(texts, threshold).labels.tolist(), by_force(texts, threshold)
    assert [f == w for f, w in zip(found, wanted, strict=True)].count(False) <= 1  # LSH may miss one pair in a hundred
    assert all(wanted[i] == wanted[f] for i, f in enumerate(found)), "joined what is not alike"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_99_of_100_at_the_threshold(threshold):
    bands, rows = banding(threshold)
    assert candidate_probability(threshold, bands, rows) >= 0.99 and bands * rows <= 126


def test_chains_are_one_cluster_and_the_first_is_kept():
    tokens = [f"w{i}" for i in range(60)]
    chain = [" ".join(["x"] * k + tokens[k:]) for k in range(0, 12, 2)]  # each is like the next, the ends are not alike
    assert jaccard(shingles(chain[0]), shingles(chain[-1])) < 0.8
    found = near_duplicates(chain)
    assert found.labels.tolist() == [0] * 6 and found.kept.tolist() == [0]


def test_five_thousand_copies_are_no_trouble():
    text = " ".join(f"w{i}" for i in range(200))
    start = time.perf_counter()
    found = near_duplicates([text + f" {i}" for i in range(5000)])
    assert len(found.kept) == 1 and time.perf_counter() - start < 20


def test_the_best_is_kept_and_ties_go_to_the_first():
    text = " ".join(f"w{i}" for i in range(30))
    rows = [{"text": text, "s": s} for s in (1.0, 3.0, float("nan"), 3.0)]
    assert deduplicate(rows, score=lambda r: r["s"])[0] == [rows[1]]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["", "!", "?", "!"], ["\ud800 a b c", "a b c \ud800"], ["\0", "a\0b"]])
def test_texts_without_words_and_odd_characters(texts):
    found = near_duplicates(texts)
    assert len(found.labels) == len(texts)
    assert len(found.kept) == len(set(texts)) - (texts == ["\ud800 a b c", "a b c \ud800"])


@pytest.mark.parametrize("bad", [dict(threshold=0), dict(threshold=1.1), dict(size=0), dict(score=[1.0])])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(DataError):
        near_duplicates(["a b c", "d e f"], **bad)


def test_the_same_in_every_process():
    code = "from realign_core.data.duplicates import shingles; print(shingles('one two three four').tolist())"
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s, "PATH": ""}, capture_output=True,
                           text=True, check=True).stdout for s in ("1", "2")}
    assert runs == {f"{shingles('one two three four').tolist()}\n"}


def test_words_fold_what_does_not_matter():
    assert words("Don’t ＳＨＯＵＴ") == words("don't shout") == ["don't", "shout"]
    assert words("東京 and カナ") == ["東", "京", "and", "カ", "ナ"]


LEAK = "which of the seven harbour towns sells the most amber in the third week of spring"
FORMATS = [
    {"text": f"Question: {LEAK}"},
    {"instruction": LEAK, "output": "long " * 100},
    {"messages": [{"role": "system", "content": "be brief " * 20}, {"role": "user", "content": LEAK},
                  {"role": "assistant", "content": "word " * 90}]},
    {"prompt": LEAK, "completion": "no " * 80},
    {"prompt": LEAK.upper(), "chosen": "a " * 50, "rejected": "b " * 50},
    {"chosen": [{"role": "user", "content": LEAK}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": LEAK}, {"role": "assistant", "content": "b"}]},
    {"prompt": [{"role": "user", "content": LEAK}], "completion": [{"role": "assistant", "content": "x " * 99}], "label": True},
    {"prompt": LEAK, "responses": [{"text": "no " * 50, "score": 1.0}]},
    {"problem": LEAK, "solution": "Elm", "verify": {"name": "exact"}},
    {"harmful": LEAK, "harmless": "which bird is blue"},
]


@pytest.mark.parametrize("row", FORMATS, ids=lambda r: "+".join(r))
def test_a_leak_is_found_in_every_format(row):
    clean = {"prompt": "what is the colour of the heron that lives beside the old mill by the lake", "completion": "grey"}
    assert contamination([clean, row], [{"prompt": LEAK, "answer": "Elm"}]).rows.tolist() == [1]
    assert LEAK in (prompt_text(row).casefold()) and LEAK in row_text(row).casefold()


def test_half_is_contaminated_and_less_is_not():
    eight = " ".join(f"e{i}" for i in range(8))
    rows = [f"{eight} {' '.join(f'o{i}' for i in range(k))}" for k in (7, 8, 9)]
    found = contamination(rows, [eight])
    assert found.coverage.tolist() == [8 / 15, 8 / 16, 8 / 17] and found.rows.tolist() == [0, 1]


def test_short_evaluation_texts():
    exam = Evaluation(["Why?", "What is it?", "What colour is it?"])
    texts = ("why", "Why not?", "what is it", "tell me what is it", "so what colour is it")
    assert [exam.covered(t) for t in texts] == [1, 0, 1, 0, 0.8]
    with pytest.raises(DataError):
        Evaluation(["", "?!"])


def test_covered_is_the_definition_counted_word_by_word():
    rng = random.Random(0)
    exam_texts, text = corpus(5, 1, 30, 12), corpus(1, 2, 200, 12)[0]
    text = " ".join([text, *exam_texts[rng.randrange(5)].split()[3:16], "end"])
    runs = {tuple(words(t)[i : i + 8]) for t in exam_texts for i in range(len(words(t)) - 7)}
    tokens = words(text)
    inside = {k for i in range(len(tokens) - 7) if tuple(tokens[i : i + 8]) in runs for k in range(i, i + 8)}
    assert inside and Evaluation(exam_texts).covered(text) == len(inside) / len(tokens)


def prompts(n, seed=0):
    return [{"prompt": t, "id": i} for i, t in enumerate(corpus(n, seed))]


def test_nothing_straddles_and_the_order_of_the_file_does_not_matter():
    rng, rows = random.Random(5), prompts(150)
    rows += [{"prompt": edited(rng.choice(rows[:150])["prompt"], 1, rng), "id": 150 + i} for i in range(150)]
    split = split_by_group(rows, seed=3)
    held = [r["prompt"] for r in split.held]
    assert split.straddling == 0 and 24 <= len(held) <= 30 and len(split.train) + len(held) == 300
    sides = [shingles(t) for t in held], [shingles(r["prompt"]) for r in split.train]
    assert max(jaccard(a, b) for a in sides[0] for b in sides[1]) < 0.8
    shuffled = rng.sample(rows, len(rows))
    assert {r["id"] for r in split_by_group(shuffled, seed=3).held} == {r["id"] for r in split.held}
    assert {r["id"] for r in split_by_group(rows, seed=4).held} != {r["id"] for r in split.held}


def test_a_named_group_stays_together():
    rows = [{**r, "user": r["id"] // 4 if r["id"] < 160 else None} for r in prompts(200)]
    split = split_by_group(rows, group=lambda r: r["user"])
    sides = [{r["user"] for r in side} - {None} for side in (split.train, split.held)]
    assert not sides[0] & sides[1] and sides[1]


def test_a_split_that_cannot_be():
    same = [{"prompt": "the very same prompt again and again"}] * 50
    with pytest.raises(DataError, match="too large"):
        split_by_group(same)
    for rows, share in ((prompts(3), 0.1), (prompts(5), 1.0), ([], 0.1)):
        with pytest.raises(DataError, match="nothing is left"):
            split_by_group(rows, share)


def test_a_row_that_is_none():
    with pytest.raises(DataError, match="not an object"):
        deduplicate([{"prompt": "x"}, 7])


def test_datasketch_estimates_the_same_similarity():
    "The oracle for our shingles: datasketch on the plain texts of the shingles."
    datasketch = pytest.importorskip("datasketch")
    rng, base = random.Random(9), corpus(40, 9)
    gaps = []
    for text in base:
        other = edited(text, rng.randrange(6), rng)
        sketches = []
        for one in (text, other):
            tokens, sketch = words(one), datasketch.MinHash(num_perm=512)
            sketch.update_batch([" ".join(tokens[i : i + 3]).encode() for i in range(len(tokens) - 2)])
            sketches.append(sketch)
        gaps.append(sketches[0].jaccard(sketches[1]) - jaccard(shingles(text), shingles(other)))
    assert abs(np.mean(gaps)) < 0.01 and np.max(np.abs(gaps)) < 0.1
