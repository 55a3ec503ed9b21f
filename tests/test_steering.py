"Steering vectors: how they are found, that they know where they belong, and that files come back as they were."

from __future__ import annotations

import struct

import numpy as np
import pytest

from snapshots import KINDS

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")

from realign_core.data.formats import read  # noqa: E402
from realign_core.engine.interventions import Add, When  # noqa: E402
from realign_core.engine.policy import load  # noqa: E402
from realign_core.errors import DataError, ModelError, OutputError  # noqa: E402
from realign_core.methods import steering as st  # noqa: E402

PAIRS = read([{"prompt": f"What is {a} + {b}?", "chosen": f"Yes, {a} and {b}, of course.", "rejected": f"No. {b}."}
              for a, b in ((2, 3), (12, 30), (7, 5), (100, 4))], "preference")


@pytest.fixture
def open_policy(backend):
    return lambda folder, **kwargs: load(folder, backend, threads=1, **kwargs)


def made(width=8, layers=3, points=(2, 3), seed=0, **more):
    rng = np.random.default_rng(seed)
    about = {"model": "one", "kind": "llama"} | more
    return st.SteeringVector({p: rng.standard_normal(width).astype(np.float32) for p in points}, layers, **about)


# Finding one

def test_the_principal_component_sees_the_mean_and_has_a_fixed_sign():
    "Against NumPy's eigenvectors of the uncentred second moment, and the same direction whichever way the SVD turns it."
    rng = np.random.default_rng(0)
    negative = rng.standard_normal((40, 6))
    positive = negative + np.array([3.0, 0, 0, 0, 0, 0]) + 0.3 * rng.standard_normal((40, 6))
    found = st.direction(positive, negative, "pca")
    moment = (positive - negative).T @ (positive - negative)
    first = np.linalg.eigh(moment)[1][:, -1]
    assert abs(found @ first) == pytest.approx(1, abs=1e-6) and found[0] > 0.9
    assert np.allclose(st.direction(negative, positive, "pca"), -found, atol=1e-6)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)


def test_agreement_leaves_the_pair_itself_out():
    same, zero = np.tile([1.0, 2.0], (5, 1)), np.zeros((5, 2))
    assert st.agreement(same, zero).value == pytest.approx(1)
    assert st.agreement(np.eye(2), np.zeros((2, 2))).value == 0  # each would agree with itself
    noise = np.random.default_rng(0).standard_normal((400, 64))
    assert abs(st.agreement(noise, np.zeros_like(noise)).value) < 0.05


@pytest.mark.parametrize("reading", ["last", "mean"])
def test_states_do_not_depend_on_the_batch(snapshot, open_policy, reading):
    policy = open_policy(snapshot())
    together = st.answer_states(policy, PAIRS, reading)
    each = [st.answer_states(policy, [pair], reading) for pair in PAIRS]
    alone = [np.concatenate(parts, axis=1) for parts in zip(*each, strict=True)]
    assert together[0].shape == (3, 4, 32)
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a - b).max() <= 1e-5
    assert np.abs(together[0][1:] - together[1][1:]).max() > 1e-2


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_six_families_and_both_frameworks_agree(snapshot, family, tied):
    "The vector, and what it does to every pair, from a file that the other framework wrote."
    ours, theirs = (load(snapshot(family, tied), name, threads=1) for name in ("torch", "mlx"))
    found = [st.vector(p, PAIRS) for p in (ours, theirs)]
    for point, v in found[0].vectors.items():
        assert np.abs(v - found[1].vectors[point]).max() <= 1e-3 * np.abs(v).max()
    values = []
    for policy in (ours, theirs):
        before = st.propensity(policy, PAIRS)
        with policy.intervene(*found[0].on(policy, 0.7)):
            values.append(st.propensity(policy, PAIRS))
        assert (st.propensity(policy, PAIRS) == before).all() and (values[-1] != before).all()
    assert np.abs(values[0] - values[1]).max() <= 1e-2  # sums over some twenty tokens


