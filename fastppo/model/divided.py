"""Tensors that are divided among ranks, and the ranks that run one network together, each its part of every layer: a team."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a divided tensor, in the same memory; another tensor itself."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def as_divided(part: Tensor, like: Tensor) -> Tensor:
    """`part` as this rank's part of a tensor that is divided as `like` is; itself where that is whole."""
    if not isinstance(like, DTensor):
        return part
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(part, like.device_mesh, like.placements, **layout)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, as `like` is divided; no rank is asked for anything."""
    if not isinstance(like, DTensor):
        return whole
    here = whole.to(like.to_local().device)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None).to_local()


def has_own_rows(tensor: Tensor | None) -> bool:
    """Whether each rank of a team has some of the rows, in the order of the ranks."""
    return isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)


def team_of(network: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that run the network together; None where this one runs it alone."""
    found = (p.device_mesh.get_group() for p in network.parameters() if isinstance(p, DTensor))
    return next(found, None)


def whole_columns(columns: Tensor, weight: Tensor) -> Tensor:
    """[..., rows of `weight`] of what this rank's rows of it gave, [..., its own]. The same bits on every rank of the team."""
    if not has_own_rows(weight):
        return columns
    team = weight.device_mesh.get_group()
    parts = [torch.empty_like(columns) for _ in range(dist.get_world_size(team))]
    dist.all_gather(parts, columns.contiguous(), group=team)
    return torch.cat(parts, dim=-1)


def least_in(team: dist.ProcessGroup | None, number: int) -> int:
    """Of what each rank of the team says."""
    if team is None:
        return number
    said = torch.tensor([number], dtype=torch.int64, device="cuda" if dist.get_backend(team) == "nccl" else "cpu")
    dist.all_reduce(said, dist.ReduceOp.MIN, group=team)
    return int(said)
