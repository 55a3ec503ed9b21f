"""One module for each method; `get` and `names` look them up."""

from .registry import get, names

__all__ = ["get", "names"]
