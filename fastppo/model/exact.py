"""Exact models: a token has the same bits sampled, scored and trained.

On a CPU every Llama-like model in float32 is one. On a GPU a model is made one: its decode steps, prompts and training forward then call the
same kernels, each row of which is computed as if it were alone (`layer_on_gpu`), where they otherwise call what is fastest for their sizes.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fastppo.model.packed import lm_head
from fastppo.model.parts import EXACT, is_exact, parts_of, why_not_parts
from fastppo.model.parts_trunk import trunk_of
from fastppo.ops.rms_norm import MAX_TRITON_WIDTH


def make_exact(model: PreTrainedModel) -> None:
    """From now on a token of this prepared model has the same bits sampled, scored and trained. To be called before it is sampled from.

    Raises ValueError where it cannot: a model that is not built as Llama is, adapters, a narrow type on a CPU.
    """
    if is_exact(model):
        return
    reason = _why_not(model)
    if reason is None:
        EXACT.add(model)
        if trunk_of(model) is None:
            EXACT.discard(model)
            reason = "our kernels give other numbers than its modules"
    if reason is not None:
        raise ValueError(f"exact is True, expected False for {type(model).__name__}: {reason}")


def _why_not(model: PreTrainedModel) -> str | None:
    parts = parts_of(model)
    return None if parts is not None and parts.backend == "cpu" else why_not_on_gpu(model)


def why_not_on_gpu(model: PreTrainedModel) -> str | None:
    """Why a model cannot be exact on a GPU, as far as its modules and the shapes of its parameters tell; None where it can."""
    parts = parts_of(model)
    if parts is None:
        return why_not_parts(model)
    head, width = lm_head(model), parts.embedding.shape[1]
    if parts.has_adapters:
        return "it has adapters, which are trained by its modules on a GPU"
    if head.softcap is not None or head.logit_scale != 1:
        return "its head caps or scales its logits"
    if head.weight.dtype != parts.embedding.dtype or not head.weight.is_contiguous():
        return "its head is not a contiguous tensor of the trunk's type"
    if width > MAX_TRITON_WIDTH:
        return f"its hidden states have {width} elements, more than {MAX_TRITON_WIDTH}"
    return None
