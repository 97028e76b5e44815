"""A run as one HTML file that needs nothing else: findings, curves, settings, and the logged samples with the numbers of every token.

`report.html` is the page and `report.js` what moves on it. The run's data stand in the page as JSON in which no `<` is left, and the script
sets them as text only; the page's own policy forbids every other script and whatever would be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastppo.doctor import examine
from fastppo.plot import PANELS
from fastppo.run_folder import differences, read_history, read_metrics, read_samples, read_settings

MOST_SAMPLE_BYTES = 24_000_000
"""Of samples in a report; where a run has more, whole steps are left out evenly. A browser opens it without a wait."""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (by default its report.html) and return that path; also of a run that is under way.

    Raises FileNotFoundError when `run` has no metrics, ValueError when a line of its records is damaged.
    """
    run = Path(run).expanduser()
    page = render(collect(run))
    out = run / "report.html" if out is None else Path(out).expanduser()
    out.write_text(page, encoding="ascii")
    return out


def render(data: Mapping[str, Any]) -> str:
    """The page, in ASCII, of what `collect` gives."""
    script = files("fastppo").joinpath("report.js").read_text(encoding="utf-8")
    page = files("fastppo").joinpath("report.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"@SCRIPT_HASH@": f"sha256-{digest}", "@SCRIPT@": script, "@DATA@": _as_json(data)}
    for place, text in parts.items():  # the data last: what stands in them is never taken for a place
        page = page.replace(place, text, 1)
    return page


def _as_json(data: Mapping[str, Any]) -> str:
    """In ASCII, without a `<` that could end the element it stands in. What JSON has no word for is text; half a character, which can end
    a browser, is a replacement character."""
    text = json.dumps(data, default=str, skipkeys=True, ensure_ascii=False)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(json.loads(text, parse_constant=str), separators=(",", ":")).replace("<", "\\u003c")


def collect(run: Path) -> dict[str, Any]:
    """What the report of a run folder shows."""
    rows, settings, samples = read_metrics(run), read_settings(run), read_samples(run)
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    if not names:
        raise ValueError(f"{run} has no metrics to show yet")
    shown = thin_out([_sample(row) for row in samples], MOST_SAMPLE_BYTES)
    diagnosis = examine(rows, settings)
    return {
        "name": run.resolve().name,
        "state": _state(rows, settings),
        "steps": [row["step"] for row in rows],
        "metrics": {name: [_number(row.get(name)) for row in rows] for name in names},
        "panels": [panel._asdict() | {"lines": list(panel.lines.items())} for panel in PANELS],
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "settings": settings,
        "history": _history(run),
        "samples": shown,
        "samples_written": len(samples),
    }


def thin_out(samples: Sequence[Mapping[str, Any]], most_bytes: int) -> list[Mapping[str, Any]]:
    """The samples of every k-th step, counted from the last, with the smallest k that keeps their JSON within `most_bytes`."""
    sizes: dict[int, int] = {}
    for sample in samples:
        sizes[sample["step"]] = sizes.get(sample["step"], 0) + len(json.dumps(sample, default=str))
    steps = sorted(sizes, reverse=True)
    every = 1
    while sum(sizes[step] for step in steps[::every]) > most_bytes and every < len(steps):
        every += 1
    kept = set(steps[::every])
    return [sample for sample in samples if sample["step"] in kept]


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that the page relies on, whatever an older or damaged row lacks."""
    lists = {
        name: row[name] for name in ("tokens", "logprobs", "advantages", "values") if isinstance(row.get(name), list)
    }
    rewards = row.get("rewards")
    return {
        "step": row["step"],
        "prompt": row.get("prompt", ""),
        "completion": str(row.get("completion", "")),
        "score": _number(row.get("score")),
        "rewards": {name: _number(score) for name, score in (rewards if isinstance(rewards, Mapping) else {}).items()},
        "ended": row.get("ended"),
        "tokens": [str(text) for text in lists.pop("tokens", [])],
        **{name: [_number(value) for value in values] for name, values in lists.items()},
    }


def _state(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None) -> str:
    last, total = rows[-1]["step"], (settings or {}).get("total_steps")
    model = (settings or {}).get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    of = f" of {total}" if total is not None else ""
    return f"step {last}{of}" + (f", {name}" if name else "")


def _history(run: Path) -> list[dict[str, Any]]:
    """Every start and resume, with the settings that it changed."""
    try:
        rows = read_history(run)
    except ValueError:  # a damaged line of it costs these lines alone
        return []
    found, before = [], None
    for row in rows:
        now = row.get("settings")
        both = isinstance(before, Mapping) and isinstance(now, Mapping)
        found.append(
            {"step": row["step"], "time": row.get("time"), "changes": differences(before, now) if both else []}
        )
        before = now
    return found


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None
