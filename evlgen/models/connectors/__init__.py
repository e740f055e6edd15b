"""Connectors: what is trained between a frozen vision encoder and a frozen language model."""

from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.connectors.c_abstractor import CAbstractor
from evlgen.models.connectors.pixel_shuffle import PixelShuffle
from evlgen.models.connectors.pool import Pool
from evlgen.models.connectors.projection import LinearProjection, MLPProjection
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.resampler import Resampler
from evlgen.models.connectors.tomeformer import TomeFormer

__all__ = [
    "CAbstractor",
    "Connector",
    "ConnectorInputs",
    "LinearProjection",
    "MLPProjection",
    "PixelShuffle",
    "Pool",
    "QFormer",
    "Resampler",
    "TomeFormer",
]
