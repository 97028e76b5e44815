"""AdamW with warm-up and decay, gradient clipping and fp32 master weights, for parameters that live in any type."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastppo.checkpoint import flatten_optimizer, restore_optimizer
from fastppo.config import OptimizerConfig
from fastppo.low_bit import drawn_from, make_adamw
from fastppo.model.divided import as_divided, local_part
from fastppo.model.host import on_host


def learning_rate_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then constant, or linear or cosine decay from the peak in the
    first step after it to `min_lr_ratio` in the last of `total_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    decay_steps = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class LossScale:
    """What the loss is multiplied by before its backward pass, so that small gradients do not vanish in fp16; else always 1.

    It falls when gradients overflow, and rises again after many that did not (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
    Gradients that are not finite at scale 1 either did not overflow: the scale is then what it was before they came.
    """

    LARGEST, GROWTH_INTERVAL = 2.0**16, 200

    def __init__(self, value: float) -> None:
        self.value, self._fits = value, 0
        # What it was when the gradients in hand were first made, if it has fallen since.
        self._before: float | None = None

    @classmethod
    def for_types(cls, dtypes: Collection[torch.dtype]) -> LossScale:
        """dtypes: those that the networks compute in."""
        return cls(cls.LARGEST if torch.float16 in dtypes else 1.0)

    def keep(self, finite: bool) -> bool:
        """Whether the gradients made with this scale are kept; if not, the scale has fallen and they are to be made again."""
        if not finite and self.value > 1:
            self._before = self._before or self.value
            self.value, self._fits = max(self.value / 4, 1.0), 0
            return False
        if finite:
            self._fits += 1
            if self.value > 1 and self._fits % self.GROWTH_INTERVAL == 0:
                self.value = min(self.value * 2, self.LARGEST)
        elif self._before is not None:
            self.value = self._before
        self._before = None
        return True

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "fits": self._fits}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self._fits = state["value"], int(state["fits"])


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over named parameters.

    Parameters that are not fp32 get an fp32 master copy: gradients accumulate into it in fp32 (also over micro-batches), AdamW updates it, and
    the parameter receives the rounded result in place, so that a sampler which reads the same storage always sees the newest weights. With
    `bf16_stochastic_round` a bf16 parameter has none: it is rounded up or down at random, with its gradient still summed in fp32.

    With `offload` every parameter has an fp32 master, on the host, which is updated there; gradients are summed in fp32 where the parameter is.

    Of a sharded parameter, which is fp32, this rank's part is its own master: each rank updates its part, with the gradient norm of all parts.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, config: OptimizerConfig
    ) -> None:
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.peak_lr, self.max_grad_norm = lr, config.max_grad_norm
        self.loss_scale = LossScale(1.0)
        self._rounds_at_random, self._offloads = config.bf16_stochastic_round, config.offload
        self.masters = {name: self._master(parameter) for name, parameter in self.parameters.items()}
        meshes = [p.device_mesh for p in self.parameters.values() if isinstance(p, DTensor)]
        self._mesh = meshes[0] if meshes else None
        decayed = [master for master in self.masters.values() if master.dim() > 1]
        rest = [master for master in self.masters.values() if master.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adamw = make_adamw(groups, lr, config)

    @property
    def graded(self) -> dict[str, nn.Parameter]:
        """What gradients are added to, by name."""
        return self.parameters if self._offloads else self.masters

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have a part each of what learns."""
        return self._mesh is not None

    def set_learning_rate(self, factor: float) -> float:
        """Set every group to `factor` times the peak and return that rate."""
        rate = self.peak_lr * factor
        for group in self.adamw.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        return rate

    def take_gradients(self) -> None:
        """Of all micro-batches: this rank's parts of what FSDP has summed; and take the loss scale off those of fp32 parameters, a value head's
        say. Those of separate masters have lost it on their way."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = self.graded[name].grad = local_part(parameter.grad)
                if self.loss_scale.value != 1:
                    gradient.div_(self.loss_scale.value)

    def gradient_norm(self) -> Tensor:
        """0-d fp32: 2-norm over all gradients, before clipping; 0 where there is none."""
        gradients = [x.grad for x in self.graded.values() if x.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
        else:  # torch's 0 would be on the host
            norm = torch.zeros((), dtype=torch.float32, device=next(iter(self.graded.values())).device)
        return norm if self._mesh is None else self._norm_of_parts(norm)

    def _norm_of_parts(self, norm: Tensor) -> Tensor:
        """From the norm of this rank's parts that of all; each rank has to ask."""
        squares = norm.to(self._mesh.device_type, torch.float64) ** 2
        dist.all_reduce(squares, group=self._mesh.get_group())
        return squares.sqrt().float()

    def step(self, norm: Tensor) -> None:
        """Clip by `norm`, the value of `gradient_norm`, update, and round into the model's parameters."""
        torch.nn.utils.clip_grads_with_norm_(self.graded.values(), self.max_grad_norm, norm)
        if self._offloads:
            for name, parameter in self.parameters.items():
                self.masters[name].grad = None if parameter.grad is None else parameter.grad.to("cpu")
        with drawn_from(self._steps()) if self._rounds_at_random else nullcontext():
            self.adamw.step()
        self._publish()

    def _steps(self) -> int:
        """That were made."""
        return max((int(state["step"]) for state in self.adamw.state.values()), default=0)

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the master weights into the parameters that the model computes with."""
        for name, master in self._copies().items():
            self.parameters[name].copy_(master)

    def clear_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def separate_masters(self) -> dict[str, Tensor]:
        """The master weights that say more than the parameters themselves: what a checkpoint must hold besides the model."""
        return {name: x for name, x in self._copies().items() if self.parameters[name].dtype != x.dtype}

    def _copies(self) -> dict[str, Tensor]:
        """The master weights that are tensors of their own."""
        own = self.parameters
        return {
            name: x for name, x in self.masters.items() if x is not own[name] and not isinstance(own[name], DTensor)
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """AdamW's (tensors, JSON state), by parameter name; those of sharded parameters are sharded as these are."""
        tensors, state = flatten_optimizer(self.adamw, self.masters)
        return {name: self._as_its_parameter(name, tensor) for name, tensor in tensors.items()}, state

    def _as_its_parameter(self, name: str, tensor: Tensor) -> Tensor:
        """name: "exp_avg/<parameter>", or of another tensor of its size, or a count."""
        return tensor if tensor.dim() == 0 else as_divided(tensor, self.parameters[name.split("/", 1)[1]])

    def empty_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors for what `state_dict` has given, whose numbers are to come."""
        found = {}
        for name in state["tensors"]:
            key, parameter = name.split("/", 1)
            master = self.masters[parameter]
            found[name] = self._as_its_parameter(name, master.new_zeros(() if key == "step" else master.shape))
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        restore_optimizer(self.adamw, self.masters, parts, state)

    @torch.no_grad()
    def restore_masters(self, saved: Mapping[str, Tensor]) -> None:
        """To be called when the parameters are restored."""
        for name, master in self._copies().items():
            master.copy_(saved[name] if name in saved else self.parameters[name])

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        """`parameter` itself when it is fp32 or needs no copy, else an fp32 one that its gradients flow into as they are made; this rank's part of a
        sharded one."""
        if isinstance(parameter, DTensor):
            return nn.Parameter(local_part(parameter))
        if self._offloads:
            parameter.grad_dtype = torch.float32
            return nn.Parameter(on_host(parameter.detach().float()))
        if parameter.dtype == torch.float32:
            return parameter
        if parameter.dtype == torch.bfloat16 and self._rounds_at_random:
            parameter.grad_dtype = torch.float32
            return parameter
        master = nn.Parameter(parameter.detach().float())

        def move_gradient(parameter: Tensor) -> None:
            gradient = parameter.grad.float()
            if self.loss_scale.value != 1:
                gradient.div_(self.loss_scale.value)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(move_gradient)
        return master
