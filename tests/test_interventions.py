"What is changed inside a model is changed in every row and token that was asked for, in no other, and leaves no trace."

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_parity import numpy_llama
from toys import mean_loss

from snapshots import KINDS, plain_model

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from realign_core.engine.adapters import read_safetensors  # noqa: E402
from realign_core.engine.interventions import Acting, Add, Project, Replace, When, Window  # noqa: E402
from realign_core.engine.policy import Batch, LoRA, load  # noqa: E402
from realign_core.errors import ModelError  # noqa: E402
from realign_core.methods import sft  # noqa: E402

WIDTH = 32
LINEAR = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}


@pytest.fixture
def open_policy(backend):
    return lambda folder, **kwargs: load(folder, backend, threads=1, **kwargs)


def both(folder, **kwargs):
    return load(folder, "torch", threads=1, **kwargs), load(folder, "mlx", threads=1, **kwargs)


def vector(seed=0, *shape, width=WIDTH):
    return np.random.default_rng([9, seed]).standard_normal((*shape, width)).astype(np.float32)


def make_batch(lengths=(12, 7, 9, 5), answer=3, seed=0):
    "Right-padded rows of a prompt and an answer, all of different lengths."
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, length - answer:length] = rng.integers(6, 300, length), True
    return Batch(ids, mask)


def single(batch, row):
    "One row without its padding."
    end = int(np.flatnonzero(batch.mask[row]).max()) + 1
    return Batch(batch.ids[row:row + 1, :end], batch.mask[row:row + 1, :end])


def of_row(action, row, rows=4):
    "An intervention as one row of a batch sees it."
    if isinstance(action, When):
        return replace(action, then=of_row(action.then, row, rows))
    size = 3 if isinstance(action, Project) else 2
    own = action.vector[row] if np.ndim(action.vector) == size and len(action.vector) == rows else action.vector
    return replace(action, vector=own, scale=action.scale[row] if np.ndim(action.scale) else action.scale)


MIXED = (Add(vector(1, 4), layers=(0, 1), scale=np.array([0.5, 1.0, -1.0, 2.0])),
         Project(vector(2, 2), layers=(1, 2), span="prompt"),
         Project(vector(3), layers=0, at="attention"), Add(vector(4), layers=-1, at="mlp", span="generated"),
         Replace(vector(5, 4), layers=1, scale=0.3, span="last"),
         When(vector(6), layer=1, threshold=0.0, then=Add(vector(7), layers=2, scale=2.0)),
         When(vector(8), layer=0, threshold=0.0, then=Add(vector(9), layers=0), span="token", below=True),
         When(vector(6), layer=2, threshold=0.0, then=Project(vector(7, 4, 2), layers=2), span="prompt"))


def check_rows(policy, batch):
    with policy.intervene(*MIXED):
        scores, states = policy.score(batch), policy.hidden_states(batch)
    for row in range(len(batch.ids)):
        alone = single(batch, row)
        end = alone.ids.shape[1]
        with policy.intervene(*[of_row(a, row) for a in MIXED], check=False):
            assert np.abs(policy.score(alone)[0] - scores[row, :end]).max() <= 1e-5
            assert np.abs(policy.hidden_states(alone)[:, 0] - states[:, row, :end]).max() <= 1e-5
    return scores, states


@pytest.mark.seconds(30)
@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_batched_against_single_and_torch_against_mlx(snapshot, family, tied):
    a, b = both(snapshot(family, tied))
    batch = make_batch()
    (scores, states), (scores_b, states_b) = check_rows(a, batch), check_rows(b, batch)
    assert np.abs(scores - scores_b).max() <= 1e-4 and np.abs(states - states_b).max() <= 1e-4
    assert np.abs(scores - a.score(batch)).max() > 1e-2  # and they acted


@pytest.mark.parametrize("lora", [LoRA(rank=4, targets=("q_proj", "down_proj")), LoRA(rank=4, dora=True)], ids=["lora", "dora"])
def test_with_adapters(snapshot, tmp_path, lora):
    policy = load(snapshot(), "torch", lora=lora, threads=1)
    policy.backward(make_batch(), sft.objective)
    policy.step(1e-2)
    a, b = both(snapshot(), adapter=policy.save(tmp_path / "adapter"))
    (scores, _), (scores_b, _) = check_rows(a, make_batch()), check_rows(b, make_batch())
    assert np.abs(scores - scores_b).max() <= 1e-4


