"""The pictures of a record: roofline, speed-ups, memory against tokens, scaling against length, where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastppo.bench import scaling
from fastppo.bench.harness import Row
from fastppo.bench.peers import COMPILED, EAGER, OURS, SEPARATE
from fastppo.bench.record import Record
from fastppo.bench.report import kernels
from fastppo.bench.scaling import Curve

# One colour a provider in every picture: ours stands out, plain PyTorch is grey.
COLOURS = {
    OURS: "#d1495b",
    SEPARATE: "#e8a3ac",
    EAGER: "#8d99ae",
    COMPILED: "#30638e",
    "trl": "#edae49",
    "liger": "#00798c",
    "cce": "#66a182",
    "verl": "#a05195",
    "flash-attn": "#5f4b8b",
    "flashinfer": "#b07d62",
}
OTHER = "#333333"
PHASE_COLOURS = {"sampling": "#7fa8c9", "scoring": "#edae49", "update": "#8d99ae"}
FLOOR = "floor"
LEAST_NAMED = 0.06  # of a panel's width: what is narrower has no room for its seconds
DPI = 130
COLUMNS = 4
CASE_GAP = 0.6  # between the bars of two cases, in bars
LEGEND = {"loc": "outside lower center", "frameon": False}


def draw(record: Record, folder: Path) -> list[Path]:
    """Writes <device>-<picture>.png for each picture that the record has rows for; ImportError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, picture) in PICTURES.items():
        figure = Figure(layout="constrained")
        picture(record, figure)
        if figure.axes:
            figure.suptitle(f"{title}\n{subtitle(record)}", fontsize=9)
            written.append(folder / f"{record.machine.device}-{name}.png")
            figure.savefig(written[-1], dpi=DPI, facecolor="white")
    return written


def require_matplotlib() -> None:
    if not find_spec("matplotlib"):
        raise ImportError("drawing needs matplotlib: pip install fastppo[plot]")


def subtitle(record: Record) -> str:
    machine = record.machine
    torch_version = f", torch {record.versions['torch']}" if "torch" in record.versions else ""
    return f"{kernels(machine, machine.isa)}{torch_version}, {record.date[:10]}"


def right(rows: Iterable[Row]) -> list[Row]:
    """Of what is compared with eager."""
    return [row for row in rows if row.status == "ok" and row.baseline == EAGER]