def test_a_dose_is_the_length_of_the_stream(snapshot, open_policy):
    policy = open_policy(snapshot())
    states, found = np.concatenate(st.answer_states(policy, PAIRS), axis=1), st.vector(policy, PAIRS, [1, 2])
    for point, v in found.vectors.items():
        assert 2 * np.linalg.norm(v) == pytest.approx(np.linalg.norm(states[point], axis=1).mean(), rel=1e-4)
    assert list(st.vector(policy, PAIRS).vectors) == [2]


def test_the_slope_vector_raises_what_it_was_made_for(snapshot, open_policy):
    policy = open_policy(snapshot())
    for point in (1, None):
        found = st.slope_vector(policy, PAIRS, point, components=8)
        assert list(found.vectors) == [point or 2]
        assert st.steerability(policy, found, PAIRS, (-0.02, 0.02)).mean() > 0
        assert st.steerability(policy, -found, PAIRS, (-0.02, 0.02)).mean() < 0


def test_steerability_is_the_slope_of_a_line(snapshot, open_policy, monkeypatch):
    policy, seen = open_policy(snapshot()), iter([np.array([0.0, 5.0]), np.array([1.0, 3.0]), np.array([2.0, 1.0])])
    monkeypatch.setattr(st, "propensity", lambda policy, pairs: (policy.hidden_states(batch), next(seen))[1])
    from test_interventions import make_batch
    batch, found = make_batch(), st.vector(policy, PAIRS)
    assert np.allclose(st.steerability(policy, found, PAIRS, (-1, 0, 1)), [1, -2])


def test_perplexity_is_the_exponential_of_the_mean(snapshot, open_policy):
    policy = open_policy(snapshot())
    found = st.perplexity(policy, ["hi", "ho"], ["yes, of course", ""])
    from realign_core.engine.batching import collate
    from realign_core.engine.encoding import Encoder, Example
    rows = [Encoder(policy.tokenizer).completion(q, a) for q, a in (("hi", "yes, of course"), ("ho", " ."))]
    batch = collate([Example((row,)) for row in rows])
    assert found.value == pytest.approx(np.exp(-policy.score(batch).sum() / batch.mask.sum()), rel=1e-5)


def test_a_condition_separates_and_steers_only_its_rows(snapshot, open_policy):
    rng = np.random.default_rng(1)
    axis, noise = np.eye(32)[0], 0.1 * rng.standard_normal((2, 20, 32))
    rule = st.condition(3 * axis + noise[0], -axis + noise[1], 1)
    cosines = [(side @ rule["vector"]) / np.linalg.norm(side, axis=1) for side in (3 * axis + noise[0], -axis + noise[1])]
    assert (cosines[0] > rule["threshold"]).all() and (cosines[1] <= rule["threshold"]).all()
    policy = open_policy(snapshot())
    found = st.vector(policy, PAIRS)
    before = st.propensity(policy, PAIRS)
    for threshold, changed in ((-1.0, True), (1.0, False)):
        with policy.intervene(When(rule["vector"], 1, threshold, found.on(policy))):
            assert (st.propensity(policy, PAIRS) != before).all() == changed


# Arithmetic

def test_vectors_add_subtract_and_scale():
    a, b = made(seed=1), made(seed=2, points=(1, 2))
    both = 2 * a - b * 0.5
    assert list(both.vectors) == [1, 2, 3]
    assert np.allclose(both.vectors[2], 2 * a.vectors[2] - 0.5 * b.vectors[2])
    assert np.allclose(both.vectors[1], -0.5 * b.vectors[1]) and np.allclose(both.vectors[3], 2 * a.vectors[3])
    for other in (made(width=9), made(layers=4), made(model="two"), made(kind="qwen2")):
        with pytest.raises(ModelError, match="was made for"):
            a + other


def test_a_sum_acts_as_both_do(snapshot, open_policy):
    policy = open_policy(snapshot())
    a, b = st.vector(policy, PAIRS, [1]), st.vector(policy, PAIRS, [2], "pca")
    with policy.intervene(*(a + 0.5 * b).on(policy)):
        together = st.propensity(policy, PAIRS)
    with policy.intervene(*a.on(policy), *b.on(policy, 0.5)):
        assert np.abs(st.propensity(policy, PAIRS) - together).max() <= 1e-4


