"""Operations in the form that is fastest on this device and in this type, all measured and all chosen here.

- `linear` (`products`): float32 products on AMD processors by oneDNN.
- `self_attention` (`attention`): torch's fused kernels, but plain products in training on a CPU with
  dropout or in half precision.
- `use_fp8` (`fp8`): linear layers of frozen parts in float8, where a user asks for it.
- `Dropout`, `keep_mask` (`dropout`): sixteen random bits for each entry, and a mask of one byte.

Each is a plain function or module that takes and gives what its namesake in torch does, so that a model
reads the same with either. A choice depends on device, type and processor alone and not on a measurement at
run time: a run that is resumed must take the same one.
"""

from evlgen.models.ops.attention import language_attention, self_attention
from evlgen.models.ops.dropout import Dropout, keep_mask
from evlgen.models.ops.fp8 import FP8, Fp8Linear, check_fp8, is_rounded, plain_dtype, use_fp8
from evlgen.models.ops.products import Linear, linear, use_fast_linear

__all__ = [
    "FP8",
    "Dropout",
    "Fp8Linear",
    "Linear",
    "check_fp8",
    "is_rounded",
    "keep_mask",
    "language_attention",
    "linear",
    "plain_dtype",
    "self_attention",
    "use_fast_linear",
    "use_fp8",
]
