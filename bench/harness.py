"""Measures a case: checks every provider against the fp64 reference, then times the right ones in turn.

Providers take turns (A B, B A, A B ...), so that a slow minute of the machine falls on all of them alike. A turn is as
many calls as fill a few milliseconds: one call of a fast op after a slow one would time how the other left the caches of
instructions and the sleeping threads. Each call gets the next of several copies of the inputs, together larger than the
last-level cache, so the data always come from memory. A ratio is one of medians.

On a GPU a turn is the replay of a CUDA graph of its calls, where they can be captured: what the kernels take, with the host out of the
way. What a call takes that is launched from Python is noted beside it.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from fastppo.bench import clock, floors
from fastppo.bench.floors import Ceilings, Work
from fastppo.bench.peers import EAGER, OURS

Tensors = dict[str, Tensor]
Provider = Callable[[Tensors], Tensors]

ALL = "all"  # the case and the provider of a row that stands for every one
MAX_INPUT_BYTES = 1 << 30
MOST_CAPTURED_SECONDS = 0.1  # of one call: a graph of more launches takes longer to make than to replay
LEAST_TURNS = 2
LEAST_COMPARED_TURNS = 3  # of ours and of the baseline, whose ratio is the promise
REFERENCE_TENSORS = 7  # as large as a case's largest one, in fp64: what a reference and its gradients hold at a time
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
# Largest error, in units of max(|exact|, rms of exact), that rounding explains. One that is wrong misses it by far.
ALLOWED_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class WrongResult(Exception):
    """A provider's outputs are not the reference's."""

    def __init__(self, reason: str, error: float | None = None):
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True)
class Target:
    """What is promised of a case: at least so many times the baseline's speed, such shares of what the machine copies and multiplies a second;
    at most such a share of the baseline's peak memory, so many seconds a call, so many bytes beyond inputs and outputs."""

    speedup: float | None = None
    memory_share: float | None = None
    copy_share: float | None = None
    flop_share: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


def compare_tensors(inputs: Tensors, outputs: Tensors, exact: Tensors, leeway: float = 1.0) -> float:
    """Largest error of any output, in units of max(|exact|, rms of exact); WrongResult where it is not rounding, or `leeway` times that."""
    if outputs.keys() != exact.keys():
        raise WrongResult(f"returns {', '.join(outputs)}, expected {', '.join(exact)}")
    return max(relative_error(name, outputs[name], exact[name], leeway) for name in exact)


def relative_error(name: str, output: Tensor, exact: Tensor, leeway: float = 1.0) -> float:
    if output.shape != exact.shape:
        raise WrongResult(f"{name} has shape {list(output.shape)}, expected {list(exact.shape)}")
    scale = exact.abs().clamp_min(max(exact.square().mean().sqrt().item(), 1e-30))
    error, allowed = ((output.double() - exact).abs() / scale).max().item(), leeway * ALLOWED_ERROR[output.dtype]
    if not error <= allowed:  # NaN is wrong too
        raise WrongResult(f"{name} is off by {error:.2g} of its size, allowed {allowed:g}", error)
    return error


@dataclass(frozen=True)
class Case:
    """One row of the promise: an op at one size, and who computes it.

    `inputs(generator)` makes one set of tensors, on the default device; `exact` is a provider that gets them in fp64 and gives the truth;
    `compare(inputs, outputs, exact)` returns the largest error or raises WrongResult.
    """

    op: str
    name: str
    inputs: Callable[[torch.Generator], Tensors]
    providers: Mapping[str, Provider]
    exact: Provider
    work: Work | None = None
    """What cannot be avoided; None where the baseline alone is the measure."""
    compare: Callable[[Tensors, Tensors, Tensors], float] = compare_tensors
    per: str | None = None
    """Output that counts what a call made: times, and `work`, are for one of those."""
    seconds: str | None = None
    """Output that tells how long the part of a call took that counts, where it is not the whole."""
    rounds: int | None = None
    """Instead of the schedule's, for cases whose calls take seconds."""
    baseline: str = EAGER
    """The provider that speed-ups and memory shares are over."""
    imports: Callable[[], object] = lambda: None
    """Imports what its providers would when they are first called."""
    prepare: Mapping[str, Provider] = field(default_factory=dict)
    """What a provider makes of an input set before its calls on it are timed; joins the set."""
    largest: int = 0
    """Elements of the largest tensor that an ordinary provider makes; says beforehand whether the case fits the memory."""
    dtype: str = "fp32"
    """Of the matrix products, to compare with the machine's rate for it."""
    phase_flops: Mapping[str, int] | None = None
    """Of each phase of a call, what cannot be avoided."""
    unchecked: tuple[str, ...] = ()
    """Providers that are not compared with the truth, where that takes long: its own code in another type, what another case compares, the longer
    sizes of a curve."""
    peaks: bool = False
    """Whether its memory is measured on a CPU too, where that takes a process for each provider."""

    @property
    def needs_truth(self) -> bool:
        return not self.providers.keys() <= set(self.unchecked)


