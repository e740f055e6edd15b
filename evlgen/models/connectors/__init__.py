"""Connectors: what is trained between a frozen vision encoder and a frozen language model."""

from evlgen.models.connectors.base import Connector
from evlgen.models.connectors.tomeformer import TomeFormer

__all__ = ["Connector", "TomeFormer"]
