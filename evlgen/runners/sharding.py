"""A language model that does not fit on each process, spread over them by torch's FSDP2 (`fully_shard`).

Every process keeps a part of each decoder layer, and gathers the whole layer while it computes with it. The
rest of the model (vision encoder, connector, word embeddings) is small beside them and whole on every
process; what of it is trained is kept equal by DDP, as without sharding. So the weights, optimizer state and
checkpoints of a run with a frozen language model are those of any other run.

This is `fully_shard` itself and not accelerate's ``FullyShardedDataParallelPlugin`` (1.15), which

- shards everything that is trained as well, so that each checkpoint would be an exchange that training waits
  for, and every evaluation would need an optimizer (`Accelerator.prepare` takes the two together only);
- is passed over in silence on CPUs: the distribution stays DDP, and nothing could be tested there;
- gathers at the root what is used outside of the root's ``forward``: the word embeddings, and everything in
  ``generate``;
- leaves out autocast, in which the rest of this model computes.

Importing this costs most of a second: only runs that shard do.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from evlgen.common.errors import ConfigError
from evlgen.runners.spread import part_of


class Sharding:
    """The decoder layers of a language model, on all processes of a machine together.

    Layers are gathered by all processes at once. In training each runs the model once for each batch; in
    generation one may need more steps, or have more batches, than another: see `in_step`.

    Args:
        language: the language model, whose layers are on any device.
        device: where a process computes.

    Raises:
        ConfigError: no layers are found in it.
    """

    def __init__(self, language: nn.Module, device: torch.device) -> None:
        self.device = device
        self.stack, self.layers = _layers(language)
        self.mesh = _mesh(device)
        self.group = self.mesh.get_group(self.mesh.ndim - 1)  # those that hold one copy of the model together

    def weights(self) -> set[nn.Parameter]:
        """The weights that are spread, before or after `apply`."""
        return {p for layer in self.layers for p in layer.parameters()}

    def apply(self) -> None:
        """Moves layer after layer to the device, of which this process keeps its part: the whole model is
        never there. From now on the weights are `DTensor`."""
        for layer in self.layers:
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=True)
            for module in layer.modules():
                module.register_load_state_dict_pre_hook(_take_part)
        # FSDP warns of layers that return views, as transformers' do; nothing writes into those
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        # without weights of its own, but it gathers the next layer while one computes
        rest = set(self.stack.parameters()) - self.weights()
        fully_shard(self.stack, mesh=self.mesh, ignored_params=rest)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the layers are summed here; the next backward pass after the block exchanges them."""
        self.stack.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.stack.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, processes may run the language model at different times and different numbers of times.

        Before each run of the layers all processes agree that there is one; a process that reaches the end of
        the block gathers the layers along with those that still run, until there are none.
        """
        announced = self.stack.register_forward_pre_hook(lambda *_: self._agree(True), prepend=True)
        try:
            yield
        finally:
            announced.remove()
        while self._agree(False).item():
            for layer in self.layers:
                layer.unshard()
                layer.reshard()

    def _agree(self, running: bool) -> Tensor | None:
        """How many processes run the layers now."""
        number = torch.tensor(float(running), device=self.device)
        dist.all_reduce(number, group=self.group)
        return None if running else number


def _take_part(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before a module loads whole tensors."""
    for name, weight in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = part_of(state[prefix + name], weight)


def _layers(language: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds a language model's layers, and the layers: of all lists of modules the one with
    the most weights."""
    lists = [
        (sum(p.numel() for p in child.parameters()), owner, child)
        for owner in language.modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList)
    ]
    if not lists:
        raise ConfigError(
            f"run.shard_language: {type(language).__name__} has no list of layers (nn.ModuleList) that could "
            "be spread over the processes. Set run.shard_language: false."
        )
    _, owner, layers = max(lists, key=lambda item: item[0])
    return owner, list(layers)


def _mesh(device: torch.device) -> DeviceMesh:
    """Layers are spread over the processes of a machine, whose connections are the fastest, and every machine
    has a copy; where it has one process, over all machines."""
    processes, own = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own > 1 and processes > own and processes % own == 0:
        return init_device_mesh(device.type, (processes // own, own), mesh_dim_names=("machine", "process"))
    return init_device_mesh(device.type, (processes,))
