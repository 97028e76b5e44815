"""A network to sample from that a team of ranks runs together, each its part of every layer, by the plan that Transformers has for its family.

Linear layers are cut by output (heads of queries, keys and values; the gate) or by input (what these flow back through), whose sums the team adds up
twice a layer; the output head by its vocabulary. Norms, and of most families the embedding, are whole on every rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastppo.model.adapters import Adapters
from fastppo.model.divided import as_divided, has_own_rows, local_part, part_of
from fastppo.model.prepare import require_same_logits
from fastppo.model.sharding import WholeCopy, flat_room, gathered_as

SETTING = "distributed.tensor_parallel"


class SplitCopy:
    """A copy of a network, to sample from, of which each rank of a team has its part, in memory that stays where it is. `model` runs where the others
    of the team run theirs.

    Args:
        model: what is copied, before it is sharded; it may lie on the host. team: one dimension, the ranks that run the copy together.
        device: of the copy.

    Raises ValueError for a network that cannot be cut into so many parts, or for which Transformers has no plan, or whose parts do not give what it
    gives.
    """

    adapters = None

    def __init__(self, model: PreTrainedModel, team: DeviceMesh, device: torch.device) -> None:
        require_divisible(model, team.size())
        first: dict[int, str] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        self._names = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        self._whole: dict[str, Tensor] | None = None  # weights that are to be written
        self.model: PreTrainedModel = copy.deepcopy(model, {id(p): p for _, p in named})  # shares the parameters as yet
        _plans().apply_tensor_parallelism(self.model, team)
        _lay_parts_flat(self.model, team, device)
        self._require_shared_parts()
        require_same_logits(self.model, model, f"{SETTING} {team.size()}")

    def _require_shared_parts(self) -> None:
        """Raises ValueError where tied weights have parts of their own, which would not follow what is learned."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, first in self._names.items():
            if (
                local_part(own[name]).untyped_storage().data_ptr()
                != local_part(own[first]).untyped_storage().data_ptr()
            ):
                raise ValueError(
                    f"{SETTING} is above 1, expected 1: {name} is {first}, which the plan divides otherwise"
                )

    @property
    def policy(self) -> SplitCopy:
        """What a checkpoint of the policy is read into, to be written."""
        return self

    @torch.no_grad()
    def refresh(self, network: PreTrainedModel) -> None:
        """Take over what learns of `network`, which is sharded now. Every rank has to call it."""
        network.reshard()
        self._whole, own = None, dict(self.model.named_parameters())
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                part = local_part(own[name])
                part.copy_(part_of(gathered_as(parameter, part), own[name]))

    @torch.no_grad()
    def collect(self, network: PreTrainedModel, *, keep: bool) -> None:
        """Let `state_dict` have all of `network`, which is sharded, on a rank that keeps it, in the host's memory. Every rank has to call it."""
        own, found = dict(self.model.named_parameters()), {}
        for name, value in network.state_dict().items():
            if self._names.get(name, name) != name:
                continue
            whole = gathered_as(value, local_part(own[name])) if isinstance(value, DTensor) else value
            if keep:
                found[name] = whole.to("cpu", copy=True)
        self._whole = found if keep else None

    def state_dict(self) -> dict[str, Tensor]:
        """Whole weights, tied ones under each of their names. Raises ValueError where they have not been collected since they changed."""
        if self._whole is None:
            raise ValueError(
                f"no rank has the whole weights with {SETTING}, expected the run to have ended; "
                "`fastppo export` writes the model of a checkpoint"
            )
        aliases = {name: self._whole[first] for name, first in self._names.items() if first in self._whole}
        return self._whole | aliases

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Others in place of the whole weights."""
        self._whole = {name: state[name].to("cpu", whole.dtype) for name, whole in self.state_dict().items()}


def copy_to_sample_from(
    model: PreTrainedModel, adapters: Adapters | None, team: DeviceMesh | None, device: torch.device
) -> WholeCopy | SplitCopy:
    """A rank's copy of a model that will be sharded: whole without a team, else its part. Raises ValueError as `SplitCopy`, and for adapters with a
    team."""
    if team is None:
        return WholeCopy(model, adapters)
    if adapters is not None:
        raise ValueError(f"{SETTING} is {team.size()}, expected 1 where the model has LoRA adapters")
    return SplitCopy(model, team, device)


def require_divisible(model: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError where the model cannot be cut into so many parts of one size, or Transformers has no plan for its family."""
    kind = type(model).__name__
    if not model.tp_plan:
        raise ValueError(f"{SETTING} is {ranks}, expected 1: Transformers has no tensor-parallel plan for {kind}")
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
    sizes["vocab_size"] = model.get_output_embeddings().weight.shape[0]
    for name, size in sizes.items():
        if size is not None and size % ranks:
            raise ValueError(f"{SETTING} is {ranks}, expected a divisor of {kind}'s {name}, {size}")
    for name, parameter in model.named_parameters():
        dimension = _divided_dimension(name, parameter, model.tp_plan)
        if dimension is not None and parameter.shape[dimension] % ranks:
            size = parameter.shape[dimension]
            raise ValueError(f"{SETTING} is {ranks}, expected a divisor of {size}, a width of {kind}'s {name}")


