"""The layers of one Llama-like Transformers model on our kernels, forward and backward.

`patch_layers(model)` gives the model's trunk (what is below its head) a forward that asks at every call whether ours gives what its own
would; where not, its own runs. Padding is taken out before the layers and put back as zeros.
"""

from __future__ import annotations

import functools
import inspect
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from fastppo.integrations.deferred_logits import runs_plainly
from fastppo.integrations.model_patch import ModelPatch, language_model, lock, restore_class, subclass
from fastppo.integrations.patching import logger
from fastppo.model.attention import IMPLEMENTATION
from fastppo.model.lora import lora_layers
from fastppo.model.parts import LlamaParts, UnlikeLlama
from fastppo.model.parts_trunk import Layouts, trunk_of

_MARK = "_fastppo_layers"  # in a patched class
# Arguments that a trunk may be given: those looked at here, and the loss's, which a model hands down with all others.
LOOKED_AT = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "output_attentions", "output_hidden_states"
}  # fmt: skip
OF_THE_LOSS = {"num_items_in_batch", "shift_labels", "ignore_index"}
PLAIN_ATTENTION = ("sdpa", "eager")


def patch_layers(model: nn.Module) -> ModelPatch:
    """Layers of a model built as Llama is (Llama, Qwen2, Qwen3, Mistral, SmolLM, ...) run in our kernels, forward and backward: fp32, on a CPU.

    Embedding, layers and last norm are ours; head, loss and all else of the model stay as they are, so that `patch_model` may come before or after.
    A call that asks for more than the last hidden states of causal sequences runs the model's own layers: a cache, attentions or hidden
    states of the layers, masks that are no padding, packed sequences, inputs_embeds, dropout, autocast, other types and devices, adapters and hooks,
    compiled code. The logger `fastppo.integrations` tells each reason once.

    Args:
        model: a PreTrainedModel, or what wraps one. Its parameters may be replaced and moved afterwards. A model that is patched
            stays as it is.

    Raises:
        TypeError: there is no PreTrainedModel in it.
        ValueError: it is not built like Llama, or its parameters are not float32 on the CPU; the message says what is different.

    Differences from the model's own:
        - hidden states in rows of padding are 0. A loss of them is another one: labels there, and the first one behind padding on the left, are
          to be ignored (-100).
        - in training mode with gradients no cache is made unless `use_cache=True` is passed (Transformers' default makes one).
        - there is no second derivative: an error.
    """
    trunk = language_model(model).base_model
    with lock:
        if hasattr(type(trunk), _MARK):
            return ModelPatch(model, None)
        trunk.__class__ = _patched_class(type(trunk))
        try:  # of the class that it has from now on: what is found out is kept for the first call
            _require_served(trunk)
        except BaseException:
            unpatch_layers(model)
            raise
    return ModelPatch(model, unpatch_layers)


def unpatch_layers(model: nn.Module) -> None:
    """The model as it was before `patch_layers`; nothing where it was not patched."""
    restore_class(language_model(model).base_model, _MARK, "patch_layers")


def _require_served(trunk: PreTrainedModel) -> None:
    name = type(trunk).__name__
    if trunk.device.type != "cpu":
        raise ValueError(f"{name} is on {trunk.device}, expected the CPU")
    try:
        LlamaParts(trunk)
        if _is_more(trunk):
            raise UnlikeLlama("it has hooks of the backward pass, or parameters that are no plain tensors")
        if lora_layers(trunk):
            raise UnlikeLlama("a LoRA Linear is no plain linear layer: merge the adapters")
        with torch.autocast("cpu", enabled=False):
            if trunk_of(trunk) is None:
                raise UnlikeLlama("its layers give other numbers, or attend in another way")
    except UnlikeLlama as error:
        raise ValueError(f"{name} is not built as Llama is: {error}") from error


class _RunsItsOwn(Exception):
    """Why a call is left to the model."""


