"""lm-evaluation-harness asks a policy: its three questions, with and without the package."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from realign_core import load
from realign_core.engine.policy import Batch
from realign_core.errors import BackendError, DataError, ModelError
from realign_core.evaluate import harness

needs_it = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra evals)")
PAIRS = [("Sum: 12+30. ", "0+2=2"), ("Sum: 12+30.", " 0+2=2"), ("Question: What is the colour of the fistin?\nAnswer:", " red"),
         ("", "The fistin has red."), ("Sum: 12+30.", " no such thing at all")]


@pytest.fixture(scope="module")
def policies():
    found = {}
    def get(backend):
        if backend not in found:
            found[backend] = load("tinyworld-base", backend, threads=1)
        return found[backend]
    return get


def test_likelihoods_are_sums_over_the_continuation(policies, backend):
    policy = policies(backend)
    found = harness.likelihoods(policy, PAIRS, batch_size=2)
    for pair, (total, greedy) in zip(PAIRS, found, strict=True):
        context, said = harness.split_pair(policy.tokenizer, *pair)
        ids, mask = np.array([[*context, *said]], np.int32), np.array([[False] * len(context) + [True] * len(said)])
        assert total == pytest.approx(float(policy.score(Batch(ids, mask)).sum()), abs=1e-3) and total < 0
        written = policy.generate([context], temperature=0.0, max_tokens=len(said))[0][0].ids
        assert greedy is (tuple(written[:len(said)]) == tuple(said))
    assert found[0] == pytest.approx(found[1], abs=1e-3)  # a space at the end belongs to what follows


def test_what_greedy_decoding_writes_is_greedy(policies, backend):
    policy = policies(backend)
    context = "Sum: 12+30."
    ids, _ = harness.split_pair(policy.tokenizer, context, " x")
    text = policy.tokenizer.decode(policy.generate([ids], temperature=0.0, max_tokens=1)[0][0].ids)
    assert [greedy for _, greedy in harness.likelihoods(policy, [(context, text), (context, " zebra")])] == [True, False]
    assert harness.likelihoods(policy, [(context, " mill mill mill")])[0][1] is False


def test_a_long_context_loses_its_beginning_and_nothing_else_fits(policies, backend):
    policy = policies(backend)
    tail = "Sum: 12+30."
    (long, _), = harness.likelihoods(policy, [("The fistin has red. " * 2000 + tail, " 0+2=2")])
    assert np.isfinite(long)
    with pytest.raises(ModelError, match="the model's window is"):
        harness.likelihoods(policy, [("a", " red" * 5000)])
    with pytest.raises(DataError, match="no tokens of its own"):
        harness.likelihoods(policy, [("a", "")])


def test_texts_end_at_the_first_stop(policies, backend):
    whole, = harness.texts_until(policies(backend), ["Sum: 12+30."], [[]], 16)
    cut, = harness.texts_until(policies(backend), ["Sum: 12+30."], [["=", ","]], 16)
    assert "=" in whole and cut == whole[: min(whole.index(s) for s in "=," if s in whole)]


def test_a_task_is_two_files(tmp_path):
    path = harness.write_task(tmp_path / "tasks", "mine", [{"question": "q", "choices": ["a", "b"], "label": 1}])
    assert json.loads(path.read_text())["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "tasks" / "mine.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_package_it_says_what_to_install(policies):
    with pytest.raises(BackendError, match=r"pip install 'realign_core\[evals\]'"):
        harness.examine(policies("torch"), ["mine"])


@needs_it
def test_the_harness_finds_what_the_likelihoods_say(policies, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"question": f"Sum: {a}+{a + 3}.", "choices": ["it", "0", "The", f"{a}"], "label": i % 4} for i, a in
            enumerate(range(11, 31))]
    harness.write_task(tmp_path / "tasks", "mine", rows)
    policy = policies(backend)
    found = harness.examine(policy, ["mine"], tmp_path / "tasks")
    pairs = [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]
    totals = np.array([total for total, _ in harness.likelihoods(policy, pairs)])
    wanted = totals.reshape(-1, 4).argmax(axis=1) == [r["label"] for r in rows]
    assert found == {"mine": wanted.astype(float).tolist()}
    assert len(harness.examine(policy, ["mine"], tmp_path / "tasks", limit=5)["mine"]) == 5
    with pytest.raises(DataError, match="unknown task; found 'other'"):
        harness.examine(policy, ["other"], tmp_path / "tasks")


@needs_it
def test_the_harness_lets_a_policy_write(policies, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = harness.write_task(tmp_path / "tasks", "sums", [{"question": "Sum: 12+30.", "answer": "x"}] * 3)
    task = json.loads(path.read_text()) | {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                                           "generation_kwargs": {"until": ["="], "max_gen_toks": 12},
                                           "metric_list": [{"metric": "exact_match", "aggregation": "mean",
                                                            "higher_is_better": True}]}
    del task["doc_to_choice"]
    policy = policies("torch")
    said = harness.texts_until(policy, ["Sum: 12+30."], [["="]], 12)[0]
    (tmp_path / "tasks" / "sums.jsonl").write_text(json.dumps({"question": "Sum: 12+30.", "answer": said}) + "\n")
    path.write_text(json.dumps(task))
    assert harness.examine(policy, ["sums"], tmp_path / "tasks") == {"sums": [1.0]}
