"""One thread everywhere, and the fixtures that every test file may use."""

from __future__ import annotations

import os

# Parallel workers with two threads each are tens of times slower than with one: set before torch or mlx is imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "REALIGN_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["HF_HUB_OFFLINE"] = "1"   # no test may reach the network

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can say `from snapshots import make_snapshot`

BACKENDS = ("torch", "mlx")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    "Each backend that is installed, in turn."
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "Folder of a two-layer random Llama snapshot with a tokenizer and a chat template."
    from snapshots import make_snapshot
    return make_snapshot(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    "Folder of a random snapshot of the family asked for, made once; copy it before you change it."
    from snapshots import make_snapshot
    made = {}
    def get(family="llama", tied=False, **sizes) -> Path:
        key = (family, tied, *sizes.items())
        if key not in made:
            made[key] = make_snapshot(tmp_path_factory.mktemp("snapshots") / family, family, tied, width=32, **sizes)
        return made[key]
    return get


@pytest.fixture(scope="session")
def root() -> Path:
    "Top folder of the checkout."
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    "Torch reads its own setting, not only the environment's."
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    yield


def pytest_configure(config):
    config.addinivalue_line("markers", "seconds(n): expected running time, so that long tests can start first")


def pytest_collection_modifyitems(items):
    "Long tests first: two workers then finish at about the same time."
    def seconds(item):
        mark = item.get_closest_marker("seconds")
        return mark.args[0] if mark else 0
    items.sort(key=seconds, reverse=True)
