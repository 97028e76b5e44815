"""The curves of a run, or of several over each other, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastppo.console import printable
from fastppo.run_folder import read_metrics


class Panel(NamedTuple):
    title: str
    unit: str
    lines: dict[str, str]  # metric -> label
    limits: tuple[float, float] | None = None  # for outliers below: a critic's first steps must not flatten all others


PANELS = (
    Panel("Reward", "score", {"objective/scores": "training", "eval/scores": "held out"}),
    Panel("Loss", "nats a token", {"loss/nll": "training", "eval/nll": "held out"}),
    Panel("KL to the reference", "nats a completion", {"objective/kl": "KL"}),
    Panel("KL of an update", "nats a token", {"policy/approxkl_avg": "approximate KL", "policy/kl": "KL"}),
    Panel("Entropy", "nats a token", {"policy/entropy_avg": "entropy"}),
    Panel("Completion length", "tokens", {"completions/mean_length": "training", "eval/mean_length": "held out"}),
    Panel(
        "Clipped",
        "share",
        {
            "policy/clipfrac_avg": "ratios clipped",
            "val/clipfrac_avg": "values clipped",
            "completions/clipped_ratio": "completions cut off",
        },
    ),
    Panel("Policy loss", "loss", {"loss/policy_avg": "policy loss"}),
    Panel("Value loss", "loss", {"loss/value_avg": "value loss"}),
    Panel("Critic", "explained variance", {"val/explained_var": "explained variance"}, limits=(-1.0, 1.05)),
    Panel(
        "Sampling against training",
        "share of the tokens",
        {"rollout/out_of_band_rate": "log-prob differs", "rollout/out_of_clip_rate": "outside the clip range"},
    ),
    Panel(
        "Time of a step",
        "seconds",
        {
            "time/rollout": "rollout",
            "time/reward": "reward",
            "time/score": "score",
            "time/update": "update",
            "time/search": "search",
        },
    ),
)
STYLES = ("-", "--", ":", "-.", (0, (1, 4)))


def plot_run(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the metrics of the run folder `run` to `out` (by default its curve.png) and return that path.

    Panels without data are left out. Raises FileNotFoundError when `run` has no metrics, ValueError for an `out` that is named as no picture,
    ImportError without matplotlib.
    """
    run = Path(run).expanduser()
    rows = read_metrics(run)
    figure, panels = _figure([rows], str(run))
    for axes, panel in panels:
        _draw(axes, panel, rows)
    figure.suptitle(_name(run), parse_math=False)  # `$` in a folder's name is a dollar
    return _save(figure, run / "curve.png" if out is None else out)


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the metrics of several run folders over each other, a colour each, to `out`, and return that path.

    Metrics that share a panel differ in their line. Raises what `plot_run` does, ValueError where a run is given twice.
    """
    runs = [Path(run).expanduser() for run in runs]
    for run in runs:
        if sum(other.resolve() == run.resolve() for other in runs) > 1:
            raise ValueError(f"run {run} is given twice")
    found = [read_metrics(run) for run in runs]
    figure, panels = _figure(found, ", ".join(map(str, runs)))
    for axes, panel in panels:
        _overlay(axes, panel, found)
    legend = figure.legend(
        [_sample_line(color=f"C{number}") for number in range(len(runs))],
        _names(runs),
        loc="outside upper center",
        ncols=min(4, len(runs)),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(figure, out)


def _names(runs: Sequence[Path]) -> list[str]:
    """Of their folders; where two share one, as they were given."""
    names = [_name(run) for run in runs]
    return names if len(set(names)) == len(names) else [printable(str(run)) for run in runs]


def _name(run: Path) -> str:
    return printable(run.resolve().name)


def _figure(found: Sequence[list[dict[str, Any]]], what: str) -> tuple[Any, list[tuple[Any, Panel]]]:
    """A figure with axes for each panel that one of the runs has data for."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install fastppo[plot]") from error
    rows = [row for run in found for row in run]
    panels = [panel for panel in PANELS if any(_points(rows, metric)[0] for metric in panel.lines)]
    if not panels:
        raise ValueError(f"{what} has no metrics to draw yet")
    columns = min(3, len(panels))
    grid = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * grid), layout="constrained")
    return figure, [(figure.add_subplot(grid, columns, index + 1), panel) for index, panel in enumerate(panels)]


def _save(figure: Any, out: str | Path) -> Path:
    out, kinds = Path(out).expanduser(), figure.canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"out is {str(out)!r}, expected a name with one of the endings .{', .'.join(sorted(kinds))}")
    figure.savefig(out, dpi=110)
    return out


def _sample_line(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _points(rows: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[metric]) for row in rows if _is_number(row.get(metric))]
    return [step for step, _ in found], [value for _, value in found]


def _is_number(value: Any) -> bool:
    """Damaged rows hold other things."""
    return isinstance(value, int | float)


def _draw(axes: Any, panel: Panel, rows: list[dict[str, Any]]) -> None:
    for number, (metric, label) in enumerate(panel.lines.items()):
        steps, values = _points(rows, metric)
        if steps:
            axes.plot(steps, values, color=f"C{number}", label=label, **_line_of(metric, steps))
        if metric == "objective/scores":
            _band(axes, rows)
    _dress(axes, panel)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize="small")


def _overlay(axes: Any, panel: Panel, found: Sequence[list[dict[str, Any]]]) -> None:
    styles: dict[str, Any] = {}
    for number, (metric, label) in enumerate(panel.lines.items()):
        for run, rows in enumerate(found):
            steps, values = _points(rows, metric)
            if steps:
                styles[label] = STYLES[number]
                axes.plot(steps, values, color=f"C{run}", linestyle=styles[label], **_line_of(metric, steps))
    _dress(axes, panel)
    if len(styles) > 1:
        lines = [_sample_line(color="grey", linestyle=style) for style in styles.values()]
        axes.legend(lines, list(styles), frameon=False, fontsize="small")


def _line_of(metric: str, steps: list[int]) -> dict[str, Any]:
    marker = "o" if metric.startswith("eval/") or len(steps) == 1 else None  # one point makes no line
    return {"marker": marker, "markersize": 4, "linewidth": 1.5}


def _dress(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    if panel.limits is not None and axes.get_ylim()[0] < panel.limits[0]:
        axes.set_ylim(panel.limits)
        axes.set_ylabel(f"{panel.unit}, cut at {panel.limits[0]:g}")


def _band(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One standard deviation around the training reward."""
    both = [
        row for row in rows if _is_number(row.get("objective/scores")) and _is_number(row.get("objective/scores_std"))
    ]
    steps = [row["step"] for row in both]
    low = [row["objective/scores"] - row["objective/scores_std"] for row in both]
    high = [row["objective/scores"] + row["objective/scores_std"] for row in both]
    if steps:
        axes.fill_between(steps, low, high, color="C0", alpha=0.12, linewidth=0, label="± 1 standard deviation")