def titles(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Op and case of the rows, each once."""
    return list(dict.fromkeys((row.op, row.case) for row in rows))


def colour(provider: str) -> str:
    return COLOURS.get(provider, OTHER)


def plain(axes: Any, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)


def name_cases(axes: Any, cases: Sequence[tuple[str, str]]) -> None:
    """The cases from top to bottom on the vertical axis."""
    labels = [f"{op}\n{case}" for op, case in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=7)
    axes.set_ylim(len(cases) - 0.4, -0.6)


def legend(figure: Any, providers: Iterable[str]) -> None:
    """One entry a provider, below the picture."""
    from matplotlib.lines import Line2D

    found = set(providers)
    shown = [name for name in COLOURS if name in found] + sorted(found - COLOURS.keys())
    handles = [Line2D([], [], marker="o", linestyle="", color=colour(name), label=name) for name in shown]
    figure.legend(handles=handles, ncols=len(handles), fontsize=8, **LEGEND)


def roofline(record: Record, figure: Any) -> None:
    """What moves memory against the copy bandwidth; matrix products under the roofs of copying and multiplying."""
    rows = right(record.rows)
    movers, products = ([row for row in rows if bool(row.floor_flops) is flops] for flops in (False, True))
    panels = [(draw, some) for draw, some in ((draw_movers, movers), (draw_products, products)) if some]
    if not panels:
        return
    figure.set_size_inches(6.4 * len(panels), max(4.4, 0.42 * len(titles(movers)) + 1.4))
    for column, (panel, some) in enumerate(panels, start=1):
        panel(figure.add_subplot(1, len(panels), column), some, record)
    legend(figure, (row.provider for row in rows))


def draw_movers(axes: Any, rows: list[Row], record: Record) -> None:
    cases = titles(rows)
    for row in sorted(rows, key=lambda row: row.provider == OURS):  # ours on top
        axes.plot(row.gb_per_s, cases.index((row.op, row.case)), "o", color=colour(row.provider), markersize=7)
    roof = record.machine.copy_bandwidth / 1e9
    axes.axvline(roof, color=OTHER, linewidth=1.2)
    axes.text(roof, -0.65, f"copy {roof:.3g} GB/s", ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    plain(axes)
    name_cases(axes, cases)
    axes.set_xlabel("GB/s that the op cannot avoid", fontsize=9)


def draw_products(axes: Any, rows: list[Row], record: Record) -> None:
    intensity = {(row.op, row.case): row.floor_flops / row.floor_bytes for row in rows}
    low, high = min(1.0, *intensity.values()) / 6, max(intensity.values()) * 4
    copy = record.machine.copy_bandwidth
    for dtype, rate in record.machine.matmul_rates.items():
        xs = (low, rate / copy, max(high, rate / copy))
        axes.plot(xs, [min(rate, x * copy) / 1e9 for x in xs], color=OTHER, linewidth=1.2)
        axes.text(xs[-1], rate / 1e9, f"matmul {dtype}, {rate / 1e9:.3g} GFLOP/s ", ha="right", va="bottom", fontsize=8)
    if record.machine.matmul_rates:
        middle = (low * min(record.machine.matmul_rates.values()) / copy) ** 0.5
        axes.text(middle, middle * copy / 1e9, f"copy {copy / 1e9:.3g} GB/s  ", ha="right", va="bottom", fontsize=8)
    for row in sorted(rows, key=lambda row: row.provider == OURS):
        axes.plot(intensity[row.op, row.case], row.gflop_per_s, "o", color=colour(row.provider), markersize=7)
    for op in dict.fromkeys(row.op for row in rows):
        x, y = min((intensity[row.op, row.case], row.gflop_per_s) for row in rows if row.op == op)
        axes.annotate(op, (x, y), (0, -12), textcoords="offset points", fontsize=7, ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes)
    axes.set_xlabel("flops a byte that the op cannot avoid", fontsize=9)
    axes.set_ylabel("GFLOP/s", fontsize=9)


def speedup(record: Record, figure: Any) -> None:
    """Times eager's speed, of everyone who is not eager; the fastest of a case on top."""
    rows = [row for row in right(record.rows) if row.speedup]
    cases = titles(rows)
    if not cases:
        return
    figure.set_size_inches(8.2, 0.19 * len(rows) + 0.11 * len(cases) + 1.3)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    top, middles = 0.0, []
    for case in cases:
        bars = sorted((row for row in rows if (row.op, row.case) == case), key=lambda row: -row.speedup)
        for index, row in enumerate(bars):
            draw_bar(axes, row, top + index)
        middles.append(top + (len(bars) - 1) / 2)
        top += len(bars) + CASE_GAP
    axes.axvline(1, color=COLOURS[EAGER], linewidth=1.5)
    axes.set_xlim(0.4 * min(row.speedup for row in rows), 2 * max(1, *(row.speedup for row in rows)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    plain(axes, grid="x")
    axes.set_yticks(middles, [f"{op}  {case}" for op, case in cases], fontsize=7)
    axes.set_ylim(top - CASE_GAP, -1)
    axes.set_xlabel("times the speed of eager PyTorch", fontsize=9)
    legend(figure, (row.provider for row in rows))


def draw_bar(axes: Any, row: Row, y: float) -> None:
    """From 1, which is eager's speed, to what was reached."""
    axes.barh(y, row.speedup - 1, left=1, height=0.86, color=colour(row.provider))
    weight = "bold" if row.provider == OURS else "normal"
    side = "left" if row.speedup >= 1 else "right"
    axes.text(row.speedup, y, f" {row.speedup:.3g}x ", ha=side, va="center", fontsize=7, fontweight=weight)


def memory(record: Record, figure: Any) -> None:
    """Peak memory beyond inputs and outputs against tokens: the fused head and eager's."""
    found = [curve for curve in scaling.curves(record.scaling) if any(row.peak_bytes for row in curve.rows)]
    tokens = [curve for curve in found if curve.axis == "N"]
    if not tokens:
        return
    figure.set_size_inches(6, 4)
    axes = figure.add_subplot()
    for curve in tokens:
        rows = [row for row in curve.rows if row.peak_bytes]
        places = [row.length for row in rows], [row.peak_bytes / 1e6 for row in rows]
        axes.plot(*places, "o-", color=colour(curve.provider), linewidth=2)
        label = f"  {curve.provider}\n  {places[1][-1]:.0f} MB"
        axes.text(places[0][-1], places[1][-1], label, color=colour(curve.provider), va="center", fontsize=9)
    axes.set_ylim(0)
    axes.margins(x=0.16)
    plain(axes)
    case = tokens[0].rows[-1].case.partition(", ")[2]
    axes.set_xlabel(f"tokens ({tokens[0].op}, {case})", fontsize=9)
    axes.set_ylabel("peak memory, MB", fontsize=9)


def scaling_curves(record: Record, figure: Any) -> None:
    """Time against length, a panel for each op and number that grows, with the exponent that fits."""
    panels: dict[tuple[str, str], list[Curve]] = {}
    for curve in scaling.curves(record.scaling):
        panels.setdefault((curve.op, curve.axis), []).append(curve)
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(3.1 * columns, 2.5 * rows + 0.5)
    for place, ((op, axis), curves) in enumerate(panels.items(), start=1):
        draw_curves(figure.add_subplot(rows, columns, place), op, axis, curves)
    legend(figure, (curve.provider for curves in panels.values() for curve in curves))


def draw_curves(axes: Any, op: str, axis: str, curves: list[Curve]) -> None:
    for line, curve in enumerate(curves):
        lengths, times = zip(*((row.length, row.median_s * 1e3) for row in curve.rows), strict=True)
        axes.loglog(lengths, times, "o-", color=colour(curve.provider), linewidth=1.8, markersize=4)
        if curve.exponent is not None:
            style = {"fontsize": 8, "color": colour(curve.provider), "transform": axes.transAxes}
            axes.text(0.05, 0.9 - 0.1 * line, f"{axis}^{curve.exponent:.2f}", **style)
    plain(axes)
    lengths = sorted({row.length for curve in curves for row in curve.rows})
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the exponents
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(op, fontsize=9)
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel("ms", fontsize=8)


def phases(record: Record, figure: Any) -> None:
    """Seconds of each phase of a step, a panel for each case: of every provider, and what the products of the tokens that differ would take
    at the speed of one large product."""
    rows = [row for row in record.rows if row.status == "ok" and row.phase_s]
    cases = titles(rows)
    if not cases:
        return
    bars = [phase_bars([row for row in rows if (row.op, row.case) == case], record) for case in cases]
    counts = [len(some) + CASE_GAP for some in bars]
    figure.set_size_inches(8.2, 0.34 * sum(counts) + 0.6 * len(cases) + 0.9)
    panels = figure.subplots(len(cases), squeeze=False, height_ratios=counts)[:, 0]
    for axes, (op, case), some in zip(panels, cases, bars, strict=True):
        draw_phases(axes, some)
        axes.set_title(f"{op} {case}", fontsize=8, loc="left")
    panels[-1].set_xlabel("seconds", fontsize=9)
    names = list(dict.fromkeys(phase for some in bars for _, seconds in some for phase in seconds))
    handles = [panels[0].barh(0, 0, color=phase_colour(name), label=name) for name in names]
    figure.legend(handles=handles, ncols=len(handles), fontsize=8, **LEGEND)


def phase_bars(rows: list[Row], record: Record) -> list[tuple[str, dict[str, float]]]:
    """(name, seconds of each phase) from top to bottom: the slowest first, ours and the floor last."""
    rows = sorted(rows, key=lambda row: (row.provider == OURS, -row.median_s))
    bars = [(row.provider, row.phase_s) for row in rows]
    rate, flops = record.machine.matmul_rates.get("fp32"), rows[0].phase_flops
    return [*bars, (FLOOR, {phase: count / rate for phase, count in flops.items()})] if rate and flops else bars


def draw_phases(axes: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    widest = max(sum(seconds.values()) for _, seconds in bars)
    for place, (name, seconds) in enumerate(bars):
        left = 0.0
        for phase, width in seconds.items():
            alpha = 0.55 if name == FLOOR else 1.0
            axes.barh(place, width, left=left, height=0.8, color=phase_colour(phase), alpha=alpha, edgecolor="white")
            if width >= LEAST_NAMED * widest:
                axes.text(left + width / 2, place, f"{width:.2g}", ha="center", va="center", fontsize=7)
            left += width
        axes.text(
            left, place, f" {left:.3g} s", va="center", fontsize=8, fontweight="bold" if name == OURS else "normal"
        )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * widest)
    plain(axes, grid="x")


def phase_colour(phase: str) -> str:
    return PHASE_COLOURS.get(phase, OTHER)


def short(length: int) -> str:
    return f"{length / 1e6:.1f}M" if length >= 1e6 else f"{length / 1e3:.3g}k" if length >= 1e4 else str(length)


PICTURES: dict[str, tuple[str, Callable[[Record, Any], None]]] = {
    "roofline": ("How near to what the machine can", roofline),
    "speedup": ("Speed-up over eager PyTorch", speedup),
    "memory": ("Peak memory of the head, beyond inputs and gradients", memory),
    "scaling": ("Time against length, and the power of it that fits", scaling_curves),
    "phases": (
        "Where a step's time goes; floor: products of the tokens that differ, as fast as one large product",
        phases,
    ),
}
