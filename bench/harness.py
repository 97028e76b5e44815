"""Measures a case: checks every provider against the fp64 reference, then times the right ones in turn.

Providers take turns (A B, B A, A B ...), so that a slow minute of the machine falls on all of them alike. A turn is as
many calls as fill a few milliseconds: one call of a fast op after a slow one would time how the other left the caches of
instructions and the sleeping threads. Each call gets the next of several input sets, together larger than the
last-level cache, so the data always come from memory. A ratio is one of medians.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from fastppo.bench import floors
from fastppo.bench.floors import Work

Tensors = dict[str, Tensor]
Provider = Callable[[Tensors], Tensors]

OURS, EAGER = "fastppo", "eager"
MAX_INPUT_BYTES = 1 << 30
# Largest error, in units of max(|exact|, rms of exact), that rounding explains. One that is wrong misses it by far.
ALLOWED_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class WrongResult(Exception):
    """A provider's outputs are not the reference's."""

    def __init__(self, reason: str, error: float | None = None):
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True)
class Target:
    """What the op promises on this case: times eager's speed, and the largest share of eager's peak memory."""

    speedup: float | None = None
    memory_share: float | None = None


def compare_tensors(inputs: Tensors, outputs: Tensors, exact: Tensors) -> float:
    """Largest error of any output, in units of max(|exact|, rms of exact); WrongResult where it is not rounding."""
    if outputs.keys() != exact.keys():
        raise WrongResult(f"returns {', '.join(outputs)}, expected {', '.join(exact)}")
    return max(relative_error(name, outputs[name], exact[name]) for name in exact)


def relative_error(name: str, output: Tensor, exact: Tensor) -> float:
    if output.shape != exact.shape:
        raise WrongResult(f"{name} has shape {list(output.shape)}, expected {list(exact.shape)}")
    scale = exact.abs().clamp_min(max(exact.square().mean().sqrt().item(), 1e-30))
    error = ((output.double() - exact).abs() / scale).max().item()
    if not error <= ALLOWED_ERROR[output.dtype]:  # NaN is wrong too
        raise WrongResult(f"{name} is off by {error:.2g} of its size, allowed {ALLOWED_ERROR[output.dtype]:g}", error)
    return error


@dataclass(frozen=True)
class Case:
    """One row of the promise: an op at one size, and who computes it.

    `inputs(generator)` makes one set of CPU tensors; `exact` is a provider that gets them in fp64 and gives the truth;
    `compare(inputs, outputs, exact)` returns the largest error or raises WrongResult.
    """

    op: str
    name: str
    inputs: Callable[[torch.Generator], Tensors]
    providers: Mapping[str, Provider]
    exact: Provider
    work: Work
    target: Target = field(default_factory=Target)
    compare: Callable[[Tensors, Tensors, Tensors], float] = compare_tensors
    per: str | None = None
    """Output that counts what a call made: times, and `work`, are for one of those."""
    rounds: int | None = None
    """Instead of the schedule's, for cases whose calls take seconds."""


@dataclass(frozen=True)
class Schedule:
    """At least `rounds` turns of every provider; cheap cases go on, for `seconds` or ten times as many rounds.

    A turn is one call, or as many as take `turn_seconds`.
    """

    rounds: int
    seconds: float = 0.0
    turn_seconds: float = 0.0

    @property
    def most_rounds(self) -> int:
        return 10 * self.rounds if self.seconds else self.rounds

    def calls_a_turn(self, seconds_a_call: float) -> int:
        return max(1, math.ceil(self.turn_seconds / max(seconds_a_call, 1e-6)))

    def goes_on(self, done: int, elapsed: float) -> bool:
        return done < self.rounds or (done < self.most_rounds and elapsed < self.seconds)


@dataclass
class Row:
    """One provider on one case. Seconds, bytes and flops; what was not measured is None."""

    op: str
    case: str
    provider: str
    status: str  # "ok", "wrong" (not timed) or "raised"
    reason: str | None = None
    error: float | None = None
    rounds: int = 0
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    floor_bytes: int | None = None
    floor_flops: int | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    copy_share: float | None = None
    speedup: float | None = None
    target_speedup: float | None = None
    peak_bytes: int | None = None
    peak_reason: str | None = None
    memory_share: float | None = None
    target_memory_share: float | None = None

    @property
    def has_target(self) -> bool:
        return self.target_speedup is not None or self.target_memory_share is not None

    @property
    def target_met(self) -> bool | None:
        """None without a target. A target that was not measured is not met."""
        if not self.has_target:
            return None
        speed = self.target_speedup is None or (self.speedup or 0.0) >= self.target_speedup
        memory = self.target_memory_share is None or (
            self.memory_share is not None and self.memory_share <= self.target_memory_share
        )
        return speed and memory


def make_inputs(case: Case, device: torch.device, index: int = 0) -> Tensors:
    """Input set `index` of a case on `device`; leaves that need a gradient keep that wish."""
    generator = torch.Generator().manual_seed(index)
    return {name: moved(x, device) for name, x in case.inputs(generator).items()}


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(device, dtype).requires_grad_(x.requires_grad)