@pytest.mark.parametrize("span", ["all", "prompt", "generated", "last"])
def test_spans_reach_the_policy(snapshot, open_policy, span):
    policy = open_policy(snapshot())
    before = st.propensity(policy, PAIRS)
    with policy.intervene(*st.vector(policy, PAIRS, [1]).on(policy, 1.0, span)):
        assert (st.propensity(policy, PAIRS) != before).all()


# Files

@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_file_comes_back_as_it_was(tmp_path, ending):
    vector = made(method="pca")
    back = st.read_vector(st.save_vector(vector, tmp_path / f"v.{ending}"))
    assert repr(back) == repr(vector)  # layers, model, kind, method
    assert list(back.vectors) == [2, 3] and all((back.vectors[p] == v).all() for p, v in vector.vectors.items())
    assert [p.name for p in tmp_path.iterdir()] == [f"v.{ending}"]


def test_gguf_layout_byte_by_byte(tmp_path):
    "As the format's description has it: header, keys, tensors, padding to 32 bytes, numbers. Point 2 is direction.1."
    path = st.save_vector(st.SteeringVector({2: np.arange(3)}, 4, "m", "llama"), tmp_path / "v.gguf")
    data = path.read_bytes()
    assert struct.unpack("<4sIQQ", data[:24]) == (b"GGUF", 3, 1, 6)
    key = b"general.architecture"
    assert data[24:24 + 8 + len(key) + 4 + 8 + 13] == (
        struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 13) + b"controlvector")
    key = b"controlvector.layer_count"
    assert struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 1) in data
    info = struct.pack("<Q", 11) + b"direction.1" + struct.pack("<IQIQ", 1, 3, 0, 0)
    assert info in data
    start = data.index(info) + len(info)
    start += -start % 32
    assert np.frombuffer(data[start:start + 12], "<f4").tolist() == [0, 1, 2] and len(data) == start + 32


def test_gguf_package_reads_ours_and_we_read_its(tmp_path):
    "With the package of llama.cpp's own project."
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    vector = made()
    reader = gguf.GGUFReader(st.save_vector(vector, tmp_path / "ours.gguf"))
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "controlvector"
    found = {t.name: t.data.tolist() for t in reader.tensors}
    assert found == {f"direction.{p - 1}": v.tolist() for p, v in vector.vectors.items()}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    for point, v in vector.vectors.items():
        writer.add_tensor(f"direction.{point - 1}", v)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    back = st.read_vector(tmp_path / "theirs.gguf")
    assert all((back.vectors[p] == v).all() for p, v in vector.vectors.items())
    assert (back.kind, back.model, back.layers) == ("llama", "", 0)


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_damaged_files_are_refused(tmp_path, ending):
    path = st.save_vector(made(), tmp_path / f"v.{ending}")
    whole = path.read_bytes()
    for cut in [*range(0, 60, 7), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=f"v.{ending}"):
            st.read_vector(path)
    with pytest.raises(ModelError, match="No such file"):
        st.read_vector(tmp_path / f"none.{ending}")


