"""Networks divided among ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`): each rank keeps an equal part and gathers a layer while it runs.

Units are the decoder layers, each for itself, what stands around them (embedding, last norm, output head), and a value head. What learns is kept in
fp32, each rank's part being the optimizer's master weights, and is gathered in the type that the network had; what is frozen keeps its type.
A sharded network runs by its own modules, on a CPU too: FSDP gathers and frees at their calls, which our kernels over a model's parts have not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastppo.model.adapters import Adapters, TrainedAdapter

Found = TypeVar("Found")


class Sharding(NamedTuple):
    """How networks are divided."""

    mesh: DeviceMesh
    """One dimension: the ranks."""
    reduce_dtype: torch.dtype = torch.float32
    """Gradients of a half-precision network are summed over the ranks in this type."""
    cpu_offload: bool = False
    """Each rank's part, and with it the optimizer's state, lies in the host's memory while no layer needs it."""
    meet: Callable[[], Any] = lambda: None
    """Called before parts are gathered, and before gradients are summed: where ranks learn that one of them has failed since, and will not come."""

    def options(self, compute_dtype: torch.dtype | None) -> dict[str, Any]:
        """What `fully_shard` takes. compute_dtype: what weights are gathered in; None: each in its own type."""
        precision = MixedPrecisionPolicy()
        if compute_dtype is not None:
            precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=self.reduce_dtype)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        return {"mesh": self.mesh, "mp_policy": precision, "offload_policy": offload}


def shard_network(network: PreTrainedModel, sharding: Sharding) -> None:
    """Divide a prepared causal LM or its trunk, in place. From then on its weights are there inside of `gathered` alone.

    Raises ValueError for a network without decoder layers, whose weights would all be gathered at once, or with weights of two narrow types.
    """
    layers = decoder_layers(network)
    if not layers:
        raise ValueError(
            f"distributed.sharding is full, expected none: {type(network).__name__} has no layers that could be gathered one by one"
        )
    options = sharding.options(_widen(network))
    for layer in layers:
        fully_shard(layer, **options)
    # Gathered from the first to the last layer, and through the backward pass, in which the head comes first and the embedding last.
    fully_shard(network, reshard_after_forward=False, **options)
    _sum_gradients(network)
    _begin(network, sharding)


def shard_head(head: nn.Module, sharding: Sharding) -> None:
    """Divide a value head, in place, in the type that it has. A histogram head's `logits` are a call of it too."""
    head.register_forward_hook(lambda module, arguments, values: _owning(values))
    fully_shard(head, reshard_after_forward=True, **sharding.options(None))
    _sum_gradients(head)
    _begin(head, sharding)
    if hasattr(head, "logits"):
        register_fsdp_forward_method(head, "logits")


def gathered(network: nn.Module, call: Callable[[], Found]) -> Found:
    """What `call` makes while embedding, last norm and head of a sharded network are whole: the trunk's hidden states and what the head says of
    them. Tensors of it that learn gather them again as their gradients come. Every rank has to call it. Any other network is whole anyway.
    """
    if not isinstance(network, FSDPModule):
        return call()
    # A trunk gathers them at its own call, and would free them at the end of this one where the two are nested.
    found = call() if network.base_model is network else network.run_gathered(call)
    if not torch.is_grad_enabled():
        network.reshard()  # no backward pass will
    return found


def _owning(found: Any) -> Any:
    """Tensors that are no views: FSDP hangs its gathering on them, which is lost where one is written to."""
    if isinstance(found, tuple):
        return type(found)(*map(_owning, found))
    return found.clone() if isinstance(found, Tensor) else found


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """Those that Transformers can call, and recompute, each by itself."""
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


