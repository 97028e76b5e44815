"""Conversations on one model: turns of many sequences side by side, tokens given between them, branches of their past."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from fastppo.model.packed import lm_head
from fastppo.ops import _checks
from fastppo.rollout.generation import Generation
from fastppo.rollout.model_runner import ModelRunner
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sequences import Sequence, Turn
from fastppo.rollout.stats import GenerationStats


class Session:
    """What `Engine.open` gives: sequences whose turns are sampled side by side, while others wait for what comes next.

        with engine.open(sampling) as session:
            session.add(prompt_ids, n=4)
            for turn in session:  # as they end
                reply = environment(turn)
                session.append(turn.id, reply) if reply else session.close(turn.id)
            rollout = session.rollout()

    A sequence's draws come from the seed, its number and their position, so what the others do changes nothing. Between two turns it keeps
    its pages of the cache while there is room; where they were needed, its past is run again. The model may be used otherwise between
    two turns, but its weights stay as they are. A session belongs to one thread at a time.

    `stats` tells what was done so far.
    """

    def __init__(
        self, generation: Generation, runner: ModelRunner, encode: Callable[[Any], list[int]], lent: ExitStack
    ) -> None:
        """encode: checks a prompt and makes token ids of it. lent: gives back what the generation uses."""
        self._generation, self._runner, self._encode, self._lent = generation, runner, encode, lent
        self._vocab_size = len(lm_head(runner.model).weight)
        self._weights = _versions(runner.model)
        self._untold: deque[Turn] = deque()  # that ended, and that the caller has not been given
        self._over = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over = True
        self._lent.close()

    @property
    def stats(self) -> GenerationStats:
        return self._generation.stats

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self._generation.max_length

    @property
    def busy(self) -> bool:
        """Whether a turn is under way, or has ended and the caller has not been given it."""
        return bool(self._untold) or self._generation.busy

    def add(self, prompt: Many[int] | str, n: int | None = None, *, streams: Many[int] | None = None) -> list[int]:
        """The numbers of `n` (by default `sampling.n`) new sequences, which share what is computed of the prompt and get their first turn.

        streams: [n] numbers that their draws come from instead of their own: what a sequence says then does not depend on when it was added.

        Raises as `Engine.generate` does for a prompt.
        """
        self._require_open()
        n = self._generation.sampling.n if n is None else _checks.integer_number("n", n, at_least=1)
        tokens, most = self._encode(prompt), self.max_length - 1
        if len(tokens) > most:
            raise ValueError(f"prompt has {len(tokens)} tokens, expected at most {most}: one new token needs a place")
        if streams is not None:
            streams = [_checks.integer_number(f"streams[{i}]", stream) for i, stream in enumerate(streams)]
            if len(streams) != n:
                raise ValueError(f"streams has {len(streams)} numbers, expected {n}, one for each new sequence")
        return [sequence.id for sequence in self._generation.add(tokens, n, "prompt", streams)]

    def append(self, id: int, tokens: Many[int], *, max_new_tokens: int | None = None) -> None:
        """Give tokens (what a tool or a person answered) to a sequence whose turn has ended, and it the next turn.

        max_new_tokens: of this turn, where it may have fewer than `sampling` says.

        With no tokens it goes on where it ended, say at `max_new_tokens`. Raises ValueError where its turn has not ended, where its logits
        were not finite, for an id outside the vocabulary, and where no room is left for one new token.
        """
        most_new = self._generation.sampling.max_new_tokens
        if max_new_tokens is not None:
            most_new = _checks.integer_number("max_new_tokens", max_new_tokens, at_least=1, at_most=most_new)
        sequence = self._resting(id)
        given = self._given(sequence, tokens)
        if sequence.finish_reason == FinishReason.ERROR:
            raise ValueError(f"sequence {id} ended because its logits were not finite, expected one that can go on")
        self._generation.append(sequence, given, most_new)

    def fork(self, id: int) -> int:
        """The number of a new sequence with the same past as one whose turn has ended, be it closed. `append` gives it its next turn.

        It shares the full pages of that past. Raises ValueError where the turn has not ended.
        """
        return self._generation.fork(self._ended(id)).id

    def close(self, id: int, tokens: Many[int] = ()) -> None:
        """No turn of the sequence will follow: its pages are free. `tokens` (the last answer of a tool) end it.

        Raises ValueError where its turn has not ended, and as `append` for tokens.
        """
        sequence = self._resting(id)
        self._generation.close(sequence, self._given(sequence, tokens) if len(tokens) else [])

    def step(self) -> list[Turn]:
        """One step of all turns under way; those that ended with it."""
        with self._sampling():
            if not self._untold and self._generation.busy:
                self._untold.extend(self._generation.advance())
        ended = list(self._untold)
        self._untold.clear()
        return ended

    def __iter__(self) -> Iterator[Turn]:
        """Turns as they end, also those that begin meanwhile, until none is under way."""
        while self.busy:
            if not self._untold:
                with self._sampling():
                    while self._generation.busy and not self._untold:
                        self._untold.extend(self._generation.advance())
            if self._untold:
                yield self._untold.popleft()

    def rollout(self) -> Rollout:
        """All sequences by their numbers, closed or not; those of one `add` have one `prompt_index`, and so have their forks.

        Raises ValueError while a turn is under way or where there is no sequence.
        """
        sequences = self._generation.sequences
        if not sequences:
            raise ValueError("the session has no sequence, expected one: session.add(prompt)")
        if open_turns := [sequence.id for sequence in sequences if sequence.finish_reason is None]:
            raise ValueError(f"the turn of sequence {open_turns[0]} is under way, expected it to have ended")
        return self._generation.pack()

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        self._require_open()
        if self._weights != _versions(self._runner.model):
            raise RuntimeError(
                "the model's weights have changed since the session was opened, expected them to stay: its cache was computed with the old ones"
            )
        with self._runner.alone():
            yield

    def _require_open(self) -> None:
        if self._over:
            raise ValueError("the session is over, expected one whose block has not been left")

    def _ended(self, id: int) -> Sequence:
        """The sequence of that number, whose turn has ended."""
        self._require_open()
        sequences = self._generation.sequences
        if not isinstance(id, int) or not 0 <= id < len(sequences):
            raise ValueError(f"id is {id!r}, expected the number of a sequence (there are {len(sequences)})")
        if sequences[id].finish_reason is None:
            raise ValueError(f"the turn of sequence {id} is under way, expected it to have ended")
        return sequences[id]

    def _resting(self, id: int) -> Sequence:
        sequence = self._ended(id)
        if sequence.closed:
            raise ValueError(f"sequence {id} is closed, expected an open one")
        return sequence

    def _given(self, sequence: Sequence, tokens: Many[int]) -> list[int]:
        """Token ids that the vocabulary has and the sequence has room for."""
        top = self._vocab_size - 1
        given = [_checks.integer_number(f"tokens[{i}]", token, at_most=top) for i, token in enumerate(tokens)]
        length, most = len(sequence.tokens) + len(given), self.max_length - 1
        if length > most:
            raise ValueError(
                f"sequence {sequence.id} would have {length} tokens with those given, expected at most {most}: one new token needs a place"
            )
        return given


def _versions(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Where each parameter lies, and how often it was written to in place."""
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