@functools.cache
def _patched_class(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        is_wrong = len(given) != len(args) + len(kwargs)  # the original says how
        if is_wrong or self.config._attn_implementation == IMPLEMENTATION or not _runs_plainly():
            return original.forward(self, *args, **kwargs)
        try:
            return _run(self, given)
        except _RunsItsOwn as reason:
            _tell(original.__name__, str(reason))
        return original.forward(self, *args, **kwargs)

    return subclass(original, {"forward": forward, _MARK: True}, _patched_class)


def _runs_plainly() -> bool:
    """Nor in a mode that watches torch's operators (FLOP counters, fake tensors), which would see none."""
    return runs_plainly() and not torch._C._len_torch_dispatch_stack()


@functools.cache
def _tell(trunk: str, reason: str) -> None:
    logger.warning("%s runs its own layers: %s (said once)", trunk, reason)


def _run(model: PreTrainedModel, given: dict[str, object]) -> BaseModelOutputWithPast:
    """Raises _RunsItsOwn."""
    _require_nothing_more(model, given)
    rows = _Rows.of(given.get("input_ids"), given.get("attention_mask"), given.get("position_ids"))
    _require_plain_attention(model)
    trunk = None if _is_more(model) or lora_layers(model) else trunk_of(model)
    if trunk is None:
        raise _RunsItsOwn(
            "expected plain modules and float32 parameters on the CPU, without autocast, adapters or hooks"
        )
    recompute = model.training and model.is_gradient_checkpointing and torch.is_grad_enabled()
    layouts = Layouts.of([0, *accumulate(rows.lengths)], None)
    hidden = trunk.hidden(rows.tokens, rows.positions, layouts, recompute=recompute)
    return BaseModelOutputWithPast(last_hidden_state=rows.pad(hidden))


def _require_nothing_more(model: PreTrainedModel, given: dict[str, object]) -> None:
    """Raises _RunsItsOwn where another argument, or another output, is asked for."""
    odd = next((x for x in given if x not in LOOKED_AT | OF_THE_LOSS and given[x] is not None), None)
    if odd is not None:
        raise _RunsItsOwn(f"it is given {odd}")
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name, getattr(model.config, name, False)):
            raise _RunsItsOwn(f"{name} is asked for")
    if given.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        raise _RunsItsOwn("return_dict is False")
    if given.get("past_key_values") is not None or _wants_cache(model, given.get("use_cache")):
        raise _RunsItsOwn(
            "a cache is asked for; where none is needed pass use_cache=False, or set model.config.use_cache to False"
        )


def _wants_cache(model: PreTrainedModel, use_cache: bool | None) -> bool:
    """As Transformers has it, but for a training step that says nothing of a cache."""
    if model.training and model.is_gradient_checkpointing:
        return False
    if use_cache is None:
        return bool(getattr(model.config, "use_cache", False)) and not (model.training and torch.is_grad_enabled())
    return bool(use_cache)


def _require_plain_attention(model: PreTrainedModel) -> None:
    """Raises _RunsItsOwn unless each layer attends causally, without dropout."""
    found = model.config._attn_implementation
    if found not in PLAIN_ATTENTION:
        raise _RunsItsOwn(f"its attention is {found}, expected one of {', '.join(PLAIN_ATTENTION)}")
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(model, "layers", ())]
    if not all(getattr(x, "is_causal", True) for x in (model.config, *attentions)):
        raise _RunsItsOwn("its attention is not causal")
    if any(x is not None and x.training and getattr(x, "attention_dropout", 0) for x in attentions):
        raise _RunsItsOwn("attention_dropout is not 0")


def _is_more(model: PreTrainedModel) -> bool:
    """Whether there are hooks of the backward pass or of all modules, or parameters that are more, or less, than tensors."""
    return (
        nn.modules.module._has_any_global_hook()
        or any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())
        or any(type(x) is not nn.Parameter or x.is_inference() for x in model.parameters())
    )


class _Rows(NamedTuple):
    """A batch [B, L] of which each row is one sequence, with padding on its left and right."""

    shape: torch.Size
    tokens: Tensor  # int64 [T], those that are no padding
    positions: Tensor  # int64 [T]
    lengths: list[int]  # [B]
    places: Tensor | None  # int64 [T] in the batch laid flat; None: there is no padding

    @classmethod
    def of(cls, ids: Tensor | None, mask: Tensor | None, position_ids: Tensor | None) -> _Rows:
        """Raises _RunsItsOwn."""
        if not _is_matrix(ids) or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
            raise _RunsItsOwn("expected input_ids [B, L], whole numbers on the CPU")
        batch, length = ids.shape
        if mask is not None and (not _is_matrix(mask) or mask.shape != ids.shape):
            raise _RunsItsOwn("expected attention_mask None or [B, L], as input_ids")
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        columns = torch.arange(length, dtype=torch.int64, device="cpu").expand(batch, -1)
        firsts, lengths = kept.byte().argmax(1, keepdim=True), kept.sum(1, keepdim=True)
        places = columns - firsts  # in its sequence
        if not torch.equal(kept, (places >= 0) & (places < lengths)) or not kept.any():
            raise _RunsItsOwn("expected attention_mask with padding on the left and right of each sequence alone")
        positions = columns[kept]  # as Transformers counts them where it is told nothing
        if position_ids is not None:
            if not _is_matrix(position_ids) or position_ids.shape not in (ids.shape, (1, length)):
                raise _RunsItsOwn("expected position_ids None, [B, L] or [1, L]")
            found = position_ids.expand(batch, -1)[kept].long()
            if not torch.equal(found, positions) and not torch.equal(found, places[kept]):
                raise _RunsItsOwn("expected position_ids that count each sequence's tokens from 0")
            positions = found
        flat = None if kept.all() else kept.flatten().nonzero().squeeze(1)
        return cls(ids.shape, ids[kept].long(), positions, lengths.flatten().tolist(), flat)

    def pad(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [B, L, H], 0 in rows of padding."""
        if self.places is not None:
            hidden = hidden.new_zeros(self.shape.numel(), hidden.shape[1]).index_copy(0, self.places, hidden)
        return hidden.view(*self.shape, -1)


def _is_matrix(x: object) -> bool:
    return type(x) is Tensor and x.dim() == 2 and x.device.type == "cpu"
