"""Memory that has run out: how it is told from other errors, and how the work is cut into smaller parts that give the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from fastppo.errors import TrainingError
from fastppo.plan import Lengths, Plan, split_again, tokens_of

if TYPE_CHECKING:
    from fastppo.distributed import Ranks
    from fastppo.rollout import Engine

Found = TypeVar("Found")
# What PyTorch's allocator of the CPU and cuBLAS say in a RuntimeError without a type of its own.
WORDS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, the CPU's, or that of our kernels' threads."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def sample_within_memory(
    attempt: Callable[[], Found], engine: Engine, count: int, note: Callable[[str], None], *, together: bool = False
) -> Found:
    """`count` sequences that `attempt` samples with the engine: from the first again, half as many side by side, each time that memory runs out.
    The engine keeps to that. Raises TrainingError where one sequence stands alone already, and at once where other ranks sample `together` with
    this one: they are in the middle of a step."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
        _give_back()
        before = min(engine.max_batch_size, count)
        if together:
            raise TrainingError(
                f"memory ran out while {before} sequences were sampled side by side ({reason}): rollout.batch_size is {engine.max_batch_size}, "
                "expected less; with distributed.tensor_parallel a run does not go on with fewer by itself"
            )
        if before == 1:
            raise TrainingError(
                f"memory ran out while one sequence alone was sampled ({reason}): shorter ones (rollout.max_new_tokens, data.max_prompt_tokens) need "
                "less"
            )
        engine.max_batch_size = before // 2
        note(
            f"memory ran out while {before} sequences were sampled side by side ({reason}): they are sampled again, at most {before // 2} at a time "
            f"from here on; rollout.batch_size={before // 2} would spare the failed attempt"
        )


def _give_back() -> None:
    """What is held and not used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TokenBudget:
    """Most tokens that run together: what the settings say, and half of what was too much after each time that memory ran out.

    Args:
        setting: `learner.tokens_per_microbatch`.
        note: hears a sentence each time.
        ranks: where memory runs out on one of them, all cut smaller.
    """

    def __init__(self, setting: int, note: Callable[[str], None], ranks: Ranks) -> None:
        self.setting, self.tokens, self._note, self._ranks = setting, setting, note, ranks

    def fit(
        self, attempt: Callable[[Plan], Found], plan: Plan, lengths: Lengths, undo: Callable[[], None]
    ) -> tuple[Found, Plan]:
        """What `attempt` makes of the plan, and the plan that it was made with: the same minibatches, in smaller micro-batches each time that
        memory ran out. `undo` takes back what a failed attempt has left.

        Raises TrainingError where every sequence stands alone already, and memory runs out for one of them.
        """
        while True:
            try:
                with self._ranks.together("work within the token budget"):
                    found = attempt(plan)
                return found, plan
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())
            # Here, where the error no longer holds what was computed.
            undo()
            _give_back()
            plan = self._smaller(plan, lengths, reason)

    def once(self, attempt: Callable[[Plan], Found], plan: Plan) -> Found:
        """What `attempt` makes of the plan. Raises TrainingError where memory runs out."""
        try:
            with self._ranks.together("work within the token budget"):
                return attempt(plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"memory ran out ({' '.join(str(error).split())}): learner.tokens_per_microbatch is {self.tokens}, expected less; with "
                "distributed.sharding full it takes torch 2.13 to go on with smaller micro-batches"
            ) from error

    def _smaller(self, plan: Plan, lengths: Lengths, reason: str) -> Plan:
        batches = [batch for epoch in plan for minibatch in epoch for batch in minibatch]
        largest = max(tokens_of(batch, lengths) for batch in batches)
        if all(len(batch) <= 1 for batch in batches):
            raise TrainingError(
                f"memory ran out for one sequence of at most {largest} tokens alone ({reason}): learner.gradient_checkpointing=true, lora.r "
                "or shorter sequences (rollout.max_new_tokens, data.max_prompt_tokens) need less"
            )
        self.tokens = max(1, largest // 2)
        self._note(
            f"memory ran out ({reason}): from here on at most {self.tokens} tokens run together, not {largest}; nothing that is learned changes, "
            f"and learner.tokens_per_microbatch={self.tokens} would spare the failed attempt"
        )
        return split_again(plan, lengths, self.tokens, self._ranks.size)

    def state_dict(self) -> dict[str, int]:
        return {"setting": self.setting, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """A setting that has been changed since counts more than what was found."""
        if state["setting"] == self.setting:
            self.tokens = state["tokens"]
