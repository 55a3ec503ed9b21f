"""The report: every error is counted and placed, figures are right, and defects that no single row shows are found."""

from __future__ import annotations

import gzip
import json
import random
import statistics

import numpy as np
import pytest

from realign_core.cli import main
from realign_core.data.checking import Hashes, Tally, Twins, check, headline, plot_lengths, tables
from realign_core.data.formats import FORMATS
from realign_core.errors import DataError

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


def pairs(n, longer=0.5):
    "Pairs of which this share has the longer answer on the better side."
    rows = []
    for i in range(n):
        sides = [f"{i} is right.", f"{i}, I would say."]
        better = sides[::-1] if i < longer * n else sides
        rows.append({"prompt": f"Question {i}?", "chosen": better[0], "rejected": better[1]})
    return rows


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def advice(report, format) -> dict[str, str]:
    return {fact.name: fact.advice for fact in report.facts[format] if fact.advice}


def test_all_errors_are_counted_the_first_are_shown_with_their_place(tmp_path):
    bad = {**PAIR, "chosen": ""}
    path = write(tmp_path / "a.jsonl", [PAIR, *[bad] * 30, "{", {**PAIR, "margin": "much"}, PAIR])
    report = check(path, first=3)
    assert (report.rows, report.errors, report.good, report.ok) == (34, 32, 2, False)
    assert [e["row"] for e in report.shown] == [2, 3, 4] and len(check(path, first=0).shown) == 0
    assert report.shown[0] == {"row": 2, "field": "chosen", "problem": "chosen is empty", "found": "''", "wanted": "text"}
    assert report.kinds == {("chosen is empty", "chosen"): 30, ("malformed JSON", ""): 1, ("wrong type", "margin"): 1}
    assert "32 errors" in headline(report) and len(tables(report)) >= 3


def test_errors_of_the_file_are_errors_too(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in pairs(5000)).encode())[:-40])
    report = check(path)
    assert report.errors == 1 and report.good > 100 and "gzip" in report.shown[0]["problem"]
    assert report.shown[0]["row"] == report.good + 1


def test_a_file_with_nothing_in_it_is_no_report(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        check(write(tmp_path / "a.jsonl", []))
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "none.jsonl")


@pytest.mark.parametrize("typo", [{"prompt": "?", "chosen": "a", "rejcted": "b"}, {"prompt": "?", "chosen": "a"},
                                  {"prompt": "?", "chosen": "a", "rejected": None}, {"chosen": "a", "rejected": "b"}])
def test_a_misspelt_row_is_a_bad_row_of_its_file_not_a_good_one_of_another(typo):
    report = check([*pairs(3), typo])
    assert report.errors == 1 and report.shown[0]["row"] == 4 and set(report.formats) == {"preference"}


def test_a_missing_label_is_not_a_prompt_completion():
    rows = [{"prompt": "?", "completion": "a", "label": True}, {"prompt": "?", "completion": "b"}]
    assert check(rows).shown[0]["field"] == "label"


def test_mixed_formats_are_reported_unless_they_are_meant():
    rows = [*pairs(3), {"text": "a"}, {"text": "b"}]
    report = check(rows)
    assert report.errors == 1 and report.shown[0]["problem"] == "several formats in one file"
    assert report.shown[0]["row"] == 4 and "3 preference, 2 text" in report.shown[0]["found"]
    assert check(rows, "mixed").ok and check(rows, "mixed").format == "mixed"
    assert check(rows, "text").errors == 3, "when the format is given, rows of another one are errors"


def test_duplicates_whatever_their_further_columns_say():
    rows = [*pairs(50), {**pairs(50)[7], "source": "elsewhere"}, pairs(50)[3], {**pairs(50)[3], "chosen": "Other."}]
    report = check(rows)
    assert report.duplicates == 2 and report.repeats == [(51, 8), (52, 4)] and report.prompts == 50 and report.ok
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert check([chat, chat, {**chat, "tools": []}]).duplicates == 2


@pytest.mark.parametrize(("share", "warned"), [(0.0, True), (0.3, True), (0.5, False), (0.9, True)])
def test_length_bias(share, warned):
    report = check(pairs(200, share))
    assert report.facts["preference"][0].value == pytest.approx(share)
    assert ("chosen is the longer one" in advice(report, "preference")) is warned


