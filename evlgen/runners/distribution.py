"""Several processes as one: what accelerate and torch distribute, and how."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from evlgen.common.errors import TrainingError
from evlgen.common.precision import resolve_precision
from evlgen.models.base_model import BaseModel
from evlgen.runners.run_config import RunConfig

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run, its precision as the device computes it."""
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    cpu = not torch.accelerator.is_available()  # said outright, or accelerate would not distribute on CPUs
    # the others wait while the first process scores, and METEOR and SPICE may take long
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(hours=6))
    if not state.is_main_process:
        logging.getLogger("evlgen").setLevel(logging.WARNING)
    precision = resolve_precision(run.precision, state.device)
    torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
    torch.backends.cudnn.allow_tf32 = run.allow_tf32
    torch.use_deterministic_algorithms(run.deterministic)
    torch.backends.cudnn.deterministic = run.deterministic
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    exchange = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no copy of the gradients
    return Accelerator(mixed_precision=_PRECISIONS[precision], cpu=cpu, kwargs_handlers=[exchange])


def prepare(
    accelerator: Accelerator, model: BaseModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to call in training and its optimizer. Of several processes only what is trained is made and
    kept equal: frozen parts are read by each from the same files, and never sent."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return accelerator.prepare(model, optimizer)


@contextlib.contextmanager
def peers_named() -> Iterator[None]:
    """Says plainly when an exchange failed because another process is gone; that one says why.

    Raises:
        TrainingError: instead of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "by peer" not in str(error):
            raise
        cause = str(error).splitlines()[0]
        raise TrainingError(
            f"another process of this run ended, so this one stops; its own message says why ({cause})."
        ) from error


class WeightedMeans:
    """Means of losses over batches that weigh differently, on all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.weight, self.count = 0.0, 0

    def add(self, losses: dict[str, Tensor], weight: float, count: int) -> None:
        """A batch's mean losses, what they weigh, and its number of samples."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * weight
        self.weight += weight
        self.count += count

    def over_processes(
        self, accelerator: Accelerator, flag: bool
    ) -> tuple[dict[str, float], float, int, bool]:
        """The mean losses, the weight and the number of samples of all batches, and whether ``flag`` is set
        anywhere. One exchange, and the one place of a step that waits for the device."""
        sums = [*self._sums.values()]
        own = torch.tensor([self.weight, self.count, float(flag)], device=accelerator.device)
        numbers = torch.cat([torch.stack(sums), own]) if sums else own
        if accelerator.num_processes > 1:
            dist.all_reduce(numbers)
        *values, weight, count, flags = numbers.tolist()
        means = (
            {name: value / weight for name, value in zip(self._sums, values, strict=True)} if weight else {}
        )
        return means, weight, int(count), flags > 0


def total_norm(gradients: list[Tensor]) -> float:
    """The norm of all gradients as one vector."""
    return torch.nn.utils.get_total_norm(gradients).item()