def divided_parameters(model: PreTrainedModel) -> int:
    """How many of a model's parameters its family's plan divides among ranks, each once; it may be an outline."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if _divided_dimension(name, p, model.tp_plan) is not None)


def _divided_dimension(name: str, parameter: Tensor, plan: Mapping[str, str]) -> int | None:
    """Which dimension of a parameter the plan divides, which knows it by its name or by its module's, with a star for each number; None where every
    rank has it whole, as the bias that is added after a sum."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = plan.get(generic) or plan.get(generic.rpartition(".")[0]) or ""
    if style == "embedding_rowwise":
        return 0
    if "rowwise" in style:
        return parameter.dim() - 1 if parameter.dim() > 1 else None
    return max(parameter.dim() - 2, 0) if "colwise" in style else None


def _plans() -> ModuleType:
    """Transformers' module of tensor parallelism."""
    try:
        from transformers.distributed import tensor_parallel
    except ImportError as error:
        raise ValueError(
            f"{SETTING} is above 1, expected 1: this Transformers has no transformers.distributed.tensor_parallel (5.17 has): "
            "pip install -U transformers"
        ) from error
    return tensor_parallel


def _slots(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter), a shared one as often as it is there."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


@torch.no_grad()
def _lay_parts_flat(network: PreTrainedModel, team: DeviceMesh, device: torch.device) -> None:
    """Copies of a network's parameters, which another may share, and of this rank's parts, in one block of memory for each type. The part of a head
    that is tied to the embedding lies in that."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings().weight
    slots = list(_slots(network))
    tied = network.config.get_text_config().tie_word_embeddings and has_own_rows(head.weight)
    tied = tied and (has_own_rows(embedding) or not isinstance(embedding, DTensor))
    unique = {id(p): p for module, name, p in slots if not (tied and module is head and name == "weight")}
    rooms = flat_room([local_part(p) for p in unique.values()], device)
    laid = {}
    for (key, parameter), room in zip(unique.items(), rooms, strict=True):
        room.copy_(local_part(parameter))
        laid[key] = nn.Parameter(as_divided(room, parameter), requires_grad=False)
    if tied:
        laid[id(head.weight)] = laid[id(embedding)]
    if tied and not isinstance(embedding, DTensor):
        rows = embedding.shape[0] // team.size()
        part = laid[id(embedding)].detach()[team.get_local_rank() * rows :][:rows]
        laid[id(head.weight)] = nn.Parameter(as_divided(part, head.weight), requires_grad=False)
    for module, name, parameter in slots:
        setattr(module, name, laid[id(parameter)])
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