@pytest.mark.seconds(15)
@pytest.mark.parametrize(("family", "tied"), KINDS)
@pytest.mark.parametrize("span", ["all", "prompt", "generated", "last"])
def test_generation_with_a_cache_equals_one_pass(snapshot, open_policy, family, tied, span):
    "Left-padded prompts, repeats among them, a vector each, rows that end at different times."
    policy, rng = open_policy(snapshot(family, tied)), np.random.default_rng(3)
    prompts = [rng.integers(6, 300, n).tolist() for n in (4, 9, 6)]
    prompts.append(prompts[1])
    policy.stops = set(range(0, 384, 12))
    actions = (Add(vector(1, 4), layers=1, span=span), Project(vector(2), layers=2, span=span),
               Add(vector(3), 0, at="attention", span=span),
               When(vector(4), layer=1, threshold=0.0, then=Add(vector(5), layers=2)),
               When(vector(6), layer=1, threshold=0.0, then=Replace(vector(7), layers=2, scale=0.2), span="token"))
    with policy.intervene(*actions):
        answers = policy.generate(prompts, n=3, max_tokens=20, batch_size=5, seed=1)
    assert {len(a.ids) for group in answers for a in group} != {20}
    rows = [(p, list(prompts[p]), a) for p, group in enumerate(answers) for a in group]
    for p, prompt, answer in rows:
        ids = np.array([prompt + list(answer.ids)], np.int32)
        batch = Batch(ids, np.arange(ids.shape[1])[None] >= len(prompt))
        with policy.intervene(*[of_row(a, p) for a in actions], check=False):
            assert np.abs(policy.score(batch)[0, len(prompt):] - answer.logps).max() <= 1e-4


def test_same_prompt_and_same_vector_still_share_their_reading(snapshot, open_policy):
    "Equal prompts get equal text with one vector for all, and different text with two."
    policy, prompt = open_policy(snapshot()), list(range(20, 30))
    with policy.intervene(Add(vector(1), 1)):
        first, second = (c[0].ids for c in policy.generate([prompt, prompt], max_tokens=8, temperature=0))
    with policy.intervene(Add(np.stack([vector(1), -4 * vector(1)]), 1)):
        third, fourth = (c[0].ids for c in policy.generate([prompt, prompt], max_tokens=8, temperature=0))
    assert first == second == third != fourth


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_nothing_is_left_behind(snapshot, open_policy, family, tied):
    policy, batch = open_policy(snapshot(family, tied)), make_batch()
    shared, scores, states = policy.can_share, policy.score(batch), policy.hidden_states(batch)
    text = policy.generate([[7, 8, 9]], max_tokens=6)[0][0].ids
    with policy.intervene(*MIXED):
        assert (policy.score(batch) != scores).any()
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), policy.intervene(*MIXED):
            raise error
    with pytest.raises(ModelError), policy.intervene(*MIXED):
        policy.generate([[7]])  # four rows were announced
    assert (policy.score(batch) == scores).all() and (policy.hidden_states(batch) == states).all()
    assert policy.generate([[7, 8, 9]], max_tokens=6)[0][0].ids == text and policy.can_share == shared


def test_a_failing_pass_is_undone_as_well(snapshot, open_policy, monkeypatch):
    "The exception comes from within the model, while a hook is at work."
    policy, batch = open_policy(snapshot()), make_batch()
    scores = policy.score(batch)
    monkeypatch.setattr(Add, "edit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), policy.intervene(Add(vector(), 1)):
        policy.score(batch)
    monkeypatch.undo()
    assert (policy.score(batch) == scores).all()


def test_against_a_model_written_out(snapshot, open_policy):
    "Projecting all points and writes of the stream is the same as weights that write nothing along the direction."
    folder, batch = snapshot(), make_batch()
    policy, d = open_policy(folder), vector(3) / np.linalg.norm(vector(3))
    weights = {k: v.astype(np.float64) for k, v in read_safetensors(folder / "model.safetensors").items()}
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] - np.outer(d, d @ weights[name])
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ (np.eye(WIDTH) - np.outer(d, d))
    wanted = numpy_llama(weights, json.loads((folder / "config.json").read_text()), batch.ids, batch.mask)
    with policy.intervene(Project(d, 0), Project(d, (0, 1), at="attention"), Project(d, (0, 1), at="mlp")):
        assert np.abs(policy.score(batch) - wanted).max() <= 1e-5


def test_the_last_point_is_what_the_head_reads(snapshot, open_policy):
    "Every answer is as likely as every other's when the head sees one vector everywhere."
    policy, batch = open_policy(snapshot()), make_batch()
    with policy.intervene(Replace(vector(1), -1)):
        states = policy.hidden_states(batch, [-1])
        a, b = policy.score(batch), policy.score(replace(batch, ids=np.where(batch.mask, batch.ids, 11)))
    assert np.abs(states - vector(1)).max() == 0 and np.abs(a - b).max() <= 1e-6


