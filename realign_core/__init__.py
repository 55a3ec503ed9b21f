"""LLM post-training you can read, run and trust.

The three names below are loaded on first use: `import realign_core` itself loads neither torch nor mlx.
"""

__version__ = "0.1.0"

_HOMES = {"load": "realign_core.engine.policy", "fit": "realign_core.engine.training", "Run": "realign_core.engine.history"}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    "Import `load`, `fit` or `Run` from its module when it is first asked for (PEP 562)."
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_HOMES})
