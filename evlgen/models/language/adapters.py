"""Low-rank adapters inside a frozen language model (Hu et al., *LoRA*, ICLR 2022), by peft."""

from __future__ import annotations

import importlib.util

from torch import nn

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.config.model_config import LoraConfig


def add_adapters(model: nn.Module, cfg: LoraConfig) -> None:
    """Puts adapters beside linear layers of a model, whose own modules keep their names.

    They are in float32 whatever the model's weights are in, they alone require gradients, and they change
    nothing until they are trained.

    Raises:
        ConfigError: peft is not installed, or has no layers to put them on.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "model.language.lora needs peft, which is not installed. Install it with "
            "`pip install peft`, or set model.language.lora: null."
        )
    import peft

    targets = cfg.target_modules
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    for target in targets or ():
        named = [m for n, m in model.named_modules() if n == target or n.endswith(f".{target}")]
        if not named or any(isinstance(module, nn.Embedding) for module in named):
            problem = "takes no adapter on its embedding" if named else "has no layer"
            raise ConfigError(
                f"model.language.lora.target_modules: this {model.config.model_type} model {problem} "
                f"'{target}'.{did_you_mean(target, linear)} Its linear layers: {', '.join(linear)}."
            )
    config = peft.LoraConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=targets, bias="none"
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(
            f"model.language.lora: peft cannot put adapters into a {model.config.model_type} model: {error}. "
            f"Name layers in model.language.lora.target_modules; its linear layers: {', '.join(linear)}."
        ) from error
    for module in adapter_modules(model):
        module.float()


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are adapters, and nothing of what they are put on."""
    layers = (m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer"))
    return [part for layer in layers for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)]
