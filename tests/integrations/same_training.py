"""A training step of a patched Transformers model beside the model's own, and its own in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.integrations.transformers import patch_model
from tests.rollout.tiny import VOCAB_SIZE, as_transformers_has_it
from tests.tolerance import assert_as_exact_as_model

IDS = torch.randint(1, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[2], [0], [5]]), -100)
Run = Callable[[PreTrainedModel], object]


def exact_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
) -> Tensor:
    """Transformers' loss, which rounds to fp32, in fp64."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows, targets = logits.double().reshape(-1, vocab_size), shift_labels.reshape(-1)
    if num_items_in_batch is None:
        return F.cross_entropy(rows, targets, ignore_index=ignore_index)
    return F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


def loss_and_gradients(model: PreTrainedModel, run: Run) -> tuple[object, list[Tensor | None]]:
    model.zero_grad()
    output = run(model)
    loss = output if isinstance(output, Tensor) else output[0]
    loss.backward()
    return output, [loss.detach(), *(p.grad for p in model.parameters())]


def assert_same_training(
    model: PreTrainedModel,
    run: Run,
    in_fp64: Run | None = None,
    patch: Callable = patch_model,
    attention: str = "eager",
) -> object:
    """Loss and gradients of the patched model by the one error rule; returns its output.

    attention: Transformers' in all of them; "eager" has no fp64 with rows that attend to nothing, as those of padding.
    """
    native, exact, ours = (as_transformers_has_it(model, x) for x in (model.dtype, torch.float64, model.dtype))
    for x in (native, exact, ours):
        x.train(model.training)
        x.set_attn_implementation(attention)
    exact.loss_function = exact_loss
    with patch(ours):
        output, found = loss_and_gradients(ours, run)
    _, native = loss_and_gradients(native, run)
    _, exact = loss_and_gradients(exact, in_fp64 or run)
    assert found[0].dtype == native[0].dtype
    for place, (one, two, three) in enumerate(zip(found, native, exact, strict=True)):
        assert (one is None) == (two is None) == (three is None)
        if one is not None:
            assert_as_exact_as_model(one, two, three.double(), f"gradient {place}" if place else "loss")
    return output


def own_step(**kwargs) -> Run:
    return lambda model: model(input_ids=IDS, **({"labels": LABELS} | kwargs))
