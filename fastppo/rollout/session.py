"""Conversations on one model: turns of many sequences side by side, tokens given between them, branches of their past."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from fastppo.model.packed import lm_head
from fastppo.ops import _checks
from fastppo.rollout.generation import DRAWING, Generation
from fastppo.rollout.model_runner import ModelRunner
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.sequences import Manner, Sequence, Turn
from fastppo.rollout.stats import GenerationStats

OWN_SETTINGS = {"temperature", "top_k", "top_p", "min_p", "max_new_tokens", "stop_strings", "n"}
"""Of `SamplingParams`, which a sequence may have otherwise than its session (`n` says nothing of one sequence)."""


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
        self,
        generation: Generation,
        runner: ModelRunner,
        encode: Callable[[Any], list[int]],
        manner: Callable[[SamplingParams], Manner],
        lent: ExitStack,
    ) -> None:
        """encode: checks a prompt and makes token ids of it. manner: finds what settings need. lent: gives back what the generation uses."""
        self._generation, self._runner, self._lent = generation, runner, lent
        self._encode, self._make_manner = encode, manner
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

    def add(
        self,
        prompt: Many[int] | str,
        n: int | None = None,
        *,
        streams: Many[int] | None = None,
        sampling: SamplingParams | None = None,
    ) -> list[int]:
        """The numbers of `n` (by default `sampling.n`) new sequences, which share what is computed of the prompt and get their first turn.

        streams: [n] numbers that their draws come from instead of their own: what a sequence says then does not depend on when it was added.
        sampling: how they are sampled, where temperature, filters, `max_new_tokens` or `stop_strings` are not the session's.

        Raises as `Engine.generate` does for a prompt; ValueError for a `sampling` that differs in anything else.
        """
        self._require_open()
        manner = self._manner(sampling, self._generation.usual)
        n = self._generation.usual.sampling.n if n is None else _checks.integer_number("n", n, at_least=1)
        tokens, most = self._encode(prompt), self.max_length - 1
        if len(tokens) > most:
            raise ValueError(f"prompt has {len(tokens)} tokens, expected at most {most}: one new token needs a place")
        if streams is not None:
            streams = [_checks.integer_number(f"streams[{i}]", stream) for i, stream in enumerate(streams)]
            if len(streams) != n:
                raise ValueError(f"streams has {len(streams)} numbers, expected {n}, one for each new sequence")
        return [sequence.id for sequence in self._generation.add(tokens, n, "prompt", streams, manner=manner)]

    def append(
        self,
        id: int,
        tokens: Many[int],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        """Give tokens (what a tool or a person answered) to a sequence whose turn has ended, and it the next turn.

        max_new_tokens: of this turn, where it may have fewer than `sampling` says.
        sampling: how the sequence is sampled from now on, as `add` takes it; by default as before.

        With no tokens it goes on where it ended, say at `max_new_tokens`. Raises ValueError where its turn has not ended, where its logits
        were not finite, for an id outside the vocabulary, and where no room is left for one new token.
        """
        sequence = self._resting(id)
        manner = self._manner(sampling, sequence.manner)
        most_new = manner.sampling.max_new_tokens
        if max_new_tokens is not None:
            most_new = _checks.integer_number("max_new_tokens", max_new_tokens, at_least=1, at_most=most_new)
        given = self._given(sequence, tokens)
        if sequence.finish_reason == FinishReason.ERROR:
            raise ValueError(f"sequence {id} ended because its logits were not finite, expected one that can go on")
        self._generation.append(sequence, given, most_new, manner)

    def fork(self, id: int, *, stream: int | None = None) -> int:
        """The number of a new sequence with the same past as one whose turn has ended, be it closed. `append` gives it its next turn.

        It shares the full pages of that past. stream: as `streams` of `add`. Raises ValueError where the turn has not ended.
        """
        if stream is not None:
            stream = _checks.integer_number("stream", stream)
        return self._generation.fork(self._ended(id), stream).id

    def close(self, id: int, tokens: Many[int] = ()) -> None:
        """No turn of the sequence will follow: its pages are free. `tokens` (the last answer of a tool) end it.

        Raises ValueError where its turn has not ended, and as `append` for tokens.
        """
        sequence = self._resting(id)
        self._generation.close(sequence, self._given(sequence, tokens) if len(tokens) else [])

    def cut(self, id: int) -> None:
        """Let a turn that is under way end with its next token; one that has ended stays as it is."""
        self._require_open()
        sequence = self._known(id)
        if sequence.finish_reason is None:
            self._generation.cut(sequence)

    def logprobs(self, id: int) -> list[float]:
        """Of the tokens of a sequence's last turn, as `Rollout.logprobs` will have them. Raises ValueError where the turn has not ended."""
        return self._generation.logprobs(self._ended(id))

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

        Raises ValueError while a turn is under way, where there is no sequence, and where temperatures or filters differed: one record has one
        temperature.
        """
        sequences = self._generation.sequences
        if not sequences:
            raise ValueError("the session has no sequence, expected one: session.add(prompt)")
        if open_turns := [sequence.id for sequence in sequences if sequence.finish_reason is None]:
            raise ValueError(f"the turn of sequence {open_turns[0]} is under way, expected it to have ended")
        if len(self._generation.drawn_by) > 1:
            raise ValueError("the sequences were sampled at several temperatures or filters, expected one for all")
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

    def _manner(self, sampling: SamplingParams | None, usual: Manner) -> Manner:
        """That of `sampling`; `usual` where it is None. Raises ValueError for what a session has once."""
        if sampling is None:
            return usual
        all_have = self._generation.usual.sampling
        own = OWN_SETTINGS if all_have.min_new_tokens == 0 else OWN_SETTINGS - set(DRAWING)
        for spec in fields(sampling):
            mine, expected = getattr(sampling, spec.name), getattr(all_have, spec.name)
            if spec.name not in own and mine != expected:
                raise ValueError(f"{spec.name} of sampling is {mine!r}, expected the session's {expected!r}")
        return self._make_manner(sampling)

    def _known(self, id: int) -> Sequence:
        sequences = self._generation.sequences
        if not isinstance(id, int) or not 0 <= id < len(sequences):
            raise ValueError(f"id is {id!r}, expected the number of a sequence (there are {len(sequences)})")
        return sequences[id]

    def _ended(self, id: int) -> Sequence:
        """The sequence of that number, whose turn has ended."""
        self._require_open()
        sequence = self._known(id)
        if sequence.finish_reason is None:
            raise ValueError(f"the turn of sequence {id} is under way, expected it to have ended")
        return sequence

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