def test_other_gguf_files_are_refused(tmp_path):
    def refuse(data, match):
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(ModelError, match=match):
            st.read_vector(tmp_path / "x.gguf")
    one = {"direction.1": np.ones(4, np.float32)}
    refuse(b"ABCD" + bytes(40), "begins with")
    refuse(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1")
    refuse(st._gguf({"general.architecture": "llama"}, one), "general.architecture is 'llama'")
    about = {"general.architecture": "controlvector"}
    refuse(st._gguf(about, {"direction.0": np.ones(4)}), "direction.0")
    refuse(st._gguf(about, {"weight": np.ones(4)}), "weight")
    refuse(st._gguf(about, {}), "wanted|empty|max")
    refuse(st._gguf(about, {"direction.1": np.array([1, np.nan])}), "finite")
    refuse(st._gguf(about, {**one, "direction.2": np.ones(5)}), "shapes")
    refuse(st._gguf(about, one).replace(struct.pack("<Q", 4), struct.pack("<Q", 2**62)), "cut short|wanted")
    good = st._gguf(about | {"realign.layers": 1}, one)
    refuse(good, "points")


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(ModelError, match="safetensors or .gguf"):
        st.save_vector(made(), tmp_path / "v.pt")
    with pytest.raises(ModelError, match="point 1"):
        st.save_vector(made(points=(1, 2)), tmp_path / "v.gguf")
    with pytest.raises(OutputError):
        st.save_vector(made(), tmp_path / "no" / "v.gguf")


# Bad input

def test_a_vector_refuses_another_model(snapshot, open_policy):
    policy = open_policy(snapshot())
    about = {"model": snapshot().name, "kind": "llama"}
    for changed, match in (({"model": "two"}, "model 'two'"), ({"kind": "qwen2"}, "type 'qwen2'"), ({"width": 31}, "width 31"),
                           ({"layers": 4}, "layers 4")):
        with pytest.raises(ModelError, match=match):
            made(**{"width": 32, "layers": 2, "points": (1,)} | about | changed).on(policy)
    made(32, 2, (1,), **about).on(policy)
    unnamed = made(32, 0, (1,), model="", kind="llama")  # a file of llama.cpp's own knows no name and no layers
    unnamed.on(policy)
    assert list((unnamed + made(32, 2, (2,), **about)).vectors) == [1, 2]


@pytest.mark.parametrize("wrong", [{}, {4: np.ones(3)}, {-1: np.ones(3)}, {1: np.ones((2, 3))}, {1: np.ones(3), 2: np.ones(4)},
                                   {1: np.array([1, np.inf])}])
def test_vectors_that_are_none(wrong):
    with pytest.raises(ModelError):
        st.SteeringVector(wrong, 3, "m", "llama")


def test_points_that_do_not_exist(snapshot, open_policy):
    policy = open_policy(snapshot())
    for points in ([3], [-1], []):
        with pytest.raises(ModelError, match="points 0 to 2"):
            st.vector(policy, PAIRS, points)
    with pytest.raises(ModelError, match="points 0 to 2"):
        st.slope_vector(policy, PAIRS, 3)


def test_sets_that_give_no_direction(snapshot, open_policy):
    x, y = np.ones((3, 4)), np.zeros((3, 4))
    for args in ((x[:0], y), (x, y[:0]), (x, y[:, :3]), (x * np.nan, y), (x, x), (x, y, "median"), (x, y[:2], "pca")):
        with pytest.raises(DataError):
            st.direction(*args)
    for labels in (np.ones(3), np.zeros(3), np.ones(2)):
        with pytest.raises(DataError, match="labels"):
            st.split(x, labels)
    assert [len(side) for side in st.split(x, [1, 0, 1])] == [2, 1]
    with pytest.raises(DataError, match="no others"):
        st.agreement(x[:1], y[:1])
    policy = open_policy(snapshot())
    for args in (([],), (PAIRS, "first")):
        with pytest.raises(DataError, match="no states"):
            st.answer_states(policy, *args)
    found = st.vector(policy, PAIRS)
    for doses in ((), (0.2,), (0.2, 0.2), (0, np.nan)):
        with pytest.raises(DataError, match="two different doses"):
            st.steerability(policy, found, PAIRS, doses)
    with pytest.raises(DataError):
        st.condition(x[:0], y, 1)


def test_nested_blocks_are_refused(snapshot, open_policy):
    policy = open_policy(snapshot())
    found = st.vector(policy, PAIRS)
    before = st.propensity(policy, PAIRS)
    with pytest.raises(ModelError, match="inside another"), policy.intervene(*found.on(policy)):
        st.propensity(policy, PAIRS)
        st.steerability(policy, found, PAIRS)
    assert (st.propensity(policy, PAIRS) == before).all()
    with pytest.raises(ModelError, match="width"), policy.intervene(Add(np.ones(33), 1)):
        pass
