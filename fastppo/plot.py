"""The curves of a run as one picture."""

from __future__ import annotations

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
)


def plot_run(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the metrics of the run folder `run` to `out` (by default its curve.png) and return that path.

    Panels without data are left out. Raises FileNotFoundError when `run` has no metrics, ImportError without matplotlib.
    """
    run = Path(run).expanduser()
    rows = read_metrics(run)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install fastppo[plot]") from error
    panels = [panel for panel in PANELS if any(_points(rows, metric)[0] for metric in panel.lines)]
    if not panels:
        raise ValueError(f"{run} has no metrics to draw yet")
    columns = min(3, len(panels))
    grid = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * grid), layout="constrained")
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(grid, columns, index + 1), panel, rows)
    figure.suptitle(printable(run.resolve().name), parse_math=False)  # `$` in a folder's name is a dollar
    out = run / "curve.png" if out is None else Path(out).expanduser()
    figure.savefig(out, dpi=110)
    return out


def _points(rows: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _draw(axes: Any, panel: Panel, rows: list[dict[str, Any]]) -> None:
    for number, (metric, label) in enumerate(panel.lines.items()):
        steps, values = _points(rows, metric)
        if steps:
            marker = "o" if metric.startswith("eval/") or len(steps) == 1 else None  # one point makes no line
            axes.plot(steps, values, color=f"C{number}", marker=marker, markersize=4, linewidth=1.5, label=label)
        if metric == "objective/scores":
            _band(axes, rows)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    if panel.limits is not None and axes.get_ylim()[0] < panel.limits[0]:
        axes.set_ylim(panel.limits)
        axes.set_ylabel(f"{panel.unit}, cut at {panel.limits[0]:g}")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize="small")


def _band(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One standard deviation around the training reward."""
    both = [
        row for row in rows if row.get("objective/scores") is not None and row.get("objective/scores_std") is not None
    ]
    steps = [row["step"] for row in both]
    low = [row["objective/scores"] - row["objective/scores_std"] for row in both]
    high = [row["objective/scores"] + row["objective/scores_std"] for row in both]
    if steps:
        axes.fill_between(steps, low, high, color="C0", alpha=0.12, linewidth=0, label="± 1 standard deviation")