def _widen(network: nn.Module) -> torch.dtype | None:
    """Make what learns fp32, and return the type that it had where that was a narrower one."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    narrow = {parameter.dtype for parameter in learned if parameter.dtype.itemsize < torch.float32.itemsize}
    if len(narrow) > 1:
        names = " and ".join(sorted(map(str, narrow)))
        raise ValueError(
            f"{type(network).__name__} has weights in {names}, expected one of them with distributed.sharding full"
        )
    for parameter in learned:
        if parameter.dtype in narrow:
            parameter.data = parameter.data.float()
    return narrow.pop() if narrow else None


def _sum_gradients(network: nn.Module) -> None:
    """Losses have the denominators of all ranks already: gradients are added up, not averaged."""
    for module in _units(network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no operation that scales and sums


class _Gather:
    """FSDP's gathering of parts, after a meeting of the ranks."""

    def __init__(self, meet: Callable[[], Any]) -> None:
        self._meet = meet

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self._meet()
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum(_Gather):
    """FSDP's sum of gradients that leaves each rank its part, likewise."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._meet()
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _begin(root: nn.Module, sharding: Sharding) -> None:
    """Let FSDP make what it makes at the first call, without which nothing can start again after a failure in that one."""
    for module in _units(root) if can_start_again() else ():
        module.set_custom_all_gather(_Gather(sharding.meet))
        module.set_custom_reduce_scatter(_Sum(sharding.meet))
    root.run_gathered = lambda call: _owning(call())
    register_fsdp_forward_method(root, "run_gathered")
    with torch.no_grad():
        root.run_gathered(lambda: None)
        root.reshard()


def can_start_again() -> bool:
    """Whether this torch has what `start_again` needs, and ranks meet within a pass: 2.13 has."""
    return hasattr(FSDPModule, "reset_iter_state")


def start_again(root: nn.Module) -> None:
    """Forget what a forward or backward pass that was broken off has left in a sharded network, or head. Every rank has to call it."""
    root.reset_iter_state()
    for module in _units(root):
        module.unshard()  # gradients that have not been summed are at whole weights
        for parameter in module.parameters():
            parameter.grad = None
        module.reshard()


def _units(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


class WholeCopy:
    """A whole copy of a network, to sample from: its weights are gathered anew after each step, into memory that stays where it is, so that decoders
    and CUDA graphs that were made for it go on to serve.

    Args:
        model: what is copied, before it is sharded. adapters: of the model, where it has some; the copy has its own.
    """

    def __init__(self, model: PreTrainedModel, adapters: Adapters | None = None) -> None:
        self.adapters = copy.deepcopy(adapters)
        self.model: PreTrainedModel = copy.deepcopy(model) if self.adapters is None else self.adapters.model
        self.model.requires_grad_(False)
        parameters = list(self.model.parameters())
        for parameter, room in zip(parameters, flat_room(parameters, self.model.device), strict=True):
            parameter.data = room.copy_(parameter.data)

    @property
    def policy(self) -> nn.Module | TrainedAdapter:
        """What of it a checkpoint of the policy is read into."""
        return self.model if self.adapters is None else self.adapters.trained("policy")

    @torch.no_grad()
    def refresh(self, network: PreTrainedModel) -> None:
        """Take over what learns of `network`, which is sharded now. Every rank has to call it."""
        network.reshard()
        learned = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        for name, own in self.model.named_parameters():
            if name in learned:
                own.copy_(gathered_as(learned[name], own))


def gathered_as(tensor: DTensor, like: Tensor) -> Tensor:
    """The whole of a sharded tensor, with the type and on the device of `like`. Every rank has to call it."""
    return tensor.detach().to(device=like.device, dtype=like.dtype).full_tensor()


def flat_room(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Room for each of the tensors: those of one type lie side by side in one block of memory, each at a multiple of 64 bytes."""
    rooms: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        step = 64 // dtype.itemsize
        sizes = [-(-tensors[place].numel() // step) * step for place in places]
        block = torch.empty(sum(sizes), dtype=dtype, device=device)
        for place, part in zip(places, block.split(sizes), strict=True):
            rooms[place] = part[: tensors[place].numel()].view(tensors[place].shape)
    return [rooms[place] for place in range(len(tensors))]


class Traffic(NamedTuple):
    """Bytes that a rank gets from the others, and so sends them, for one micro-batch of one network."""

    gathered: int
    reduced: int

    @classmethod
    def of(
        cls, network: nn.Module, ranks: int, *, learns: bool, compute_size: int = 4, reduce_size: int = 4
    ) -> Traffic:
        """By formula, of a network that may be an outline on the meta device, sharded or not. L numbers stand in layers, as which a value head
        counts, and A around them:

            forward            (L + A) c (R - 1) / R
            and backward     + L c (R - 1) / R, and (L + A) r (R - 1) / R of gradients

        of c and r bytes a number, each parameter rounded up to a multiple of R rows. learns: all of it does, and there is a backward pass.
        """
        layers = {p for layer in decoder_layers(network) or [network] for p in layer.parameters()}
        inside = sum(_padded(p, ranks) for p in layers)
        around = sum(_padded(p, ranks) for p in network.parameters() if p not in layers)
        received = (inside + around) * (ranks - 1) // ranks
        again = inside * (ranks - 1) // ranks
        if not learns:
            return cls(received * compute_size, 0)
        return cls((received + again) * compute_size, received * reduce_size)


def _padded(parameter: nn.Parameter, ranks: int) -> int:
    """Elements of a parameter whose rows are divided evenly."""
    rows = parameter.shape[0]
    return -(-rows // ranks) * ranks * (parameter.numel() // rows)
