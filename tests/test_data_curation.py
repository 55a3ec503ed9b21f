"""Pipelines: killed at ten random moments, damaged, changed, misspelt; and every planted defect is found."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign_core.data import curation
from realign_core.data.curation import Item, Pipeline, curate, read_pipeline
from realign_core.data.generator import Reply
from realign_core.errors import DataError, OutputError, ReAlignError

WORDS = [f"w{i}" for i in range(400)]


def prompts(n=60, seed=0, **more):
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.sample(WORDS, 12)), "id": i, **more} for i in range(n)]


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def contents(folder):
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Slow:
    "A generator that takes its time and depends on its seed."
    name = "slow"

    def __init__(self, policy=None, delay=0.004):
        self.delay = delay

    def reply(self, requests, seed=0):
        out = []
        for r in requests:
            time.sleep(self.delay)
            rng = random.Random(f"{seed} {r.key}")
            out.append(Reply(r.key, tuple(" ".join(rng.sample(WORDS, 6)) for _ in range(r.n)), None, (True,) * r.n, self.name))
        return out


def slow_score(row, answer):
    time.sleep(0.001)
    return len(answer) % 7 / 6


def whole(folder, pool=None):
    dump(folder / "pool.jsonl", prompts(60) if pool is None else pool)
    dump(folder / "exam.jsonl", prompts(60)[5:8])
    return Pipeline([{"read": "pool.jsonl"}, {"decontaminate": "exam.jsonl"}, {"generate": {"model": "slow", "n": 2, "chunk": 8}},
                     {"score": slow_score}, {"filter": {"least": 0.2}}, "deduplicate", {"select": {"share": 0.8}}, "split",
                     "write"], folder=folder, licence="CC0-1.0", name="whole")


@pytest.fixture(autouse=True)
def slow_generator(monkeypatch):
    from realign_core.data import generator
    monkeypatch.setattr(generator, "PolicyGenerator", Slow)
    monkeypatch.setattr(curation.Context, "policy", lambda self, name, backend="auto": None)


def test_killed_at_ten_random_moments(tmp_path):
    pipeline, rng, fork = whole(tmp_path), random.Random(7), multiprocessing.get_context("fork")
    began = time.monotonic()
    curate(pipeline, tmp_path / "undisturbed", progress=False)
    seconds, wanted = time.monotonic() - began, contents(tmp_path / "undisturbed")
    kills, reached, attempt = 0, set(), 0
    while kills < 10:
        out = tmp_path / f"killed{attempt}"
        process = fork.Process(target=curate, args=(pipeline, out), kwargs={"progress": False})
        process.start()
        process.join(rng.uniform(0, 0.6 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            reached.add(len(list((out / "stages").glob("*.json"))) if out.exists() else 0)
        else:  # it was quicker than its killer: begin another
            assert process.exitcode == 0
            curate(pipeline, out, progress=False)
            assert contents(out) == wanted
            attempt += 1
    for i in range(attempt + 1):
        curate(pipeline, tmp_path / f"killed{i}", progress=False)
        assert contents(tmp_path / f"killed{i}") == wanted
    assert len(reached) > 1, "the kills should hit different stages"


def test_nothing_runs_twice_and_a_change_runs_what_follows(tmp_path):
    dump(tmp_path / "pool.jsonl", prompts(30))
    calls = []

    def first(rows):
        calls.append("first")
        return rows

    def second(rows):
        calls.append("second")
        return rows

    def run(share=0.5):
        calls.clear()
        stages = [{"read": "pool.jsonl"}, {"apply": first}, {"select": {"by": "id", "share": share}}, {"apply": second}]
        made = curate(Pipeline(stages, folder=tmp_path), progress=False)
        return calls.copy(), len(made.train)
    assert run() == (["first", "second"], 15)
    assert run() == ([], 15)
    assert run(0.2) == (["second"], 6)
    dump(tmp_path / "pool.jsonl", prompts(40))
    assert run(0.2) == (["first", "second"], 8)
    (tmp_path / "curated" / "stages" / "03-select.jsonl").write_bytes(b"{")
    assert run(0.2) == ([], 8), "the damaged stage is run again, and what follows is what it was"
    (tmp_path / "curated" / "stages" / "02-apply.json").unlink()
    assert run(0.2) == (["first"], 8)


def test_a_function_in_a_file_is_part_of_the_fingerprint(tmp_path):
    dump(tmp_path / "pool.jsonl", prompts(10, completion="x y"))
    (tmp_path / "mine.py").write_text("def score(row, answer): return 0.25\n")
    (tmp_path / "p.yaml").write_text("stages:\n- read: pool.jsonl\n- score: mine.py:score\n- write\n")
    assert {r["score"] for r in curate(tmp_path / "p.yaml", progress=False).train} == {0.25}
    (tmp_path / "mine.py").write_text("def score(row, answer): return 0.75\n")
    assert {r["score"] for r in curate(tmp_path / "p.yaml", progress=False).train} == {0.75}


def test_files_of_stages_that_are_gone_are_removed(tmp_path):
    dump(tmp_path / "pool.jsonl", prompts(30))
    made = curate(Pipeline([{"read": "pool.jsonl"}, "split", "write"], folder=tmp_path), progress=False)
    assert len(made.held) == 3 and (made.folder / "heldout.jsonl").exists()
    made = curate(Pipeline([{"read": "pool.jsonl"}, "write"], folder=tmp_path), progress=False)
    assert not (made.folder / "heldout.jsonl").exists() and len(list((made.folder / "stages").iterdir())) == 4
    assert len((made.folder / "train.jsonl").read_text().splitlines()) == 30


def test_a_missing_result_is_written_again(tmp_path):
    pipeline = whole(tmp_path)
    made = curate(pipeline, progress=False)
    before = contents(made.folder)
    for name in ("train.jsonl", "CARD.md", "histograms.png"):
        (made.folder / name).unlink()
    curate(pipeline, progress=False)
    assert contents(made.folder) == before


def test_a_python_pipeline(tmp_path):
    dump(tmp_path / "pool.jsonl", prompts(20))
    (tmp_path / "p.py").write_text("from realign_core.data.curation import Pipeline\n"
                                   "def short(rows): return [r for r in rows if r['id'] < 5]\n"
                                   "PIPELINE = Pipeline([{'read': 'pool.jsonl'}, {'apply': short}, 'write'])\n")
    made = curate(tmp_path / "p.py", progress=False)
    assert len(made.train) == 5 and made.stages[1]["dropped"] == {"dropped by short": 15}


BROKEN = {
    "": "no pipeline", "stages: 3\n": "needs stages", "stages: []\n": "needs stages", "- read: x\n": "no pipeline",
    "stages:\n- red: x\n": "unknown stage", "stages:\n- read\n": "missing", "stages:\n- read: {file: x, fromat: y}\n": "fromat",
    "stages:\n- read: x\n  write: y\n": "not a stage", "stages: [read: x]\nsede: 3\n": "no pipeline",
    "stages: [read: x]\nseed: -1\n": "seed", "a: [\n": "cannot be read", "stages: [read: x]\nstages: [read: y]\n": "twice",
    "stages: [!!python/object/apply:os.system [ls]]\n": "cannot be read", "stages:\n- 7\n": "not a stage"}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_pipelines_name_the_file(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=BROKEN[text]) as error:
        read_pipeline(path)
    assert "broken.yaml" in str(error.value)


@pytest.mark.parametrize("content", ["raise ValueError('x')", "x = (", "PIPELINE = 3"])
def test_broken_python_pipelines(tmp_path, content):
    (tmp_path / "p.py").write_text(content)
    with pytest.raises(DataError, match="p.py"):
        read_pipeline(tmp_path / "p.py")
    with pytest.raises(DataError, match="no such pipeline"):
        read_pipeline(tmp_path / "q.yaml")


FAULTS = {
    "no such file": ([{"read": "missing.jsonl"}], "stage 1", "missing.jsonl"),
    "bad row": ([{"read": "bad.jsonl"}], "stage 1", "row 2"),
    "crashing score": ([{"read": "pool.jsonl"}, {"score": lambda row, answer: 1 / 0}], "stage 2", "pool.jsonl:1"),
    "score that is none": ([{"read": "pool.jsonl"}, {"score": lambda row, answer: float("nan")}], "stage 2", "pool.jsonl:1"),
    "no answer": ([{"read": "bare.jsonl"}, {"score": lambda row, answer: 1.0}], "stage 2", "bare.jsonl:1"),
    "no such function": ([{"read": "pool.jsonl"}, {"score": "mine.py:score"}], "stage 2", "mine.py"),
    "crashing function": ([{"read": "pool.jsonl"}, {"apply": lambda rows: rows[999]}], "stage 2", "IndexError"),
    "nothing left": ([{"read": "pool.jsonl"}, {"filter": {"field": "id", "least": 1e9}}], "stage 2", "no rows are left"),
    "not a number": ([{"read": "pool.jsonl"}, {"filter": {"field": "prompt", "least": 0}}], "stage 2", "pool.jsonl:1"),
    "no bounds": ([{"read": "pool.jsonl"}, "filter"], "stage 2", "keeps everything"),
    "who answers": ([{"read": "pool.jsonl"}, "generate"], "stage 2", "who is to answer"),
    "how many": ([{"read": "pool.jsonl"}, {"select": "id"}], "stage 2", "how many"),
    "too few to split": ([{"read": "two.jsonl"}, "split"], "stage 2", "one side"),
    "not JSON": ([{"read": "pool.jsonl"}, {"apply": lambda rows: [{"prompt": {1, 2}}]}], "stage 2", "JSON"),
    "a surrogate": ([{"read": "pool.jsonl"}, {"apply": lambda rows: [{"prompt": "\ud800"}]}], "stage 2", "JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_errors_name_stage_and_file(tmp_path, name):
    stages, *parts = FAULTS[name]
    dump(tmp_path / "pool.jsonl", prompts(20, completion="yes"))
    dump(tmp_path / "bare.jsonl", prompts(3))
    dump(tmp_path / "two.jsonl", prompts(2))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 7}\n')
    with pytest.raises(ReAlignError) as error:
        curate(Pipeline(stages, folder=tmp_path), progress=False)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not list((tmp_path / "curated").glob("*.jsonl")) and not list(tmp_path.rglob(".*.part")), "nothing half-made is left"


def test_two_at_a_time_and_a_place_that_cannot_be_written(tmp_path):
    pipeline = whole(tmp_path)
    with curation._locked(tmp_path / "out"), pytest.raises(OutputError, match="another process"):
        curate(pipeline, tmp_path / "out", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        curate(pipeline, tmp_path / "file" / "out", progress=False)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    pipeline = whole(tmp_path)
    made = curate(pipeline, progress=False)
    before = contents(made.folder)
    pipeline.seed = 1
    monkeypatch.setattr(curation.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space"):
        curate(pipeline, progress=False)
    assert contents(made.folder) == before


def test_where_rows_came_from_is_kept(tmp_path):
    made = curate(whole(tmp_path), progress=False)
    files = [(made.folder / f"{name}.jsonl").read_text() for name in ("train", "heldout")]
    rows = [json.loads(line) for text in files for line in text.splitlines()]
    by_id = {r["id"]: r["prompt"] for r in prompts(60)}
    for row in rows:
        place, sample = row["origin"].removeprefix("pool.jsonl:").split("#")
        assert int(place) == row["id"] + 1 and sample in "01" and by_id[row["id"]] == row["prompt"] and row["generator"] == "slow"
    counts = [(m["in"], m["out"], sum(m["dropped"].values())) for m in made.stages]
    assert all(n_in - dropped == n_out for n_in, n_out, dropped in counts[3:]), counts
    assert all(following[0] == before[1] for before, following in zip(counts, counts[1:], strict=False))
    assert all(text in made.card for text in ("CC0-1.0", "at least 50% in an evaluation set", "SHA-256", "histograms.png"))
    assert (made.folder / "histograms.png").read_bytes().startswith(b"\x89PNG")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8))
def test_any_row_survives_its_envelope(value):
    item = Item({"prompt": "x", "value": value}, "file:1", "heldout")
    line = item.line()
    assert Item.of(line) == item and line.splitlines() == [line[:-1]]


def pairs(n=100, seed=0):
    rng = random.Random(seed)
    def text(k): return " ".join(rng.sample(WORDS, k))
    scores = {"chosen_score": 0.9, "rejected_score": 0.3}
    return [{"prompt": text(11), "chosen": text(8 + i % 2), "rejected": text(9 - i % 2), **scores} for i in range(n)]


def checked(tmp_path, rows, **settings):
    dump(tmp_path / "rows.jsonl", rows)
    stages = [{"read": "rows.jsonl"}, "split", {"checklist": settings}, "write"]
    return curate(Pipeline(stages, folder=tmp_path), progress=False).card


def test_planted_defects_are_in_the_card(tmp_path):
    clean = pairs()
    card = checked(tmp_path, clean, method="dpo")
    assert "no check fails" in card and "no length bias" in card
    swapped = [{**r, "chosen_score": 0.3, "rejected_score": 0.9} if i in (4, 50, 77) else r for i, r in enumerate(clean)]
    assert "3 pairs the wrong way round" in checked(tmp_path, swapped, method="dpo")
    longer = [{**r, "chosen": " ".join(r["rejected"].split()[::-1]) + " and so on and on"} for r in clean]
    assert "**a length bias**" in checked(tmp_path, longer, method="dpo") and "nearly constant" in checked(tmp_path, longer)
    labels = [{**r, "completion": "x y", "label": i % 20 < 13} for i, r in enumerate(prompts(100))]
    assert "65.0% of the labels are positive: as wanted" in checked(tmp_path, labels)
    too_many = [{**r, "label": i % 20 < 7} for i, r in enumerate(labels)]
    assert "**outside 60–70 %**" in checked(tmp_path, too_many)


def test_equal_pairs_stop_the_reading_and_leaks_are_dropped(tmp_path):
    dump(tmp_path / "pairs.jsonl", [*pairs(5), {**pairs(1)[0], "rejected": pairs(1)[0]["chosen"]}])
    with pytest.raises(DataError, match="row 6"):
        curate(Pipeline([{"read": "pairs.jsonl"}], folder=tmp_path), progress=False)
    leak = {"prompt": prompts(1, seed=9)[0]["prompt"].upper(), "completion": "no " * 40}
    dump(tmp_path / "pool.jsonl", [*prompts(20, completion="yes"), leak])
    dump(tmp_path / "exam.jsonl", prompts(3, seed=9))
    made = curate(Pipeline([{"read": "pool.jsonl"}, {"decontaminate": "exam.jsonl"}], folder=tmp_path), progress=False)
    assert len(made.train) == 20 and made.stages[1]["dropped"] == {"at least 50% in an evaluation set": 1}


def test_a_hole_and_a_crashing_reward_are_found(tmp_path):
    (tmp_path / "axes.yaml").write_text("axes: {kind: [a, b]}\n")
    (tmp_path / "mine.py").write_text("def reward(row, answer): return float(answer[0] == 'x')\n")
    rows = prompts(60, kind="a", completion="x")
    dump(tmp_path / "production.jsonl", [*prompts(40, kind="a"), *prompts(40, seed=3, kind="b")])
    settings = dict(taxonomy="axes.yaml", production="production.jsonl", reward="mine.py:reward")
    card = checked(tmp_path, rows, **settings)
    assert "missing kind: b" in card and "empty (IndexError)" in card
    with pytest.raises(DataError, match="checklist does not pass"):
        checked(tmp_path, rows, **settings, require=True)


def test_the_command(tmp_path, capsys):
    from realign_core.cli import main
    dump(tmp_path / "pool.jsonl", prompts(20))
    (tmp_path / "p.yaml").write_text("stages:\n- read: pool.jsonl\n- split\n- write\n")
    assert main(["curate", str(tmp_path / "p.yaml"), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "split" in said and "20" in said and "CARD.md" in said
    (tmp_path / "p.yaml").write_text("stages:\n- read: pol.jsonl\n")
    assert main(["curate", str(tmp_path / "p.yaml"), "--quiet", "--out", str(tmp_path / "other"), "--fresh"]) == 2
    said = capsys.readouterr().err
    assert "stage 1 (read)" in said and "pol.jsonl" in said and "Traceback" not in said
