"""Drawings of what a model does: ``draw_merging(model, images) -> PIL.Image``."""

from evlgen.visualization.figure import draw_merging, untrained

__all__ = ["draw_merging", "untrained"]
