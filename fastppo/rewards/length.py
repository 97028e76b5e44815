"""A penalty for completions that come near the longest length."""

from __future__ import annotations

from typing import Any


def soft_overlong(
    completion_ids: list, *, max_completion_len: int, soft_punish_cache: int, **columns: Any
) -> list[float]:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, equation 13), of completions in tokens.

    With L = `max_completion_len` and C = `soft_punish_cache`: 0 up to L - C tokens, from there down to -1 at L on a straight line,
    (L - C - length) / C, and -1 beyond. L is usually `rollout.max_new_tokens`.

    Raises ValueError unless 1 <= C <= L, both integers.
    """
    for name, value in (("max_completion_len", max_completion_len), ("soft_punish_cache", soft_punish_cache)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
    if soft_punish_cache > max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}, expected at most max_completion_len = {max_completion_len}"
        )
    free = max_completion_len - soft_punish_cache
    return [max(-1.0, min(0.0, (free - len(ids)) / soft_punish_cache)) for ids in completion_ids]
