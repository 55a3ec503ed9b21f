"""Taxonomies: shares, draws, distances with honest intervals, and files that people get wrong."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_core.data.taxonomy import Taxonomy, coverage, distance, read_taxonomy, total_variation, write_taxonomy
from realign_core.errors import DataError, OutputError

AXES = {"what": {"a": 5, "b": 3, "c": 2}, "how": {"x": 3, "y": 1}, "who": ["me", "you"], "hard": {"1": 6, "2": 3, "3": 1}}
RULES = [{"what": "c", "how": "y"}, {"who": "you", "hard": ["2", "3"], "what": "b"}]


def plain(n=3, k=3):
    return Taxonomy({f"axis{i}": {f"v{j}": j + 1 for j in range(k)} for i in range(n)})


# ---- shares

def test_without_exclusions_shares_are_products():
    taxonomy = plain()
    wanted = [math.prod(taxonomy.axes[a][v] for a, v in cell.items()) for cell in taxonomy.cells]
    assert np.allclose(taxonomy.shares, wanted) and len(taxonomy.cells) == 27


def test_exclusions_keep_the_marginals():
    taxonomy = Taxonomy(AXES, RULES)
    assert taxonomy.strain < 1e-6 and math.isclose(taxonomy.shares.sum(), 1)
    assert all(taxonomy.allows(cell) for cell in taxonomy.cells)
    assert not any(cell["what"] == "c" and cell["how"] == "y" for cell in taxonomy.cells)
    assert sum(cell == {"what": "b", "how": "x", "who": "you", "hard": "1"} for cell in taxonomy.cells) == 1


def test_weights_that_exclusions_do_not_allow_are_said_so():
    taxonomy = Taxonomy({"a": {"p": 1, "q": 1}, "b": {"r": 9, "s": 1}}, [{"a": "p", "b": "r"}])
    assert taxonomy.strain > 0.1 and "do not allow" in taxonomy._repr_markdown_()


@pytest.mark.parametrize("axes, rules, named", [
    ({}, (), "axes"), ({"a": {}}, (), "axes.a"), ({"a": {"x": 0}}, (), "axes.a.x"), ({"a": {"x": float("nan")}}, (), "axes.a.x"),
    ({"a": {"x": True}}, (), "axes.a.x"), ({"a": {"x": "3"}}, (), "axes.a.x"), ({"a": {True: 1}}, (), "axes.a"),
    ({"a": ["x", "x"]}, (), "axes.a"), ({"a": "xyz"}, (), "axes.a"), ({"a": ["x"]}, [{"b": "x"}], "exclude"),
    ({"a": ["x"]}, [{"a": "y"}], "exclude"), ({"a": ["x"]}, [{}], "exclude"), ({"a": ["x"]}, ["x"], "exclude"),
    ({"a": ["x", "y"]}, [{"a": "x"}], "axes.a"), ({"a": ["x", "y"]}, [{"a": ["x", "y"]}], "axes.a"),
    ({f"a{i}": list("0123456789") for i in range(7)}, (), "axes")])
def test_taxonomies_that_make_no_sense(axes, rules, named):
    with pytest.raises(DataError) as caught:
        Taxonomy(axes, rules)
    assert named in caught.value.field


# ---- draws

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5))
def test_every_prefix_follows_every_axis(n, seed):
    taxonomy = Taxonomy(AXES, RULES)
    drawn = taxonomy.draw(n, seed)
    assert drawn == taxonomy.draw(n + 7, seed)[:n]
    for axis, values in taxonomy.axes.items():
        counts = Counter(cell[axis] for cell in drawn)
        assert all(abs(counts[value] - n * share) < 2 for value, share in values.items())


def test_closer_than_independent_draws_on_cells_and_pairs():
    taxonomy = plain(4, 3)
    index = {tuple(cell.values()): i for i, cell in enumerate(taxonomy.cells)}
    for n in (50, 400):
        ours = np.bincount([index[tuple(c.values())] for c in taxonomy.draw(n)], minlength=len(index))
        others = [np.random.default_rng(s).multinomial(n, taxonomy.shares) for s in range(20)]
        assert total_variation(ours, taxonomy.shares) < min(total_variation(o, taxonomy.shares) for o in others)
        for pair in itertools.combinations(taxonomy.axes, 2):
            groups = taxonomy.groups(pair)
            worst = np.abs(np.bincount(groups, ours) - n * np.bincount(groups, taxonomy.shares)).max()
            assert worst < 2.5


def test_rare_cells_are_drawn_as_often_as_they_should():
    taxonomy = plain(3, 4)
    index = {tuple(cell.values()): i for i, cell in enumerate(taxonomy.cells)}
    draws = (taxonomy.draw(20, seed) for seed in range(150))
    total = np.bincount([index[tuple(cell.values())] for drawn in draws for cell in drawn], minlength=len(index))
    expected = 20 * 150 * taxonomy.shares
    rare = expected < np.quantile(expected, 0.3)
    assert 0.6 < total[rare].sum() / expected[rare].sum() < 1.4
    assert len({str(taxonomy.draw(20, seed)) for seed in range(10)}) == 10


def test_requests():
    taxonomy = Taxonomy(AXES, RULES, name="demo")
    made, again = (taxonomy.requests(30, "{what} {how} {who} {hard}", seed=2, temperature=0.5, extra={"licence": "own"})
                   for _ in range(2))
    assert len({r.key for r in made}) == 30 and made == again
    assert all(r.prompt == " ".join(r.extra[a] for a in AXES) and r.extra["licence"] == "own" for r in made)
    assert taxonomy.requests(3, lambda cell, rng: f"{cell['what']} {rng.random()}")[0].prompt != made[0].prompt
    with pytest.raises(DataError, match="axis"):
        taxonomy.requests(1, "{colour}")
    with pytest.raises(DataError):
        taxonomy.draw(-1)
    assert taxonomy.draw(0) == []


# ---- distances

@pytest.mark.parametrize("shift, n, sample", [(0.0, 100, False), (0.0, 100, True), (0.15, 100, False),
                                              (0.15, 300, True), (0.4, 60, True)])
def test_the_interval_covers_the_true_distance(shift, n, sample):
    base = np.ones(12) / 12
    other = base.copy()
    other[:6] += shift / 6
    other[6:] -= shift / 6
    true, hits, values = total_variation(base, other), 0, []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        theirs = rng.multinomial(n, other) if sample else other
        found = distance(rng.multinomial(n, base), theirs, sample=sample, seed=seed, draws=300)
        assert found.low <= found.value <= found.high
        hits += found.low <= true <= found.high
        values.append(found.value)
    assert hits >= 102  # 85 % of 120, where 95 % is the aim
    assert shift == 0 or abs(np.mean(values) - true) < 0.05


def test_distance_of_nothing():
    for counts, other in (([0, 0], [1, 1]), ([1, 2], [0, 0])):
        with pytest.raises(DataError):
            distance(counts, other)


# ---- coverage

def rows_of(taxonomy, n=400, **changes):
    return [{**cell, **changes} for cell in taxonomy.draw(n)]


def test_holes_impossible_cells_and_unknown_values_are_found():
    taxonomy = Taxonomy(AXES, RULES)
    rows = [row for row in rows_of(taxonomy) if (row["what"], row["hard"]) != ("a", "2")]
    report = coverage(taxonomy, rows)
    assert {(c["what"], c["hard"]) for c, _ in report.holes} == {("a", "2")} and not report.missing
    assert report.holes == sorted(report.holes, key=lambda hole: -hole[1]) and report.distances["all axes"].excludes(0)
    odd = [{"what": "c", "how": "y", "who": "me", "hard": "1"}] * 3 + [{"what": "z", "how": None, "who": "me", "hard": 1}] * 2
    report = coverage(taxonomy, rows + odd)
    assert report.impossible == {("c", "y", "me", "1"): 3}
    assert report.unknown == {("what", "z"): 2, ("how", None): 2, ("hard", "1"): 2}
    text = report._repr_markdown_()
    assert "Holes" in text and "c · y · me · 1 (3 rows)" in text


def test_a_missing_value_is_named():
    taxonomy = Taxonomy(AXES, RULES)
    report = coverage(taxonomy, [row for row in rows_of(taxonomy) if row["hard"] != "3"])
    assert report.missing == {"hard": ["3"]} and "**none**" in report._repr_markdown_()


def test_labels_by_axis_by_row_and_by_field_agree():
    taxonomy = Taxonomy(AXES, RULES)
    rows = rows_of(taxonomy)
    by_axis = {axis: lambda row, axis=axis: row[axis] for axis in AXES}
    assert coverage(taxonomy, rows) == coverage(taxonomy, rows, by_axis) == coverage(taxonomy, iter(rows), lambda row: row)


def test_labelling_functions_that_fail_name_the_row():
    taxonomy = Taxonomy(AXES)
    absent = {axis: lambda row: row["nothing"] for axis in AXES}
    for label in (absent, {"what": lambda row: "a"}, lambda row: None, lambda row: 1 / 0):
        with pytest.raises(DataError, match="row 1"):
            coverage(taxonomy, rows_of(taxonomy), label)
    for rows in ([], [{}], [{"what": "a"}]):
        with pytest.raises(DataError, match="labelled"):
            coverage(taxonomy, rows)


def test_against_production():
    ours, theirs = Taxonomy(AXES), Taxonomy({**AXES, "hard": {"1": 1, "2": 3, "3": 6}})
    report = coverage(ours, rows_of(ours), production=rows_of(theirs, 200))
    assert report.against == "production" and report.distances["hard"].excludes(0.2) and not report.distances["what"].excludes(0)
    same = coverage(ours, rows_of(ours), production=rows_of(ours, 200))
    assert not same.distances["all axes"].excludes(0)


# ---- files

def test_a_file_written_and_read(tmp_path):
    taxonomy = Taxonomy(AXES, RULES, name="démo")
    again = read_taxonomy(write_taxonomy(taxonomy, tmp_path / "t.yaml"))
    assert again.name == "démo" and again.cells == taxonomy.cells and np.allclose(again.shares, taxonomy.shares)
    assert [p.name for p in tmp_path.iterdir()] == ["t.yaml"]
    with pytest.raises(OutputError):
        write_taxonomy(taxonomy, tmp_path / "nowhere" / "t.yaml")


@pytest.mark.parametrize("text", [
    "axes: {a: {x: 1, x: 2}}", "axes: {a: [x], a: [y]}", "axes: {a: {yes: 1, no: 2}}", "axes: {a: [1, 2]}", "axes: {a: {x: -1}}",
    "axes: [a]", "- a", "", "null", "axes: {a: [x]}\nexclusions: []", "axes: {a: [x]}\nexclude: [{a: z}]",
    "axes: {a: [x]}\nexclude: 3", "axes: {a: [x]}\nexclude: [{a: 3}]", "axes: {a: [x]}\nexclude: [{a: [[x]]}]",
    "axes: {[1, 2]: [x]}", "axes: {{a: 1}: [x]}",
    "a: &a [*a]", "axes: !!python/object/apply:os.system ['true']", "axes: {a: \x00}", "axes: {a: [x]", "{" * 3000,
    "axes: {a: [x]}\nname: 3\nexclude: {a: x}"])
def test_files_that_people_get_wrong(tmp_path, text):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match="t.yaml"):
        read_taxonomy(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00axes")
    for name in ("missing.yaml", "bytes.yaml", "."):
        with pytest.raises(DataError):
            read_taxonomy(tmp_path / name)
