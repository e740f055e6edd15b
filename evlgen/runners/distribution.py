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

from evlgen.common.errors import ConfigError, ProcessLost
from evlgen.common.precision import resolve_precision
from evlgen.config.run_config import RunConfig
from evlgen.models.base_model import BaseModel
from evlgen.models.protocols import HasLanguageModel, offers
from evlgen.runners.compilation import compile_blocks, uncompiled
from evlgen.runners.rendezvous import meeting

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(run: RunConfig) -> Accelerator:
    """The accelerator of a run, its precision as the device computes it."""
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    cpu = not torch.accelerator.is_available()  # said outright, or accelerate would not distribute on CPUs
    # the others wait while the first process scores, and METEOR and SPICE may take long
    timeout = datetime.timedelta(hours=6)
    state = PartialState(cpu=cpu, timeout=timeout, **meeting(timeout))
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


class Distribution:
    """A model on this process's device, and how it is trained together with the other processes.

    What is trained is made equal on all processes and kept so by DDP, which accelerate wraps around the
    model. What is frozen is read by each process from the same files, and never sent.

    Args:
        model: moved to the device here.
        run: ``shard_language``: whether the layers of its language model are spread over the processes;
            ``evaluate``: nothing is trained, so there is nothing to keep equal.

    Attributes:
        wrapped: the model to call in training.

    Raises:
        ConfigError: ``shard_language``, and there is no language model, or none that can be spread.
    """

    def __init__(self, accelerator: Accelerator, model: BaseModel, run: RunConfig) -> None:
        self.accelerator = accelerator
        self.sharding = None
        if run.shard_language and accelerator.num_processes > 1:
            from evlgen.runners.sharding import Sharding

            self.sharding = Sharding(_language_of(model), accelerator.device)
        apart = self.sharding.weights() if self.sharding else set()
        _move(model, accelerator.device, apart)
        _exchange_only_trained(model, apart)
        # accelerate wraps no model that is sharded already: sharding comes after
        self.wrapped: nn.Module = accelerator.prepare_model(
            model, device_placement=False, evaluation_mode=run.evaluate
        )
        if self.sharding:
            self.sharding.apply()
        self.compiled: list[nn.Module] = []
        if run.compile and not run.evaluate:
            self.compiled = compile_blocks(
                model, apart=set() if not self.sharding else {*model.language.modules()}
            )

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Gradients are summed here; the next backward pass outside of the block exchanges them."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.accelerator.no_sync(self.wrapped))
            if self.sharding:
                stack.enter_context(self.sharding.no_sync())
            yield

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, each process may generate as often as it likes. Nothing is compiled for the many shapes of
        generation."""
        with contextlib.ExitStack() as stack:
            if self.sharding:
                stack.enter_context(self.sharding.in_step())
            stack.enter_context(uncompiled(self.compiled))
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[BaseModel]:
        """Inside of a training step: the bare model, to write texts with as in an evaluation. Nothing of it
        is remembered for gradients."""
        # autocast keeps what it cast until it ends: weights that were cast without gradients
        with self.generating(), torch.no_grad(), self.accelerator.autocast():
            yield self.accelerator.unwrap_model(self.wrapped)


def _language_of(model: BaseModel) -> nn.Module:
    if not offers(model, HasLanguageModel):
        raise ConfigError(
            f"run.shard_language: the architecture ({type(model).__name__}) has no language model to spread "
            "over the processes. Set it to false."
        )
    return model.language


def _move(model: nn.Module, device: torch.device, apart: set[nn.Parameter]) -> None:
    """`nn.Module.to` for all but some weights."""
    if not apart:
        model.to(device)
        return
    for p in model.parameters():
        if p not in apart:
            p.data = p.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _exchange_only_trained(model: BaseModel, apart: set[nn.Parameter]) -> None:
    """Of several processes DDP makes and keeps equal only what a checkpoint holds, but for some weights."""
    kept = set(model.trained_state_dict())
    left_out = [name for name, p in model.named_parameters() if not p.requires_grad or p in apart]
    left_out += [name for name, _ in model.named_buffers() if name not in kept]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_out)


@contextlib.contextmanager
def peers_named() -> Iterator[None]:
    """Says plainly when an exchange failed because another process is gone; that one says why.

    Raises:
        ProcessLost: instead of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "by peer" not in str(error):
            raise
        cause = str(error).splitlines()[0]
        raise ProcessLost(
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
        own = torch.tensor([self.weight, self.count, float(flag)])
        own = own.to(accelerator.device, non_blocking=True)
        numbers = torch.cat([torch.stack(sums), own]) if sums else own
        if accelerator.num_processes > 1:
            dist.all_reduce(numbers)
        *values, weight, count, flags = numbers.tolist()
        means = (
            {name: value / weight for name, value in zip(self._sums, values, strict=True)} if weight else {}
        )
        return means, weight, int(count), flags > 0
