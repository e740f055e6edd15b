"""A language model that does not fit on each process, spread over them by torch's FSDP2 (`fully_shard`).

Every process keeps a part of each layer, of the encoder too where there is one, and gathers the whole layer
while it computes with it. The rest of the model (vision encoder, connector, word embeddings) is small beside
them and whole on every process; what of it is trained is kept equal by DDP, as without sharding. So the
weights, optimizer state and checkpoints of a run with a frozen language model are those of any other run.

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
from evlgen.runners.dtensor import part_of


class Sharding:
    """The layers of a language model, on all processes of a machine together.

    Layers are gathered by all processes at once. In training each runs the model once for each batch; in
    generation one may need more steps, or have more batches, than another: see `in_step`.

    Args:
        language: the language model, whose layers are on any device.
        device: where a process computes.

    Raises:
        ConfigError: no layers are found in it; its weights are quantised.
    """

    def __init__(self, language: nn.Module, device: torch.device) -> None:
        self.device = device
        self.stacks = _stacks(language)
        self._refuse_quantised()
        self.mesh = _mesh(device)
        self.group = self.mesh.get_group(self.mesh.ndim - 1)  # those that hold one copy of the model together

    def weights(self) -> set[nn.Parameter]:
        """The weights that are spread, before or after `apply`."""
        return {p for layers in self.stacks.values() for layer in layers for p in layer.parameters()}

    def apply(self) -> None:
        """Moves layer after layer to the device, of which this process keeps its part: the whole model is
        never there. From now on the weights are `DTensor`."""
        # FSDP warns of layers that return views, as transformers' do; nothing writes into those
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        spread = self.weights()
        for stack, layers in self.stacks.items():
            rest = set(stack.parameters()) - spread
            for layer in layers:
                fully_shard(layer, mesh=self.mesh, reshard_after_forward=True)
                for module in layer.modules():
                    module.register_load_state_dict_pre_hook(_take_part)
            # without weights of its own, but it gathers the next layer while one computes
            fully_shard(stack, mesh=self.mesh, ignored_params=rest)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the layers are summed here; the next backward pass after the block exchanges them."""
        for stack in self.stacks:
            stack.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for stack in self.stacks:
                stack.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, processes may run the language model at different times and different numbers of times.

        Before each run of a stack of layers all processes agree on the stack that runs next. Those that wait
        for the other stack, or have reached the end of the block, gather its layers along with those that
        run it; the block ends when nobody runs any.
        """
        announced = [
            stack.register_forward_pre_hook(lambda *_, number=number: self._wait_for(number), prepend=True)
            for number, stack in enumerate(self.stacks)
        ]
        try:
            yield
        finally:
            for hook in announced:
                hook.remove()
        self._wait_for(None)

    def _wait_for(self, wanted: int | None) -> None:
        """Until it is the turn of a stack, or, for None, until no process wants any."""
        while True:
            wishes = torch.zeros(len(self.stacks), device=self.device)
            if wanted is not None:
                wishes[wanted] = 1
            dist.all_reduce(wishes, group=self.group)
            if wanted is not None and len(self.stacks) == 1:
                return  # whatever the others want: one need not wait for the device to know
            turn = next((number for number, wish in enumerate(wishes.tolist()) if wish), None)
            if turn is None or turn == wanted:
                return
            for layer in list(self.stacks.values())[turn]:
                layer.unshard()
                layer.reshard()

    def _refuse_quantised(self) -> None:
        kinds = {str(p.dtype) for p in self.weights() if not p.is_floating_point()}
        if kinds:
            raise ConfigError(
                f"run.shard_language: quantised weights ({', '.join(sorted(kinds))}) cannot be spread over "
                "the processes. Set it to false, or model.language.quantization: none."
            )


def _take_part(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before a module loads whole tensors."""
    for name, weight in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = part_of(state[prefix + name], weight)


def _stacks(language: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that run a language model's layers one after the other, and their layers: one, or encoder
    and decoder. Layers are a list of modules that lies in no other and has at least a tenth of the weights of
    the largest."""
    sizes = {lists: sum(p.numel() for p in lists.parameters()) for lists in _outermost_lists(language)}
    if not sizes:
        raise ConfigError(
            f"run.shard_language: {type(language).__name__} has no list of layers (nn.ModuleList) that could "
            "be spread over the processes. Set run.shard_language: false."
        )
    kept = [lists for lists, size in sizes.items() if size >= max(sizes.values()) / 10]
    kept.sort(key=sizes.__getitem__)  # of two lists of one module the larger is its layers
    owners = {lists: owner for owner in language.modules() for lists in owner.children() if lists in sizes}
    return {owners[lists]: list(lists) for lists in kept}


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        return [module]
    return [lists for child in module.children() for lists in _outermost_lists(child)]


def _mesh(device: torch.device) -> DeviceMesh:
    """Layers are spread over the processes of a machine, whose connections are the fastest, and every machine
    has a copy; where it has one process, over all machines."""
    processes, own = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if own > 1 and processes > own and processes % own == 0:
        return init_device_mesh(device.type, (processes // own, own), mesh_dim_names=("machine", "process"))
    return init_device_mesh(device.type, (processes,))
