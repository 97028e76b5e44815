"""The next step's completions, sampled in a thread of its own while the learner updates on the last ones (`rollout.staleness`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from fastppo.collection import Collector
from fastppo.data import Row
from fastppo.envs.source import Answers, AnswerSource
from fastppo.model.frozen_copy import FrozenCopy
from fastppo.rollout import SamplingParams

TICK = 0.2  # seconds between looks at a thread that is waited for
Show = Callable[[int, int], None]


class Dropped(Exception):
    """What is sampled ahead is no longer wanted."""


class SamplingAhead:
    """Samples from a copy of the policy that stays as it is while the policy learns: what is sampled depends on the copy's weights and the seed
    alone, never on when that was.

    One step's completions are in hand at a time. No rank meets another in the thread: each samples its share there, and they meet in `take`.

    Args:
        copy: of the policy. source, collector: sample from the copy, and from nothing else. In a `with` block the source is open.
        check: raises what is to end the sampling; called often, in the thread.
    """

    def __init__(
        self, copy: FrozenCopy, source: AnswerSource, collector: Collector, check: Callable[..., None]
    ) -> None:
        self._copy, self._source, self.collector, self._check_run = copy, source, collector, check
        self.version = 0
        """Steps that the copy's weights have learned from."""
        self._thread: _Sampling | None = None
        self._rows: list[Row] = []
        self._overlap = 0.0  # seconds for which sampling went on before anybody waited for it
        self._dropped, self._progress = False, (0, 0)
        device = copy.model.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> SamplingAhead:
        self._source.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.drop()
        finally:
            self._source.__exit__(*exception)

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand."""
        return self._thread is None

    def freeze(self, version: int) -> None:
        """Sample from what the policy is now, after `version` steps, from here on. Nothing may be in hand."""
        self._copy.refresh()
        self.version = version

    def begin(self, rows: list[Row], sampling: SamplingParams) -> None:
        """Begin to sample for these rows, `sampling.n` completions each."""
        self._rows, self._dropped, self._progress = rows, False, (0, 0)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        threads = torch.get_num_threads()
        self._thread = _Sampling(lambda: self._sample(rows, sampling, threads))
        self._thread.start()

    def wait(self, show: Show | None = None) -> None:
        """Until what is in hand has been sampled. show: called with (finished, all) sequences meanwhile. Raises what ended the sampling."""
        thread = self._thread
        if thread is None:
            return
        while thread.is_alive():
            if show is not None:
                show(*self._progress)
            thread.join(TICK)
        if thread.error is not None:
            self._thread = None
            raise thread.error

    def take(self, show: Show | None = None) -> tuple[Answers, list[Row]]:
        """What is in hand, once it is there, of all ranks, and its rows; nothing is in hand then. Raises what ended the sampling."""
        thread, waited_from = self._thread, time.perf_counter()
        self.wait(show)
        self._thread = None
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._overlap += max(0.0, min(thread.ended, waited_from) - thread.began)
        return self.collector.gather(thread.found), self._rows

    def step_metrics(self, step: int) -> dict[str, float]:
        """Of what was taken since the last call, for the step after `step` others."""
        overlap, self._overlap = self._overlap, 0.0
        return {"rollout/staleness": float(step - self.version), "time/overlap": overlap}

    def drop(self) -> None:
        """End the sampling at its next token, and forget it."""
        thread, self._thread, self._dropped = self._thread, None, True
        if thread is not None:
            thread.join()

    def _sample(self, rows: Sequence[Row], sampling: SamplingParams, threads: int) -> Answers | None:
        """This rank's share, on the host: streams of a GPU know nothing of each other's memory."""
        torch.set_num_threads(threads)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            share = self.collector.share(rows, sampling, self._check, progress=self._note_progress)
            return None if share is None else share.to(torch.device("cpu"))

    def _check(self, *ignored: object) -> None:
        if self._dropped:
            raise Dropped
        self._check_run()

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = done, total

    # Checkpoints

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(weights, what JSON can hold) from which a resumed run samples again what is in hand now, bit for bit."""
        return self._copy.state_dict(), {"version": self.version}

    def load_state_dict(self, weights: Mapping[str, Tensor] | None, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on from what `state_dict` returned; where a run without staleness was saved, after `step` steps, from what the policy is now."""
        if weights is None or state is None:
            self.freeze(step)
            return
        self._copy.load_state_dict(weights)
        self.version = state["version"]


class _Sampling(Thread):
    """Calls `work`, and keeps what it returned or raised, and when. A daemon: an environment that hangs holds up no exit."""

    def __init__(self, work: Callable[[], Answers | None]) -> None:
        super().__init__(name="fastppo-sampling", daemon=True)
        self._work = work
        self.found: Answers | None = None
        self.error: BaseException | None = None
        self.began = self.ended = time.perf_counter()

    def run(self) -> None:
        try:
            self.found = self._work()
        except BaseException as error:  # whoever waits for the thread raises it
            self.error = error
        self.ended = time.perf_counter()
