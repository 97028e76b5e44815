"""The pictures of examples/control.py: an episode as a film, and the returns of runs as curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def film(policy: Callable[[np.ndarray], np.ndarray], env: str, folder: Path, frames: int = 8) -> None:
    """An episode as episode.gif, and so many of its frames side by side as episode.png. The policy gives actions for observations [1, D]."""
    with closing(gym.make(env, render_mode="rgb_array")) as one:
        observation, _ = one.reset(seed=0)
        pictures, ended = [one.render()], False
        while not ended:
            observation, _, terminated, truncated, _ = one.step(policy(observation[None])[0])
            pictures.append(one.render())
            ended = terminated or truncated
    shown = [Image.fromarray(picture) for picture in pictures[::2]]
    duration = round(2000 / one.metadata["render_fps"])  # ms
    shown[0].save(folder / "episode.gif", save_all=True, append_images=shown[1:], duration=duration, loop=0)
    chosen = [pictures[round(i)] for i in np.linspace(0, len(pictures) - 1, frames)]
    Image.fromarray(np.hstack(chosen)).reduce(2).save(folder / "episode.png")


Curve = list[float | None]


def averaged(returns: Sequence[tuple[int, float]], total_steps: int, points: int = 50) -> Curve:
    """The mean return of the episodes that ended in each of so many equal parts of the run; None where none did."""
    parts: list[list[float]] = [[] for _ in range(points)]
    for steps, value in returns:
        parts[math.ceil(steps * points / total_steps) - 1].append(value)
    return [round(float(np.mean(part)), 2) if part else None for part in parts]


class Panel(NamedTuple):
    title: str
    total_steps: int
    curves: dict[str, list[Curve]]
    """Those of all runs of a label."""
    goal: float | None = None


def save_curves(panels: Sequence[Panel], path: Path) -> None:
    """Three in a row, for each label the mean over its runs; the band is from the worst run to the best."""
    columns, rows = min(len(panels), 3), math.ceil(len(panels) / 3)
    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for label, curves in panel.curves.items():
            found = np.ma.masked_invalid(np.array(curves, float))
            steps = np.linspace(0, panel.total_steps / 1000, found.shape[1] + 1)[1:]
            ended = ~np.ma.getmaskarray(found).all(0)  # environments that end together leave parts without an end
            steps, found = steps[ended], found[:, ended]
            axes.plot(steps, found.mean(0), label=label)
            axes.fill_between(steps, found.min(0), found.max(0), alpha=0.2, linewidth=0)
        if panel.goal is not None:
            axes.axhline(panel.goal, color="grey", linestyle=":", linewidth=1)
        axes.set(title=panel.title, xlabel="thousand steps", ylabel="return of an episode in training")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
