"""LoRA adapters (peft's) of policy, critic and reference on one trunk: which of them speaks, and how they are kept.

Policy and critic each have an adapter, the reference is the trunk with none, or with a frozen copy of the policy's where that one has learned
something before. peft switches adapters by their gradients' flags too; here the flags stay, since losses of two roles go backward together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model.lora import active_factors, is_plain_lora, lora_layers, merged, without_adapters
from fastppo.model.prepare import prepare_model

CRITIC, REFERENCE = "critic", "reference"
# What peft can do besides two factors a layer, each with the value that switches it off.
EXTRAS = {
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_dora": False,
}
# Of its settings, those that say where an adapter came from, how it began, and what is off here.
IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
}
IRRELEVANT |= {"runtime_config", "task_type"}


class Adapters:
    """Of a model that peft has wrapped.

    Attributes:
        model: the Transformers model inside, whose layers hold the adapters.
        policy: the name of the policy's adapter.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        """wrapped: a `peft.PeftModel` with one LoRA adapter. It learns, and nothing else of the model does.

        Raises TypeError or ValueError for adapters that cannot be trained here, or that were made for another model.
        """
        self._wrapped, self.policy = wrapped, _only_adapter(wrapped)
        self.model: PreTrainedModel = wrapped.get_base_model()
        self._layers = [layer for _, layer in lora_layers(self.model)]
        self._roles: dict[str, str | None] = {"policy": self.policy, "reference": None}
        self._speaking = "policy"
        self.seats: dict[str, str] = {}
        """Of a debate whose seats have adapters of their own: name -> the role in which it speaks, "policy" or another."""
        self.model.requires_grad_(False)
        for parameter in self.parameters(self.policy).values():
            parameter.requires_grad_(True)

    @classmethod
    def new(
        cls, model: PreTrainedModel, *, r: int, alpha: float, target_modules: tuple[str, ...] | None, seed: int
    ) -> Adapters:
        """A new adapter that changes nothing yet, put into a model. target_modules: names of linear layers; None: all but the output head.

        Raises ImportError without peft, ValueError where the model has no such layers, or adapters already.
        """
        if lora_layers(model):
            raise ValueError(f"lora.r is {r}, expected 0 with a model that has adapters already")
        peft = _imported_peft()
        chosen = "all-linear" if target_modules is None else list(target_modules)
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                wrapped = peft.get_peft_model(model, config)
            except ValueError as error:
                raise ValueError(f"lora.target_modules is {chosen!r}: {error}") from error
        return cls(wrapped)

    @classmethod
    def from_description(cls, model: PreTrainedModel, description: dict[str, Any]) -> Adapters:
        """An adapter of these settings, whose numbers are to come."""
        peft = _imported_peft()
        config = peft.LoraConfig(**description, task_type="CAUSAL_LM")
        return cls(peft.get_peft_model(model, config))

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Of an adapter, by their names in the model."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if ".lora_" in name and adapter in name.split(".")}

    def add_critic(self) -> None:
        """An adapter that begins as a copy of the policy's, and learns."""
        self._copy_policy(CRITIC, learns=True)

    def add_seats(self, seats: Iterable[str], policy: str) -> None:
        """An adapter for each seat, which begins as a copy of the policy's, and learns with it; the policy's is that of the seat `policy`."""
        self.seats = {seat: "policy" if seat == policy else f"seat_{seat}" for seat in seats}
        for role in self.seats.values():
            if role != "policy":
                self._copy_policy(role, learns=True)

    def keep_reference(self) -> None:
        """From now on the reference is the policy as it is now. One that has learned nothing yet is the trunk alone."""
        own = self.parameters(self.policy).items()
        if any(p.any() for name, p in own if ".lora_B." in name or ".lora_embedding_A." in name):
            self._copy_policy(REFERENCE, learns=False)

    def _copy_policy(self, name: str, learns: bool) -> None:
        config = copy.deepcopy(self._wrapped.peft_config[self.policy])
        config.init_lora_weights, config.lora_dropout = True, 0.0
        with torch.random.fork_rng(devices=[]):
            self._wrapped.add_adapter(name, config)
        self._roles[name] = name
        own, original = self.parameters(name), self.parameters(self.policy)
        for parameter, source in zip(own.values(), original.values(), strict=True):
            parameter.data = source.detach().clone()
            parameter.requires_grad_(learns)
        for role, adapter in self._roles.items():  # peft leaves the active adapter's flags alone on
            if role != "reference":
                for parameter in self.parameters(adapter).values():
                    parameter.requires_grad_(True)

    @contextmanager
    def speaking(self, role: str) -> Iterator[None]:
        """Inside the block the model is "policy", "critic", "reference" or a seat's (`seats`); it is the policy outside of all blocks."""
        before = self._speaking
        self._let_speak(role)
        try:
            yield
        finally:
            self._let_speak(before)

    def _let_speak(self, role: str) -> None:
        self._speaking, adapter = role, self._roles[role]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [adapter or self.policy], adapter is None

    def recomputation(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint`: what is computed again for a backward pass is computed by who speaks now."""
        return nullcontext(), self.speaking(self._speaking)

    def trained(self, role: str, **beside: nn.Module) -> TrainedAdapter:
        """What learns with a role: its adapter, under names that do not tell what the adapter is called, and modules beside it. With the policy
        those of the other seats."""
        adapter = self._roles[role]
        named = self.parameters(adapter).items()
        own = {".".join(part for part in name.split(".") if part != adapter): p for name, p in named}
        if role == "policy":
            for other in (name for name in self.seats.values() if name != "policy"):
                own |= {f"{other}.{name}": p for name, p in self.trained(other).named_parameters()}
        own |= {f"{name}.{key}": p for name, module in beside.items() for key, p in module.named_parameters()}
        return TrainedAdapter(own)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The frozen weights, by their names in the model without adapters."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                yield without_adapters(name), parameter

    def reference_parameters(self) -> dict[str, nn.Parameter]:
        """Of the reference's own adapter; empty where it has none."""
        return {} if self._roles["reference"] is None else self.parameters(REFERENCE)

    @torch.no_grad()
    def quantize_base(self) -> None:
        """Hold the weights that stand beside adapters in 4 bits (NF4 with double quantisation: QLoRA, Dettmers et al. 2023, arXiv:2305.14314), where
        they lie. The layers then run bitsandbytes' products, in the type that the weights had."""
        nn4 = _imported_bitsandbytes().nn
        for layer in self._layers:
            plain = layer.base_layer
            if type(plain) is not nn.Linear:
                raise ValueError(
                    f"lora.quantization is nf4, expected null with adapters on {type(plain).__name__}, of which there is no kind with 4 bits"
                )
            made = nn4.Linear4bit(
                plain.in_features,
                plain.out_features,
                plain.bias is not None,
                compute_dtype=plain.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            made.weight = nn4.Params4bit(plain.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
            made.weight = made.weight.to(plain.weight.device)
            made.bias = plain.bias
            # Else a pass without gradients packs the weights for AVX512-BF16, for good: scales in bfloat16, and products without a gradient.
            made.support_avx512bf16_for_cpu = False
            layer.base_layer = made

    def description(self) -> dict[str, Any]:
        """peft's settings of the policy's adapter, as JSON holds them, as far as they decide what it computes."""
        settings = self._wrapped.peft_config[self.policy].to_dict()
        settings = {name: value for name, value in settings.items() if name not in IRRELEVANT}
        return json.loads(
            json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        )

    def merged_state(self) -> dict[str, Tensor]:
        """The state of the model without adapters, the policy's merged into its weights."""
        layers = {f"{name}.base_layer.weight": layer for name, layer in lora_layers(self.model)}
        return {
            without_adapters(name): self._merged(layers[name]) if name in layers else value
            for name, value in self.model.state_dict().items()
            if ".lora_" not in name and ".base_layer.weight." not in name  # of weights in 4 bits, their scales
        }

    @torch.no_grad()
    def _merged(self, layer: nn.Module) -> Tensor:
        weight = _plain(layer.base_layer)
        if is_plain_lora(layer):
            return merged(weight, active_factors(layer))
        return weight + layer.get_delta_weight(self.policy).to(weight.dtype)

    def save(self, folder: Path) -> None:
        """The policy's adapter in peft's format; those of other seats in folders of their names under it."""
        self._save(self.policy, folder)
        for seat, role in self.seats.items():
            if role != "policy":
                self._save(role, folder / seat)

    def _save(self, adapter: str, folder: Path) -> None:
        peft = _imported_peft()
        folder.mkdir(parents=True, exist_ok=True)
        state = peft.get_peft_model_state_dict(self._wrapped, adapter_name=adapter, save_embedding_layers=False)
        save_file(
            {name: x.detach().cpu().contiguous() for name, x in state.items()},
            folder / "adapter_model.safetensors",
            {"format": "pt"},
        )
        config = self._wrapped.peft_config[adapter]
        trained, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder)
        config.inference_mode = trained


class TrainedAdapter:
    """Parameters that learn together, as optimizers and checkpoints know a module."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._parameters.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError, as a module does, where `saved` is of other parameters."""
        odd = sorted(saved.keys() ^ self._parameters.keys())
        odd += [name for name, p in self._parameters.items() if name in saved and saved[name].shape != p.shape]
        if odd:
            raise RuntimeError(f"the adapter saved has other parameters, or of other shapes: {', '.join(odd[:5])}")
        for name, parameter in self._parameters.items():
            parameter.copy_(saved[name])


def adapters_of(model: Any, settings: Any) -> Adapters | None:
    """Those of a PeftModel; None of any other. settings: those of `lora`, which ask for no others then."""
    if isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return None
    if settings.r:
        raise ValueError(f"lora.r is {settings.r}, expected 0 with a model that has an adapter already")
    return Adapters(model)


def add_adapters(model: PreTrainedModel, settings: Any, seed: int) -> Adapters:
    """A new adapter in a prepared model, as `lora` has it."""
    own = {name: value for name, value in asdict(settings).items() if name != "quantization"}
    adapters = Adapters.new(model, **own, seed=seed)
    prepare_model(model)  # looks whether one stands where it would never learn
    return adapters


def _imported_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA adapters need peft, which is not installed: pip install 'fastppo[lora]'") from error
    return peft


def _imported_bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "lora.quantization needs bitsandbytes, which is not installed: pip install 'fastppo[qlora]'"
        ) from error
    return bitsandbytes


def _plain(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, also of one that holds it in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    return _imported_bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)


def _only_adapter(wrapped: nn.Module) -> str:
    """Name of the adapter that learns. Raises TypeError or ValueError where that is not clear, or it is of a kind that is not served."""
    peft = _imported_peft()
    if not isinstance(wrapped, peft.PeftModel) or not isinstance(wrapped.get_base_model(), PreTrainedModel):
        raise TypeError(
            f"model is {type(wrapped).__name__}, expected a peft.PeftModel of a transformers.PreTrainedModel"
        )
    names = list(wrapped.peft_config)
    if len(names) != 1 or {*wrapped.active_adapters} != {*names}:
        raise ValueError(
            f"model has the adapters {', '.join(names)}, of which {', '.join(wrapped.active_adapters)} are active, "
            "expected one, which is active: the policy's"
        )
    config = wrapped.peft_config[names[0]]
    if type(config) is not peft.LoraConfig:
        raise ValueError(f"model's adapter is of type {config.peft_type.value}, expected LORA")
    for key, off in EXTRAS.items():
        if getattr(config, key, off) != off:
            raise ValueError(f"{key} of the model's adapter is {getattr(config, key)!r}, expected {off!r}")
    if names[0] in (CRITIC, REFERENCE):
        raise ValueError(f"the model's adapter is called {names[0]!r}, expected another name: it is the policy's")
    made_for, name = config.base_model_name_or_path, wrapped.get_base_model().name_or_path
    if made_for and name and PurePath(made_for).name != PurePath(name).name:  # where the folder lies does not matter
        raise ValueError(
            f"the model's adapter was made for {made_for!r}, expected one for {name!r}, which it was put on"
        )
    return names[0]
