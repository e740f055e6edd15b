"""Language models as readers of soft prompts."""

from evlgen.models.language.base import LanguageModel
from evlgen.models.language.opt import OPTLanguageModel

__all__ = ["LanguageModel", "OPTLanguageModel"]