def test_order_is_the_order_given(snapshot, open_policy):
    policy, batch, d = open_policy(snapshot()), make_batch(), vector(1) / np.linalg.norm(vector(1))
    orders = {(Add, Project): 0.0, (Project, Add): 1.0, (Add, Project, Add): 1.0}
    for order, left in orders.items():
        actions = [kind(d, 1) for kind in order]
        with policy.intervene(*actions):
            assert np.allclose(policy.hidden_states(batch, [1]) @ d, left, atol=1e-5)


def test_spans_touch_their_tokens_only(snapshot, open_policy):
    policy, batch = open_policy(snapshot()), make_batch()
    plain, window = policy.hidden_states(batch, [0])[0], Window.of_batch(batch.mask)
    for span, tokens in window.spans.items():
        with policy.intervene(Add(vector(1), 0, span=span)):
            changed = policy.hidden_states(batch, [0])[0] - plain
        assert np.allclose(changed[tokens], vector(1), atol=1e-6) and (changed[~tokens] == 0).all()


def test_a_condition_decides_row_by_row(snapshot, open_policy):
    policy, batch = open_policy(snapshot()), make_batch()
    states = policy.hidden_states(batch)
    ends = batch.mask.argmax(1) - 1
    last, probe = states[1, np.arange(4), ends], vector(5)
    cosines = last @ probe / np.linalg.norm(last, axis=1) / np.linalg.norm(probe)
    middle = float(np.median(cosines))
    with policy.intervene(When(probe, 1, middle, Add(vector(1), 2))) as acting:
        changed = policy.hidden_states(batch, [2])[0] - states[2]
    assert np.abs(changed[cosines > middle] - vector(1)).max() <= 1e-5 and (changed[cosines <= middle] == 0).all()
    assert acting.reached == {0, 1}
    plain = policy.score(batch)
    with policy.intervene(When(probe, 1, 1.0, Add(vector(1), 2))):  # never true, and that is an answer too
        assert (policy.score(batch) == plain).all()


def test_gradients_pass_through(snapshot):
    "The same on both frameworks, other than without, and right along a direction."
    batch, found = make_batch(), []
    actions = (Add(vector(1, 4), 1), Project(vector(2), (1, 2)), When(vector(3), 1, 0.0, Add(vector(4), 2)))
    for policy in both(snapshot()):
        policy.backward(batch, mean_loss)
        plain = policy.gradients()
        policy.step(0.0)
        with policy.intervene(*actions):
            loss, _ = policy.backward(batch, mean_loss)
            found.append((loss, policy.gradients()))
            policy.step(1e-3)
            assert policy.backward(batch, mean_loss)[0] < loss
        assert any(np.abs(plain[k] - g).max() > 1e-3 for k, g in found[-1][1].items())
    (loss, grads), (loss_b, grads_b) = found
    assert loss == pytest.approx(loss_b, rel=1e-5)
    joined, joined_b = (np.concatenate([g[k].ravel() for k in sorted(grads)]) for g in (grads, grads_b))
    assert np.linalg.norm(joined - joined_b) <= 1e-4 * np.linalg.norm(joined)


def test_shared_prompts_are_read_apart_inside(snapshot, open_policy):
    policy = open_policy(snapshot())
    base = make_batch((12, 12), answer=4)
    base.ids[1, :8] = base.ids[0, :8]
    pair = replace(base, group=2)
    policy.share = True
    with policy.intervene(Add(vector(1, 2), 1)):
        together = policy.score(pair)
        policy.share = False
        assert (policy.score(pair) == together).all()
    assert policy.can_share


def test_packed_rows(snapshot, open_policy):
    "What is alike for all tokens works; what needs rows or spans is refused."
    policy, a, b = open_policy(snapshot()), make_batch((6,)), make_batch((5,), seed=1)
    packed = Batch(np.concatenate([a.ids, b.ids], 1), np.concatenate([a.mask, b.mask], 1),
                   segments=np.array([[1] * 6 + [2] * 5], np.int32), positions=np.array([[*range(6), *range(5)]], np.int32))
    with policy.intervene(Add(vector(1), 1), Project(vector(2), 2)):
        whole = policy.score(packed)
        assert np.abs(whole[:, :6] - policy.score(a)).max() <= 1e-5 and np.abs(whole[:, 6:] - policy.score(b)).max() <= 1e-5
    with pytest.raises(ModelError, match="packed"), policy.intervene(Add(vector(1), 1, span="prompt")):
        policy.score(packed)


