"""Linear layers of frozen parts in float8 (Micikevicius et al., *FP8 Formats for Deep Learning*, 2022).

Cards from compute capability 8.9 on multiply float8 matrices twice as fast as bf16 ones. A frozen weight is
rounded to float8 once, with a scale for each of its rows; what is multiplied with it is rounded at every
call, with a scale for each token. The gradient of the input is computed in bf16 from the same rounded
weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from evlgen.common.errors import ConfigError
from evlgen.models.ops.products import Linear

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SMALLEST = 1e-12  # of a row's largest entry, so that a row of zeros has a scale too
_MULTIPLE = 16  # of a matrix's sides, as the product wants it


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is in float8.

    It takes and loads what the layer had that it is made from: a weight in another type is rounded as it is
    loaded.

    Args:
        linear: the layer; its bias is kept, in bf16.
        device: where the weight is rounded, which takes long on a CPU.
    """

    weight_scale: Tensor  # [1, out]

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        # torch.compile fails at such a Function unless it takes it as one operation at first
        torch.compiler.allow_in_graph(_product)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _rounded_weight(linear.weight.detach(), device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", scale)
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of ``x``."""
        rows = _product(x.reshape(-1, self.in_features), self.weight, self.weight_scale, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Moves the layer to another device, and keeps its types where another one is asked for, as by
        ``model.to(torch.bfloat16)``: a float8 weight means nothing without its scale."""

        def moved(value: Tensor) -> Tensor:
            found = fn(value)
            return found if found.dtype == value.dtype else value.to(found.device)

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dtype != FP8:
            rounded, scale = _rounded_weight(weight, weight.device)
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = rounded, scale
        super()._load_from_state_dict(state_dict, prefix, *args)


def use_fp8(
    part: nn.Module, device: torch.device | str, apart: Collection[nn.Module | None] = ()
) -> list[str]:
    """Puts an `Fp8Linear` in the place of every plain linear layer of a frozen part.

    Layers stay as they are whose sides are not multiples of 16, whose weight another layer has too, or that
    their model wants in float32.

    Args:
        part: its weights in bf16.
        apart: modules that stay as they are, with all that is in them.

    Returns:
        the names of the layers.
    """
    kept = {inner for module in apart if module is not None for inner in module.modules()}
    weights = Counter(id(weight) for _, weight in part.named_parameters(remove_duplicate=False))
    in_float32 = tuple(
        name for module in part.modules() for name in getattr(module, "_keep_in_fp32_modules", None) or ()
    )
    found = {
        name: module
        for name, module in part.named_modules()
        if type(module) in (nn.Linear, Linear)
        and module not in kept
        and weights[id(module.weight)] == 1
        and not module.in_features % _MULTIPLE
        and not module.out_features % _MULTIPLE
        and not set(name.split(".")) & set(in_float32)
    }
    for name, module in found.items():
        parent = part.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Fp8Linear(module, torch.device(device)))
        if hasattr(parent, "qkv_bias_separate"):  # timm would else multiply with the weight itself
            parent.qkv_bias_separate = True  # type: ignore[assignment]  # not one of its modules
    logger.info("%d linear layers of %s are in float8", len(found), type(part).__name__)
    return [*found]


def check_fp8(key: str, device: torch.device) -> None:
    """Raises `ConfigError` where a device does not multiply in float8.

    Args:
        key: the setting that asks for it.
    """
    if device.type == "meta":  # nothing is computed
        return
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if torch.version.cuda is not None and capability >= (8, 9):
            return
        found = f"{torch.cuda.get_device_name(device)} does not"
    else:
        found = "this machine has none" if device.type == "cuda" else f"the run is on '{device.type}'"
    raise ConfigError(
        f"{key}: fp8 needs an NVIDIA GPU that multiplies in it (compute capability 8.9 or more: Ada, Hopper, "
        f"Blackwell), and {found}. Set it to auto or bf16."
    )


def plain_dtype(module: nn.Module) -> torch.dtype:
    """The type that a module reads: of its first weight that is not in float8."""
    dtypes = (weight.dtype for weight in module.parameters())
    return next(dtype for dtype in dtypes if dtype != FP8)


def is_rounded(layer: Fp8Linear, weight: Tensor) -> bool:
    """Whether a layer has just the numbers that it would have from a weight [out, in] in another type."""
    rounded, scale = _rounded_weight(weight.to(torch.bfloat16), layer.weight.device)
    found, own = (value.cpu().view(torch.uint8) for value in (rounded, layer.weight.detach()))
    return torch.equal(found, own) and torch.equal(scale.cpu(), layer.weight_scale.cpu())


def _rounded_weight(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """[out, in] -> the same in float8, and what to multiply each of its rows with, [1, out], both where the
    weight is."""
    rounded, scale = _rounded(weight.to(device).float())
    return rounded.to(weight.device), scale.t().contiguous().to(weight.device)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, C] -> the same in float8, and what to multiply each row with, [n, 1], float32."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True)
    factor = _LARGEST / largest.clamp(min=_SMALLEST)  # in the rows' type, and its reciprocal below is of that
    return (rows * factor).to(FP8), factor.float().reciprocal()


class _Fp8Product(torch.autograd.Function):
    """Of rows [n, in]: its result is no view, which timm adds a bias to in its place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, row_scale = _rounded(x.to(torch.bfloat16))
        out = torch._scaled_mm(
            rows,
            weight.t(),
            scale_a=row_scale,
            scale_b=scale,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        # the scales go to the gradient, which is smaller than the weight
        rows = grad.to(torch.bfloat16) * scale.to(torch.bfloat16)
        return (rows @ weight.to(torch.bfloat16)).to(grad.dtype), None, None, None


def _product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return _Fp8Product.apply(x, weight, scale, bias)