def in_fp64(inputs: Tensors) -> Tensors:
    return {name: moved(x, x.device, torch.float64) if x.is_floating_point() else x for name, x in inputs.items()}


def input_sets(case: Case, device: torch.device, schedule: Schedule) -> list[Tensors]:
    """As many input sets as exceed twice the cache, so that a set read again comes from memory; at most one a call."""
    first = make_inputs(case, device)
    size = max(1, sum(x.numel() * x.element_size() for x in first.values()))
    count = min(math.ceil(2 * floors.cache_bytes(device) / size), max(1, MAX_INPUT_BYTES // size))
    if not schedule.turn_seconds:
        count = min(count, schedule.most_rounds * len(case.providers))
    return [first, *(make_inputs(case, device, index) for index in range(1, count))]


def check_provider(case: Case, provider: str, inputs: Tensors, exact: Tensors) -> Row:
    """A row with the provider's error, or with the reason why it is not timed."""
    row = Row(case.op, case.name, provider, "ok")
    try:
        row.error = case.compare(inputs, case.providers[provider](inputs), exact)
    except WrongResult as wrong:
        row.status, row.reason, row.error = "wrong", str(wrong), wrong.error
    except Exception as error:
        row.status, row.reason = "raised", describe(error)
    return row


def describe(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def time_turn(case: Case, provider: str, sets: list[Tensors], first: int, calls: int, device: torch.device) -> float:
    """Seconds a call (or a piece, with `case.per`), over `calls` calls that go through the input sets from the `first` on."""
    run, pieces = case.providers[provider], 0
    floors.synchronize(device)
    start = perf_counter()
    for call in range(first, first + calls):
        outputs = run(sets[call % len(sets)])
        pieces += int(outputs[case.per]) if case.per else 1
        del outputs
    floors.synchronize(device)
    return (perf_counter() - start) / pieces


def take_turns(
    case: Case,
    rows: Mapping[str, Row],
    sets: list[Tensors],
    device: torch.device,
    schedule: Schedule,
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds a call, of every turn of every right provider; one that raises gets its reason and leaves the turns."""
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if row.status == "ok"}
    calls_a_turn: dict[str, int] = {}  # each provider's first turn is one call, which tells how many make a turn
    calls, done, started = 0, 0, perf_counter()
    while seconds and schedule.goes_on(done, perf_counter() - started):
        order = list(seconds) if done % 2 == 0 else list(reversed(seconds))
        for name in order:
            turn = calls_a_turn.get(name, 1)
            try:
                seconds[name].append(time_turn(case, name, sets, calls, turn, device))
                calls_a_turn.setdefault(name, 1 if case.per else schedule.calls_a_turn(seconds[name][0]))
            except Exception as error:
                rows[name].status, rows[name].reason = "raised", describe(error)
                del seconds[name]
            calls += turn
        done += 1
        tick()
    return seconds


def fill_times(row: Row, case: Case, seconds: list[float], copy_bandwidth: float) -> None:
    row.rounds = len(seconds)
    row.median_s = statistics.median(seconds)
    row.p20_s, row.p80_s = percentile(seconds, 0.2), percentile(seconds, 0.8)
    row.floor_bytes, row.floor_flops = case.work
    row.gb_per_s = case.work.bytes / row.median_s / 1e9
    row.gflop_per_s = case.work.flops / row.median_s / 1e9 if case.work.flops else None
    row.copy_share = case.work.bytes / row.median_s / copy_bandwidth


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def fill_ratios(rows: Mapping[str, Row], target: Target) -> None:
    """Speed-up and memory share over eager, where both are right and measured; the target goes to our own row."""
    eager = rows.get(EAGER)
    for name, row in rows.items():
        if name != EAGER and eager is not None and row.median_s and eager.median_s:
            row.speedup = eager.median_s / row.median_s
        if name != EAGER and eager is not None and row.peak_bytes is not None and eager.peak_bytes:
            row.memory_share = row.peak_bytes / eager.peak_bytes
    if OURS in rows:
        rows[OURS].target_speedup, rows[OURS].target_memory_share = target.speedup, target.memory_share


def measure(
    case: Case, device: torch.device, schedule: Schedule, copy_bandwidth: float, tick: Callable[[], None] = lambda: None
) -> dict[str, Row]:
    """Checks and times every provider of `case`; one row each, memory and ratios not yet filled in."""
    if case.rounds is not None:
        schedule = Schedule(min(case.rounds, schedule.rounds))
    try:
        sets = input_sets(case, device, schedule)
        exact = case.exact(in_fp64(sets[0]))
    except Exception as error:
        reason = f"the inputs or the reference failed: {describe(error)}"
        return {name: Row(case.op, case.name, name, "raised", reason) for name in case.providers}
    rows = {name: check_provider(case, name, sets[0], exact) for name in case.providers}
    del exact
    gc.collect()
    gc.disable()  # no collection inside a timed call
    try:
        seconds = take_turns(case, rows, sets, device, schedule, tick)
    finally:
        gc.enable()
    for name, times in seconds.items():
        fill_times(rows[name], case, times, copy_bandwidth)
    return rows
