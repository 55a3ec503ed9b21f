"""The tiny world: its generator, its exact checkers, and what is known of the two shipped models."""

from .checks import Verdict, check, mood_of, style_of
from .measure import path, properties
from .world import World, contrast_rows, corpus, preference_rows, region2_texts, sft_rows

__all__ = ["Verdict", "World", "check", "contrast_rows", "corpus", "mood_of", "path", "preference_rows", "properties",
           "region2_texts", "sft_rows", "style_of"]