@dataclass(frozen=True)
class Schedule:
    """At least `rounds` turns of every provider; cheap cases go on, for `seconds` or ten times as many rounds.

    A turn is one call, or as many as take `turn_seconds`. A provider whose turns have taken `provider_seconds` needs but a few. Where
    eager's first call took as long, it has had the first of them when it was checked; of others a first call imports, compiles or builds.
    """

    rounds: int
    seconds: float = 0.0
    turn_seconds: float = 0.0
    provider_seconds: float = math.inf

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
    status: str  # "ok", "wrong" (not timed), "raised" or "skipped" (too large for this machine)
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
    graph: bool = False  # whether a turn is the replay of a CUDA graph
    called_s: float | None = None  # a call launched from Python, on a GPU
    flop_share: float | None = None
    target_copy_share: float | None = None
    target_flop_share: float | None = None
    target_s: float | None = None
    target_peak_bytes: int | None = None
    axis: str | None = None  # of a scaling curve: the name of the number that grows,
    length: int | None = None  # and how large it is
    baseline: str = EAGER  # the provider that speed-up and memory share are over
    phase_s: dict[str, float] | None = None  # median of each phase, where the provider tells
    phase_flops: dict[str, int] | None = None

    @property
    def goals(self) -> list[tuple[float | None, float | None, bool]]:
        """(reached or None, target, whether more is better) of every target that the row has."""
        pairs = [
            (self.speedup, self.target_speedup, True),
            (self.copy_share, self.target_copy_share, True),
            (self.flop_share, self.target_flop_share, True),
            (self.median_s, self.target_s, False),
            (self.memory_share, self.target_memory_share, False),
            (self.peak_bytes, self.target_peak_bytes, False),
        ]
        return [pair for pair in pairs if pair[1] is not None]

    @property
    def has_target(self) -> bool:
        return bool(self.goals)

    @property
    def target_met(self) -> bool | None:
        """None without a target. A target that was not measured is not met."""
        if not self.has_target:
            return None
        return all(
            reached is not None and (reached >= target if more else reached <= target)
            for reached, target, more in self.goals
        )


def make_inputs(case: Case, device: torch.device) -> Tensors:
    """An input set of a case on `device`, always the same; leaves that need a gradient keep that wish."""
    generator = torch.Generator(device).manual_seed(0)
    with device:
        return {name: moved(x, device) for name, x in case.inputs(generator).items()}


def prepared(case: Case, provider: str, inputs: Tensors) -> Tensors:
    return inputs | case.prepare[provider](inputs) if provider in case.prepare else inputs


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return x.detach().to(device, dtype).requires_grad_(x.requires_grad)


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def in_fp64(inputs: Tensors) -> Tensors:
    return {name: moved(x, x.device, torch.float64) if x.is_floating_point() else x for name, x in inputs.items()}


