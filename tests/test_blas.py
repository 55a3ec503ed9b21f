"The BLAS that MLX is given on Linux CPUs: faster, right, and honest when there is none."

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="only the Linux wheel needs it")

from realign_core.engine import blas  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def run(code, **env):
    "Run code in a fresh process and return what it printed; pointers are changed once for a whole process."
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip(), out.stderr


def fast_library():
    return any(name in ("openblas", "scipy", "mkl", "torch") for name, _ in blas.candidates())


@pytest.mark.skipif("not fast_library()")
def test_products_are_much_faster_and_right():
    code = """
import numpy as np, mlx.core as mx
from realign_core.engine.blas import matmul_rate, prepare_mlx
slow = matmul_rate(512, 2)
prepare_mlx(threads=1)
fast = matmul_rate(512, 10)
for kind, size in ((mx.float32, 1e-4), (mx.float64, 1e-12)):
    with mx.stream(mx.cpu):
        a, b = mx.random.normal((65, 130)).astype(kind), mx.random.normal((3, 130, 31)).astype(kind)
        assert np.abs(np.array(a @ b) - np.array(a) @ np.array(b)).max() < size
        assert np.abs(np.array(b[0].T @ a.T) - np.array(b[0]).T @ np.array(a).T).max() < size
print(fast / slow)
"""
    ratio, _ = run(code)
    assert float(ratio) > 5


@pytest.mark.parametrize("name", ["openblas", "torch"])
def test_each_library_serves(name):
    if name not in dict(blas.candidates()):
        pytest.skip(f"{name} is not installed")
    out, errors = run("from realign_core.engine.blas import prepare_mlx; b = prepare_mlx(1); print(b.name, b.threads)",
                      REALIGN_BLAS=name)
    assert out == f"{name} 1" and not errors


def test_order_of_import_does_not_matter():
    code = "{}\nfrom realign_core.engine.blas import prepare_mlx; print(prepare_mlx(1) is not None)"
    assert run(code.format("import mlx.core"))[0] == run(code.format(""))[0]


def test_threads_are_what_was_asked_for():
    code = """
import ctypes
from realign_core.engine import blas
for threads in (1, 2):
    found = blas.prepare_mlx(threads)
    assert found is None or found.threads == threads
    if found and found.name in ("openblas", "scipy"):
        assert ctypes.CDLL(found.path).scipy_openblas_get_num_threads() == threads
import os
os.environ["REALIGN_THREADS"] = "1"
print(blas.prepare_mlx().threads if found else 1)
"""
    assert run(code)[0] == "1"


def test_none_is_said_once_and_says_what_to_install():
    code = """
from realign_core.engine import blas
blas.candidates = lambda: iter(())
print(blas.prepare_mlx(), blas.prepare_mlx())
"""
    out, errors = run(code)
    assert out == "None None" and errors.count("pip install scipy-openblas32") == 1


def test_a_library_that_is_wrong_is_put_back():
    code = """
import mlx.core as mx
from realign_core.engine import blas
right, blas._product_is_right = blas._product_is_right, lambda: False
before = blas._slow_blas() if right() else None
assert blas.prepare_mlx(1) is None
blas._product_is_right = right
print(before == blas._slow_blas(), right())
"""
    assert run(code, PYTHONWARNINGS="ignore")[0] == "True True"


def test_off_and_other_systems_leave_mlx_alone(monkeypatch):
    monkeypatch.setenv("REALIGN_BLAS", "off")
    assert blas.prepare_mlx() is None
    monkeypatch.setenv("REALIGN_BLAS", "auto")
    monkeypatch.setattr(blas.platform, "system", lambda: "Darwin")
    assert blas.prepare_mlx() is None