def test_the_plain_library_sees_the_same_model(snapshot):
    "The hooks sit on transformers' own modules."
    policy, batch = load(snapshot(), "torch", threads=1), make_batch((9,))
    with policy.intervene(Add(vector(1), 1)), torch.no_grad():
        logits = policy.model(torch.tensor(batch.ids).long()).logits[0].numpy()
    assert np.abs(logits - plain_model(snapshot())(batch.ids[0])).max() > 1e-2


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("actions", "message"), [
    ([Add(vector(width=31), 1)], "width 31.*has 32"),
    ([Project(vector(1, 2, width=33), 1)], "width 33"),
    ([Add(vector(), 3)], "layer 3 does not exist"),
    ([Add(vector(), 2, at="mlp")], "layer 2 does not exist"),
    ([Add(vector(), ())], "no layer"),
    ([Add(vector() * np.nan, 1)], "not finite"),
    ([Project(vector() * np.inf, 1)], "not finite"),
    ([Add(vector(), 1, scale=float("nan"))], "scale"),
    ([Add(vector(), 1, span="answer")], "span='answer'"),
    ([Add(vector(), 1, at="head")], "at='head'"),
    ([Add(vector(0, 2, 2), 1)], r"shape \(2, 2, 32\)"),
    ([Add(np.zeros(0), 1)], r"shape \(0,\)"),
    ([Project(np.zeros(WIDTH), 1)], "zero"),
    ([Project(np.stack([vector(), 2 * vector()]), 1)], "sum of the others"),
    ([Add(vector(0, 2), 1), Add(vector(0, 3), 1)], "2, 3"),
    ([When(vector(), 2, 0.0, Add(vector(), 1))], "after stream 1"),
    ([When(np.zeros(WIDTH), 1, 0.0, Add(vector(), 1))], "not zero"),
    ([When(vector(), 1, 0.0, "add")], "no intervention"),
    ([], "no intervention given"),
], ids=str)
def test_nonsense_is_refused_before_anything_runs(snapshot, open_policy, actions, message):
    policy = open_policy(snapshot())
    with pytest.raises(ModelError, match=message), policy.intervene(*actions):
        raise AssertionError("the block was entered")
    assert policy._acting is None


def test_blocks_do_not_nest_and_the_reference_stays_outside(snapshot, open_policy):
    policy, batch = open_policy(snapshot()), make_batch()
    policy.freeze_reference()
    with policy.intervene(Add(vector(), 1)):
        policy.score(batch)
        with pytest.raises(ModelError, match="inside another"), policy.intervene(Add(vector(), 1)):
            pass
        with pytest.raises(ModelError, match="reference"):
            policy.score(batch, reference=True)
    policy.score(batch, reference=True)


def test_wrong_number_of_rows(snapshot, open_policy):
    policy = open_policy(snapshot())
    with policy.intervene(Add(vector(0, 3), 1), check=False):
        with pytest.raises(ModelError, match="3 rows, used on 4"):
            policy.score(make_batch())
        with pytest.raises(ModelError, match="3 rows, used on 2"):
            policy.generate([[5], [6]])


# --- the self-test ---------------------------------------------------------------------------------------------------

def test_a_block_that_did_nothing_says_so(snapshot, open_policy):
    policy, batch = open_policy(snapshot()), make_batch()
    with pytest.raises(ModelError, match="never reached"), policy.intervene(Add(vector(), 1)):
        pass
    with pytest.raises(ModelError, match="never reached.*'generated'"), policy.intervene(Add(vector(), 1, span="generated")):
        policy.hidden_states(replace(batch, mask=np.zeros_like(batch.mask)))
    with pytest.raises(ModelError, match="changed nothing"), policy.intervene(Add(np.zeros(WIDTH), 1)):
        policy.score(batch)
    late = Replace(vector(), 2, span="generated")
    with pytest.raises(ModelError, match="Replace: was never reached"), policy.intervene(Add(vector(), 1), late):
        policy.generate([[5, 6]], max_tokens=1)
    with policy.intervene(Add(vector(), 1, scale=0.0)):  # a dose of nothing, asked for
        policy.score(batch)
    with policy.intervene(Add(vector(), 1), check=False):
        pass


def test_a_hook_in_the_wrong_place_is_found_out(snapshot, open_policy, monkeypatch):
    "The framework forgets to call back: no text would tell."
    policy = open_policy(snapshot())
    monkeypatch.setattr(Acting, "places", property(lambda self: [("stream", 0)]))
    with pytest.raises(ModelError, match="never reached"), policy.intervene(Add(vector(), 1)):
        policy.score(make_batch())