def input_sets(case: Case, device: torch.device, schedule: Schedule) -> list[Tensors]:
    """As many copies of an input set as exceed twice the cache, so that one read again comes from memory; at most one a call."""
    first = make_inputs(case, device)
    size = max(1, sum(x.numel() * x.element_size() for x in first.values()))
    count = min(math.ceil(2 * floors.cache_bytes(device) / size), max(1, MAX_INPUT_BYTES // size))
    if not schedule.turn_seconds:
        count = min(count, schedule.most_rounds * len(case.providers))
    return [first, *({name: copied(x) for name, x in first.items()} for _ in range(1, count))]


class Call(NamedTuple):
    """What one call took, how many pieces it made, and the seconds of its phases where its provider has `phases`, those of its last call."""

    seconds: float
    pieces: int
    phases: Mapping[str, float] | None = None


def check_provider(case: Case, provider: str, inputs: Tensors, exact: Tensors) -> tuple[Row, Call | None]:
    """A row with the provider's error, or with the reason why it is not timed; the call that was checked."""
    row, call = Row(case.op, case.name, provider, "ok", baseline=case.baseline), None
    try:
        inputs = prepared(case, provider, inputs)
        started = perf_counter()
        outputs = case.providers[provider](inputs)
        seconds = float(outputs[case.seconds]) if case.seconds else perf_counter() - started
        call = Call(seconds, pieces_of(case, outputs), phases_of(case.providers[provider]))
        row.error = None if provider in case.unchecked else case.compare(inputs, outputs, exact)
    except WrongResult as wrong:
        row.status, row.reason, row.error = "wrong", str(wrong), wrong.error
    except Exception as error:
        note_failure(row, error)
    return row, call


def pieces_of(case: Case, outputs: Tensors) -> int:
    return int(outputs[case.per]) if case.per else 1


def phases_of(provider: Provider) -> Mapping[str, float] | None:
    return getattr(provider, "phases", None)


def median_phases(calls: list[Mapping[str, float]]) -> dict[str, float] | None:
    return {phase: statistics.median(call[phase] for call in calls) for phase in calls[0]} if calls else None


def note_failure(row: Row, error: Exception) -> None:
    row.status = "skipped" if isinstance(error, OUT_OF_MEMORY) else "raised"
    row.reason = describe(error)


def describe(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def does_not_fit(case: Case, device: torch.device) -> str | None:
    """Why a case is not even tried on a CPU, where who asks for too much is killed; a GPU's allocator says it by itself."""
    need, free = REFERENCE_TENSORS * torch.float64.itemsize * case.largest, psutil.virtual_memory().available
    if device.type != "cpu" or need <= free:
        return None
    return f"needs about {need / 1e9:.1f} GB with its fp64 reference, {free / 1e9:.1f} GB are free"


class Player:
    """A provider that takes turns on the input sets of a case."""

    def __init__(self, case: Case, name: str, sets: list[Tensors], device: torch.device, schedule: Schedule) -> None:
        self._case, self._run, self._device, self._schedule = case, case.providers[name], device, schedule
        self._sets = [prepared(case, name, inputs) for inputs in sets]
        self._calls: int | None = None  # the first turn is one call, which tells how many make a turn
        self._replay: Callable[[], None] | None = None
        self.called_s: float | None = None
        self.phases: list[Mapping[str, float]] = []
        if device.type == "cuda":
            self._rehearse(capturable=name not in case.prepare and case.per is None)

    def _call(self, first: int, calls: int) -> Call:
        """Calls on the input sets from the `first` on; what they made and, where they tell it, the seconds that count."""
        pieces, told = 0, 0.0
        for call in range(first, first + calls):
            outputs = self._run(self._sets[call % len(self._sets)])
            pieces += pieces_of(self._case, outputs)
            if phases := phases_of(self._run):
                self.phases.append(phases)
            told += float(outputs[self._case.seconds]) if self._case.seconds else 0.0
            del outputs
        return Call(told, pieces)

    def _time(self, first: int, calls: int) -> float:
        """Seconds a call, or a piece."""
        made: list[Call] = []
        seconds = clock.seconds(lambda: made.append(self._call(first, calls)), self._device)
        return (made[0].seconds if self._case.seconds else seconds) / made[0].pieces

    def _rehearse(self, capturable: bool) -> None:
        """Times calls from Python, and captures as many as make a turn, each input set as often as the others."""
        once = self._time(0, 1)
        calls = 1 if self._case.per else self._schedule.calls_a_turn(once)
        self._calls = math.ceil(calls / len(self._sets)) * len(self._sets) if calls > 1 else 1
        self.called_s = self._time(0, self._calls) if self._calls > 1 else once
        if capturable and once <= MOST_CAPTURED_SECONDS:
            self._replay = clock.capture(lambda: self._call(0, self._calls), self._device)

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def turn(self, first: int) -> tuple[float, int]:
        """(seconds a call or a piece, calls) of a turn that starts with input set `first`."""
        if self._replay is not None:
            return clock.seconds(self._replay, self._device) / self._calls, self._calls
        calls = self._calls or 1
        seconds = self._time(first, calls)
        if self._calls is None:
            self._calls = 1 if self._case.per else self._schedule.calls_a_turn(seconds)
        return seconds, calls


def take_turns(
    case: Case,
    rows: Mapping[str, Row],
    had: Mapping[str, Call],
    sets: list[Tensors],
    device: torch.device,
    schedule: Schedule,
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds a call, of every turn of every right provider; `had` are turns before. One that raises gets its reason and leaves the turns."""
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if row.status == "ok"}
    players: dict[str, Player] = {}
    spent = dict.fromkeys(seconds, 0.0)
    for name, call in had.items():
        seconds[name].append(call.seconds / call.pieces)
        spent[name] = call.seconds
    calls, done, started = 0, 0, perf_counter()
    while seconds and schedule.goes_on(done, perf_counter() - started):
        for name in list(seconds) if done % 2 == 0 else list(reversed(seconds)):
            least = case.rounds or (LEAST_COMPARED_TURNS if name in (OURS, case.baseline) else LEAST_TURNS)
            if spent[name] > schedule.provider_seconds and len(seconds[name]) >= least:
                continue
            begun = perf_counter()
            try:
                if name not in players:
                    players[name] = Player(case, name, sets, device, schedule)
                a_call, made = players[name].turn(calls)
                seconds[name].append(a_call)
                rows[name].called_s, rows[name].graph = players[name].called_s, players[name].captured
                calls += made
            except Exception as error:
                note_failure(rows[name], error)
                del seconds[name]
            spent[name] += perf_counter() - begun
        done += 1
        tick()
    for name, player in players.items():
        first = [had[name].phases] if name in had and had[name].phases else []
        rows[name].phase_s = median_phases(first + player.phases)
    return seconds


def fill_times(row: Row, case: Case, seconds: list[float], ceilings: Ceilings) -> None:
    row.rounds = len(seconds)
    row.median_s = statistics.median(seconds)
    row.p20_s, row.p80_s = percentile(seconds, 0.2), percentile(seconds, 0.8)
    row.phase_flops = dict(case.phase_flops) if case.phase_flops else None
    if case.work is None:
        return
    row.floor_bytes, row.floor_flops = case.work
    row.gb_per_s = case.work.bytes / row.median_s / 1e9
    row.gflop_per_s = case.work.flops / row.median_s / 1e9 if case.work.flops else None
    row.copy_share = case.work.bytes / row.median_s / ceilings.copy_bandwidth
    if case.work.flops and case.dtype in ceilings.matmul_rates:
        row.flop_share = case.work.flops / row.median_s / ceilings.matmul_rates[case.dtype]


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def times_the_speed(row: Row, other: Row) -> float:
    """Of `other`; where only one of the two could be captured in a graph, that of calls from Python."""
    alike = row.graph == other.graph
    return other.median_s / row.median_s if alike else other.called_s / row.called_s


def fill_ratios(rows: Mapping[str, Row], target: Target | None = None) -> None:
    """Speed-up and memory share over the baseline, where both are right and measured; the target goes to our own row."""
    for name, row in rows.items():
        baseline = rows.get(row.baseline)
        if baseline is None or name == row.baseline:
            continue
        if row.median_s and baseline.median_s:
            row.speedup = times_the_speed(row, baseline)
        if row.peak_bytes is not None and baseline.peak_bytes:
            row.memory_share = row.peak_bytes / baseline.peak_bytes
    if OURS in rows and target is not None:
        ours = rows[OURS]
        ours.target_speedup, ours.target_memory_share = target.speedup, target.memory_share
        ours.target_copy_share, ours.target_flop_share = target.copy_share, target.flop_share
        ours.target_s, ours.target_peak_bytes = target.seconds, target.peak_bytes


def settle(device: torch.device) -> None:
    """Frees what nobody holds; on a GPU also what the allocator keeps, which a graph's own memory could not use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    case: Case, device: torch.device, schedule: Schedule, ceilings: Ceilings, tick: Callable[[], None] = lambda: None
) -> dict[str, Row]:
    """Checks and times every provider of `case`; one row each, memory and ratios not yet filled in."""
    if case.rounds is not None:
        schedule = Schedule(min(case.rounds, schedule.rounds), provider_seconds=schedule.provider_seconds)
    settle(device)
    reason = does_not_fit(case, device)
    rows = {name: Row(case.op, case.name, name, "skipped", reason, baseline=case.baseline) for name in case.providers}
    if any(row.reason for row in rows.values()):
        return rows
    try:
        sets = input_sets(case, device, schedule)
        exact = case.exact(in_fp64(sets[0])) if case.needs_truth else {}
    except Exception as error:
        for row in rows.values():
            note_failure(row, error)
            row.reason = f"the inputs or the reference failed: {row.reason}"
        return rows
    checked = {name: check_provider(case, name, sets[0], exact) for name in case.providers}
    rows = {name: row for name, (row, _) in checked.items()}
    had = {name: call for name, (row, call) in checked.items() if name == EAGER and row.status == "ok"}
    had = {name: call for name, call in had.items() if call.seconds > schedule.provider_seconds}
    del exact
    settle(device)
    gc.disable()  # no collection inside a timed call
    try:
        seconds = take_turns(case, rows, had, sets, device, schedule, tick)
    finally:
        gc.enable()
    for name, times in seconds.items():
        fill_times(rows[name], case, times, ceilings)
    return rows
