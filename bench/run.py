"""Carries out a plan: every case of the ops in turn, with its peaks, ratios and targets, under a progress bar."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastppo.bench import floors, memory, peers, record, scaling, targets
from fastppo.bench.catalog import load_cases
from fastppo.bench.floors import Ceilings
from fastppo.bench.harness import ALL, Case, Row, Schedule, describe, fill_ratios, make_inputs, measure, prepared
from fastppo.bench.setting import Setting

SECONDS = 0.5  # that a case's rounds take at least
TURN_SECONDS = 0.005  # of calls in a provider's turn
# That a provider's turns on a case may take: a GPU is lent for minutes, and some calls take seconds.
PROVIDER_SECONDS = {"cpu": 2.0, "cuda": 4.0}


@dataclass(frozen=True)
class Plan:
    """What to measure. `against` names the providers beside ours, None all; `targets` is None where none apply."""

    ops: tuple[str, ...]
    setting: Setting
    rounds: int
    against: tuple[str, ...] | None = None
    targets: targets.Targets | None = None
    scaling: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.setting.device)

    @property
    def schedule(self) -> Schedule:
        if self.setting.quick:
            return Schedule(self.rounds)
        return Schedule(self.rounds, SECONDS, TURN_SECONDS, PROVIDER_SECONDS[self.setting.device])

    @property
    def scaling_schedule(self) -> Schedule:
        return Schedule(min(self.rounds, scaling.ROUNDS), 0.0, TURN_SECONDS, scaling.PROVIDER_SECONDS)


@dataclass(frozen=True)
class Job:
    """A case, and how another process finds it again: as number `index` of its op's cases in `setting`; of a curve, its place there."""

    case: Case
    setting: Setting
    index: int
    axis: str | None = None
    length: int | None = None


def jobs(plan: Plan) -> Iterator[Job | Row]:
    """Every case; a row with the reason for an op whose cases do not load."""
    for op in plan.ops:
        try:
            cases = load_cases(op, plan.setting)
        except Exception as error:
            yield Row(op, ALL, ALL, "raised", f"its cases do not load: {describe(error)}")
            continue
        for index, case in enumerate(cases):
            if case.baseline != peers.EAGER and plan.against is not None and case.baseline not in plan.against:
                continue  # ours alone would say nothing
            yield Job(narrowed(case, plan.setting.quick, plan.against), plan.setting, index)
        for point in scaling.points(op, plan.setting.device) if plan.scaling else ():
            yield Job(point.case, point.setting, 0, point.axis, point.length)


def narrowed(case: Case, quick: bool, against: tuple[str, ...] | None) -> Case:
    """With the providers that are asked for; nothing is learned from compiling a quick case that no one asked for."""
    if against is None:
        kept = {name for name in case.providers if name != peers.COMPILED or not quick}
    else:
        kept = {*peers.OWN, *against}
    return replace(case, providers={name: run for name, run in case.providers.items() if name in kept})


def run(plan: Plan, console: Console) -> record.Record:
    """Measures what the plan asks for."""
    if plan.against is None and (left := peers.left_out(plan.setting.device)):
        console.print(f"installed, but with nothing for a {plan.setting.device} device: {', '.join(left)}")
    if "drop_in" in plan.ops and (absent := peers.absent()):
        console.print(f"not installed, so left out of drop_in: {', '.join(absent)}")
    todo, rows = list(jobs(plan)), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        memory.PeakProcess() as peaks,
        imports_left_alone(),
    ):
        bar = progress.add_task("ceilings", total=len(todo) * plan.rounds)
        dtypes = sorted(
            {job.case.dtype for job in todo if isinstance(job, Job) and job.case.work and job.case.work.flops}
        )
        ceilings = floors.ceilings(plan.device, plan.rounds, dtypes)
        for done, job in enumerate(todo):
            if isinstance(job, Row):
                rows.append(job)
                continue
            rows += measure_job(job, plan, ceilings, peaks, ticker(progress, bar, job.case, done, plan.rounds))
            progress.update(bar, completed=(done + 1) * plan.rounds)
    return record.Record(
        machine=record.this_machine(plan.device, floors.cache_bytes(plan.device), ceilings),
        versions=record.package_versions(),
        revision=record.git_revision(),
        date=record.now(),
        quick=plan.setting.quick,
        rounds=plan.rounds,
        rows=[row for row in rows if row.axis is None],
        scaling=[row for row in rows if row.axis],
    )


@contextmanager
def imports_left_alone() -> Iterator[None]:
    """The collections between cases do not look through the half a million objects that imports have made."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def ticker(progress: Progress, bar: int, case: Case, done: int, rounds: int) -> Callable[[], None]:
    """Advances the bar by one round, at most by the rounds of its case."""
    progress.update(bar, description=f"{case.op} {case.name}")
    limit = (done + 1) * rounds

    def tick() -> None:
        progress.update(bar, completed=min(limit, progress.tasks[0].completed + 1))

    return tick


def measure_job(
    job: Job, plan: Plan, ceilings: Ceilings, peaks: memory.PeakProcess, tick: Callable[[], None]
) -> list[Row]:
    rows = measure(job.case, plan.device, plan.scaling_schedule if job.axis else plan.schedule, ceilings, tick)
    right = [row for row in rows.values() if row.status == "ok"]
    if plan.device.type == "cuda":
        fill_cuda_peaks(right, job.case, plan.device)
    elif right and job.case.peaks and not plan.setting.quick:
        fill_cpu_peaks(right, job, peaks)
    found = plan.targets.of(job.case.op, job.case.name) if plan.targets and not job.axis else None
    fill_ratios(rows, found)
    for row in rows.values():
        row.axis, row.length = job.axis, job.length
    return list(rows.values())


def fill_cuda_peaks(rows: list[Row], case: Case, device: torch.device) -> None:
    for row in rows:
        try:
            inputs = prepared(case, row.provider, make_inputs(case, device))
            row.peak_bytes = memory.cuda_peak(case.providers[row.provider], inputs)
        except torch.OutOfMemoryError as error:
            row.peak_reason = describe(error)


def fill_cpu_peaks(rows: list[Row], job: Job, process: memory.PeakProcess) -> None:
    try:
        peaks = process.measure(job.case.op, job.setting, job.index, [row.provider for row in rows])
    except memory.CannotMeasure as error:
        peaks = dict.fromkeys((row.provider for row in rows), str(error))
    for row in rows:
        peak = peaks[row.provider]
        row.peak_bytes, row.peak_reason = (None, peak) if isinstance(peak, str) else (peak, None)
