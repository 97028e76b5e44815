"""What sampling did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GenerationStats:
    """What a `generate` call or a session did; tokens, seconds, bytes."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    shared_prompt_tokens: int = 0
    """Prompt tokens that a sample did not have to run, because another sample of its prompt had."""
    new_tokens: int = 0
    """Those of prefill, one a sequence, and those of decoding."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_bytes: int = 0
    """Weights once a step, and the keys and values that the step's sequences see."""
    slots: int = 0
    """Most sequences side by side."""
    pages: int = 0
    peak_pages: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / max(self.decode_seconds, 1e-9)

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that held a sequence, over the decode steps."""
        return self.decode_tokens / max(self.decode_steps * self.slots, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all of the call's time so far, prefill included."""
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def shared_prompt_share(self) -> float:
        """Of the prompt tokens of all started sequences, those that were not run again."""
        return self.shared_prompt_tokens / max(self.shared_prompt_tokens + self.prefill_tokens, 1)

    @property
    def decode_bytes_per_second(self) -> float:
        """To be set against the memory bandwidth: that is what bounds decoding."""
        return self.decode_bytes / max(self.decode_seconds, 1e-9)