@pytest.mark.parametrize(("share", "warned"), [(0.65, False), (0.35, True), (0.95, True)])
def test_label_balance(share, warned):
    report = check([{"prompt": f"{i}?", "completion": "a", "label": i < share * 100} for i in range(100)])
    assert report.facts["unpaired"][0].value == pytest.approx(share)
    assert bool(advice(report, "unpaired")) is warned


def test_pairs_the_wrong_way_round_groups_without_spread_problems_out_of_reach():
    turned = check([{**PAIR, "chosen_score": 0.2, "rejected_score": 0.9}])
    assert "chosen scores lower" in advice(turned, "preference")
    flat = check([{"prompt": "?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 1.0}]}])
    assert "groups without spread" in advice(flat, "groups")
    hard = check([{"problem": "?", "solution": "4", "responses": [{"text": "5", "correct": False}]}])
    assert "never right" in advice(hard, "verifiable")
    uneven = check([{"harmful": "How do I pick a lock, and then hide it?", "harmless": "Cake?"}])
    assert "harmful : harmless length" in advice(uneven, "contrast")
    deaf = check([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                                {"role": "user", "content": "c"}]}])
    assert "end with another role" in advice(deaf, "messages")


def test_control_and_replacement_characters_are_mentioned():
    report = check([{"text": "caf\ufffd"}, {"text": "a\x00b"}, {"text": "a\tb\n"}])
    assert report.ok and "2 texts hold control" in headline(report)


def test_tally_agrees_with_exact_statistics():
    rng = random.Random(0)
    values = [int(rng.lognormvariate(6, 2)) for _ in range(20_000)]
    tally = Tally()
    for value in values:
        tally.add(value)
    assert (tally.n, tally.low, tally.high) == (len(values), min(values), max(values))
    assert tally.mean == pytest.approx(statistics.fmean(values))
    for share in (0.05, 0.5, 0.95, 1.0):
        assert tally.quantile(share) == pytest.approx(sorted(values)[max(int(share * len(values)) - 1, 0)], rel=0.006)
    assert len(tally.bins) < 10_000


def test_every_format_has_figures_and_a_report_in_both_shapes():
    from test_formats import ROWS
    assert set(ROWS) == set(FORMATS)
    for name, row in ROWS.items():
        report = check([row, {**row, "teacher": "A | B"}])
        assert report.ok and report.format == name and report.formats[name].rows == 2 and report.duplicates == 1
        assert report.formats[name].sizes and name in report._repr_markdown_()
        assert plot_lengths(report).axes


def test_the_markdown_table_survives_bars_dollars_and_line_feeds():
    text = check([{"prompt": "a|b\n$c$ <b>", "chosen": 3, "rejected": "x"}, {"prompt": "?", "chosen": "a|b\n<b>", "rejected": 1}],
                 "preference")._repr_markdown_()
    assert all(line.count("|") - line.count("\\|") == 6 for line in text.splitlines() if line.startswith("| 2"))


def test_the_command_line(tmp_path, capsys):
    good, bad = write(tmp_path / "good.jsonl", pairs(10)), write(tmp_path / "bad.jsonl", [*pairs(10), "{"])
    assert main(["check", str(good)]) == 0 and "10 rows, no errors" in capsys.readouterr().out
    assert main(["check", str(bad), "--first", "1"]) == 1 and "malformed JSON" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["check", str(good), "--format", "sft"]) == 1
    assert main(["check", str(good), "--format", "nonsense"]) == 2
    renamed = write(tmp_path / "renamed.jsonl", [{"en": "cat", "de": "Katze"}])
    assert main(["check", str(renamed), "--column", "prompt", "en", "--column", "completion", "de"]) == 0


def test_hashes_find_the_same_over_files_as_in_memory():
    rng = np.random.default_rng(0)
    values = rng.integers(-40_000, 40_000, 200_000)
    hashes = Hashes()
    for value in values.tolist():
        hashes.append(value)
    assert hashes.files and len(hashes.recent) < Hashes.ROOM
    twins = Twins()
    twins.contents, twins.rows = hashes, len(values)
    count, repeats = twins.found()
    first, expected = {}, []
    for place, value in enumerate(values.tolist()):
        if value in first:
            expected.append((place, first[value]))
        first.setdefault(value, place)
    assert count == len(expected) and repeats == expected[:5]
