"""Reads the metrics of a run and names what went wrong, with the numbers that show it and the settings to try.

Each rule is a function of the curves and the settings, with its threshold and the reason for it beside it. The thresholds are set to
speak up rarely: a run that learns its task to the end has few exploration left and its policy is far from the reference, and neither is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastppo.run_folder import read_metrics, read_settings

LEAST_STEPS = 5
"""Fewer steps have no beginning and end that could be compared."""

SCORES, SPREAD, ENTROPY = "objective/scores", "objective/scores_std", "policy/entropy_avg"
KL, UPDATE_KL, LENGTH = "objective/kl", "policy/approxkl_avg", "completions/mean_length"
CUT_OFF, EXPLAINED, KEPT = "completions/clipped_ratio", "val/explained_var", "search/kept"


class Finding(NamedTuple):
    """Something that went wrong."""

    name: str
    seen: str
    """The numbers, and in which steps."""
    advice: tuple[str, ...]
    """What to try, the likeliest cure first."""


@dataclass(frozen=True)
class Diagnosis:
    steps: int
    """Training steps that were looked at."""
    findings: list[Finding]
    unjudged: dict[str, str]
    """Name of a rule that could not be applied -> why."""

    def text(self) -> str:
        """For people."""
        lines = [f"{self.steps} step{'s' * (self.steps != 1)} looked at: " + (self._names() or "nothing wrong found")]
        for finding in self.findings:
            lines += ["", f"{finding.name}: {finding.seen}", *(f"  try: {advice}" for advice in finding.advice)]
        if self.unjudged:
            lines += ["", *(f"not judged: {name} ({why})" for name, why in self.unjudged.items())]
        return "\n".join(lines)

    def _names(self) -> str:
        return ", ".join(finding.name for finding in self.findings)


class Curve(NamedTuple):
    """A metric in the steps that have it."""

    steps: list[int]
    values: list[float]

    @property
    def _window(self) -> int:
        """A tenth of the steps, for means that one odd step does not decide."""
        return min(20, max(3, len(self.values) // 10))

    @property
    def first(self) -> float:
        return _mean(self.values[: self._window])

    @property
    def last(self) -> float:
        return _mean(self.values[-self._window :])

    @property
    def last_steps(self) -> str:
        return f"steps {self.steps[-self._window]} to {self.steps[-1]}"


class Evidence:
    """The curves of a run's training steps, and its settings."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None) -> None:
        self.rows = [row for row in rows if row["step"] > 0]
        self._settings = settings or {}

    def curve(self, metric: str) -> Curve:
        found = [(row["step"], row[metric]) for row in self.rows if _is_number(row.get(metric))]
        return Curve([step for step, _ in found], [float(value) for _, value in found])

    def together(self, *metrics: str) -> list[tuple[float, ...]]:
        """Their values in the steps that have all of them."""
        rows = [[row.get(metric) for metric in metrics] for row in self.rows]
        return [tuple(map(float, values)) for values in rows if all(map(_is_number, values))]

    def setting(self, name: str) -> Any:
        """Of "section.key"; None where the settings are unknown or have no such key."""
        section, _, key = name.partition(".")
        values = self._settings.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def suggest(self, name: str, change: str) -> str:
        """Such as "a third of optimizer.lr (now 1e-06)" of the setting's name and "a third of {}"."""
        now = self.setting(name)
        return change.format(name) + ("" if now is None else f" (now {now})")


class Rule(NamedTuple):
    name: str
    needs: tuple[str, ...]
    """The metrics that it is about."""
    judge: Callable[[Evidence], tuple[str, tuple[str, ...]] | None]
    """(what was seen, advice), or None where all is well."""
    of_all_runs: bool = True
    """A run without these metrics is one that should have them."""


ENTROPY_LEFT = 0.1
"""Share of the first steps' entropy under which a policy samples nearly the same text again and again."""


def entropy_collapse(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Entropy may vanish as a task is mastered. It has collapsed where it was given up for less than one standard deviation of the first
    rewards: what the policy has not tried by then it will hardly try any more."""
    entropy, scores = run.curve(ENTROPY), run.curve(SCORES)
    gain, spread = scores.last - scores.first, run.curve(SPREAD).first
    if entropy.last >= ENTROPY_LEFT * entropy.first or gain >= spread:
        return None
    seen = f"entropy fell from {entropy.first:.3g} to {entropy.last:.3g} nats a token ({entropy.last_steps}), "
    seen += f"while the reward went from {scores.first:.3g} to {scores.last:.3g}, "
    seen += f"less than one standard deviation of the first rewards ({spread:.3g})"
    return seen, (
        run.suggest("optimizer.lr", "a third of {}"),
        run.suggest("loss.entropy_coef", "{} of 0.001 to 0.01"),
        run.suggest("loss.clip_high", "a higher {}, such as 0.28, so that unlikely tokens can gain"),
        run.suggest("rollout.samples_per_prompt", "more {}"),
    )


LARGEST_UPDATE = 0.1
"""Nats a token between the policies before and after a step's updates, averaged over its minibatches. PPO's usual targets are 0.01 to 0.05;
beyond 0.1 most ratios are outside the clip range, and the step is no longer the small one that its bound is about."""


def kl_blow_up(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Either each update moves the policy too far, or it drifts from the reference for a penalty that the reward does not make good."""
    update = run.curve(UPDATE_KL)
    lower = run.suggest("optimizer.lr", "a third of {}"), run.suggest("learner.epochs", "fewer {}")
    if update.last > LARGEST_UPDATE:
        seen = f"an update changes the policy by {update.last:.3g} nats a token ({update.last_steps}; {LARGEST_UPDATE} is much)"
        return seen, (*lower, run.suggest("optimizer.max_grad_norm", "a lower {}"))
    kl, scores, coef = run.curve(KL), run.curve(SCORES), run.setting("reward.kl_coef")
    if not kl.values or not _is_number(coef):
        return None
    penalty, gain, spread = coef * (kl.last - kl.first), scores.last - scores.first, run.curve(SPREAD).first
    if penalty <= max(gain, 0) + spread:
        return None
    seen = f"KL to the reference grew from {kl.first:.3g} to {kl.last:.3g} nats a completion ({kl.last_steps}): its penalty "
    seen += f"rose by {penalty:.3g}, the reward by {gain:.3g} (standard deviation {spread:.3g})"
    return seen, (*lower, run.suggest("reward.kl_coef", "a higher {}"))


EQUAL_STEPS = 0.5
"""Share of the steps. Now and then a small batch is all right or all wrong; when most are, most of the sampling teaches nothing."""
EQUAL_SPREAD = 1e-6
"""Standard deviation, as a share of the mean's size (or of 1), that is rounding."""


def equal_rewards(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Where all rewards of a step are the same no completion was better than another, so that the advantages are the critic's errors."""
    rows = run.together(SCORES, SPREAD)
    equal = [score for score, spread in rows if spread <= EQUAL_SPREAD * max(1.0, abs(score))]
    if len(equal) < EQUAL_STEPS * len(rows):
        return None
    low, high = min(equal), max(equal)
    which = f"{low:.3g}" if low == high else f"between {low:.3g} and {high:.3g}"
    seen = f"in {len(equal)} of {len(rows)} steps every completion had the same reward, {which}"
    return seen, (
        "look at the samples (`fastppo report`): does the reward function see what it should?",
        "prompts that are solved sometimes: harder ones if the reward is at its best, easier ones if it is at its worst",
        "a reward that grades in more steps than right and wrong",
        run.suggest("rollout.samples_per_prompt", "more {}"),
    )


EXPLAINED_SHARE = 0.05
"""Of the returns' variance. A critic under it is no better than the mean of the returns."""
CRITIC_STEPS = 20
"""A critic starts from nothing; before this many steps a low share says little."""


def idle_critic(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Judged by the later half of the run, over the steps whose rewards differ: without differences there is nothing to explain."""
    rows = run.together(EXPLAINED, SPREAD, SCORES)
    told = [share for share, spread, score in rows if spread > EQUAL_SPREAD * max(1.0, abs(score))]
    half = told[len(told) // 2 :]
    if len(told) < CRITIC_STEPS or _mean(half) >= EXPLAINED_SHARE:
        return None
    seen = f"the critic explains {_mean(half):.1%} of the returns' variance on average of the last {len(half)} steps"
    return seen, (
        run.suggest("critic.lr", "ten times {}"),
        run.suggest("critic.warmup_steps", "{} of 10 to 20"),
        run.suggest("advantage.gae_lambda", "{}=1.0, which relies on the critic least"),
        run.suggest("critic.kind", "{}=separate")
        if run.setting("critic.kind") == "shared"
        else "a larger model for the critic",
    )


CUT_OFF_SHARE = 0.3
"""Of the completions. Their rewards speak of an answer that was never finished; a few are the price of a bound on length."""


def cut_off(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Not where the settings make every completion run to the limit."""
    share, most = run.curve(CUT_OFF), run.setting("rollout.max_new_tokens")
    meant = run.setting("rollout.ignore_eos") or (most is not None and run.setting("rollout.min_new_tokens") == most)
    if share.last <= CUT_OFF_SHARE or meant:
        return None
    limit = "the limit" if most is None else f"rollout.max_new_tokens = {most}"
    seen = (
        f"{share.last:.0%} of the completions were cut off at {limit} ({share.last_steps}; {share.first:.0%} at first)"
    )
    return seen, (
        run.suggest("rollout.max_new_tokens", "twice {}"),
        run.suggest("reward.missing_eos_penalty", "{} of about one standard deviation of the reward"),
        "a prompt that asks for a short answer, and `fastppo info MODEL`: does its end-of-sequence end a completion?",
    )


LONGER, SHORTER = 1.5, 0.25
"""Last mean length over the first."""
CORRELATION = 0.8
"""Of reward and mean length over the steps: reward and length rise as one."""


def hacked_by_length(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """The reward rises by more than a standard deviation, and with it the length (or the completions all but vanish). That can be honest,
    longer reasoning say; the samples tell."""
    rows, length = run.together(SCORES, LENGTH), run.curve(LENGTH)
    scores, spread = run.curve(SCORES), run.curve(SPREAD).first
    ratio, correlation = length.last / max(length.first, 1e-9), _correlation(rows)
    as_one = correlation >= CORRELATION if ratio >= LONGER else ratio <= SHORTER and correlation <= -CORRELATION
    if scores.last - scores.first <= spread or not as_one:
        return None
    seen = f"mean length went from {length.first:.3g} to {length.last:.3g} tokens as the reward rose from {scores.first:.3g} to "
    seen += f"{scores.last:.3g} (correlation {correlation:.2f} over {len(rows)} steps)"
    held_out = run.curve("eval/scores")
    if len(held_out.values) > 1:
        seen += f"; held out it went from {held_out.values[0]:.3g} to {held_out.values[-1]:.3g}"
    return seen, (
        "read samples of the first and last steps (`fastppo report`): are they better, or only longer?"
        if ratio > 1
        else "read samples of the first and last steps (`fastppo report`): are they better, or only shorter?",
        "a second function in reward.functions that charges for length (docs/rewards.md), or one that looks at the content",
        run.suggest("reward.kl_coef", "a higher {}"),
    )


def skipped_updates(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Each was an update whose gradients were not finite."""
    skipped = run.curve("update/skipped")
    if not sum(skipped.values):
        return None
    steps = [step for step, count in zip(*skipped, strict=True) if count]
    seen = f"{sum(skipped.values):.0f} updates in {len(steps)} steps (the first in step {steps[0]}) were not finite and left out"
    return seen, (
        run.suggest("optimizer.lr", "a lower {}"),
        run.suggest("model.dtype", "{}=bfloat16 or float32 instead of float16"),
    )


OUT_OF_CLIP = 0.01
"""Share of the tokens whose ratio would be clipped before the policy has changed at all."""


def sampler_differs(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    """Sampling and training give the same token different log-probabilities."""
    share = run.curve("rollout/out_of_clip_rate")
    if share.last <= OUT_OF_CLIP:
        return None
    seen = f"{share.last:.1%} of the sampled tokens ({share.last_steps}) have a probability in training that is outside the clip range "
    if run.setting("rollout.staleness"):
        return seen + "before the update: since they were sampled the weights have moved far", (
            run.suggest("optimizer.lr", "a third of {}"),
            run.suggest("rollout.staleness", "{}=0"),
        )
    return seen + "already before the update", (
        run.suggest("rollout.recompute_logprobs", "{}=always"),
        run.suggest("model.dtype", "{}=float32, or bfloat16 instead of float16"),
    )


KEPT_SHARE = 0.01
"""Of the prompts. A policy that gets no answers to imitate stays what it is."""


def search_finds_nothing(run: Evidence) -> tuple[str, tuple[str, ...]] | None:
    kept = run.curve(KEPT)
    if kept.last >= KEPT_SHARE:
        return None
    seen = f"the search had an answer to imitate for {kept.last:.1%} of the prompts ({kept.last_steps}; {kept.first:.1%} at first)"
    return seen, (
        run.suggest("reward.solved_score", "a lower {}"),
        run.suggest("rollout.samples_per_prompt", "more {}")
        if run.setting("search.kind") in ("best-of-n", "majority")
        else run.suggest("critic.warmup_steps", "more {}: the critic is the search's judge"),
        "easier prompts",
    )


RULES = (
    Rule("entropy collapse", (ENTROPY, SCORES, SPREAD), entropy_collapse),
    Rule("KL blow-up", (UPDATE_KL, SCORES, SPREAD), kl_blow_up),
    Rule("all rewards equal", (SCORES, SPREAD), equal_rewards),
    Rule("critic explains nothing", (EXPLAINED, SCORES, SPREAD), idle_critic),
    Rule("completions cut off", (CUT_OFF,), cut_off),
    Rule("reward hacking by length", (LENGTH, SCORES, SPREAD), hacked_by_length),
    Rule("updates not finite", ("update/skipped",), skipped_updates),
    Rule("sampling and training disagree", ("rollout/out_of_clip_rate",), sampler_differs),
    Rule("search finds nothing", (KEPT,), search_finds_nothing, of_all_runs=False),
)


def examine(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None) -> Diagnosis:
    """Apply every rule to the rows of a metrics.jsonl and the settings of the run, as far as they are known."""
    run = Evidence(rows, settings)
    findings, unjudged = [], {}
    for rule in RULES:
        counts = {metric: len(run.curve(metric).values) for metric in rule.needs}
        missing = [metric for metric, count in counts.items() if not count]
        if missing and not rule.of_all_runs:
            continue
        if missing or min(counts.values()) < LEAST_STEPS:
            unjudged[rule.name] = f"no {', '.join(missing)}" if missing else f"fewer than {LEAST_STEPS} steps"
        elif found := rule.judge(run):
            findings.append(Finding(rule.name, *found))
    return Diagnosis(len(run.rows), findings, unjudged)


def examine_run(path: str | Path) -> Diagnosis:
    """Examine a run folder. Raises FileNotFoundError where it is none or has no metrics, ValueError where a line of them is damaged or none is
    of a training step."""
    rows = read_metrics(path)
    if not any(row["step"] > 0 for row in rows):
        raise ValueError(f"{path} has no metrics of a training step yet")
    return examine(rows, read_settings(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _correlation(pairs: Sequence[tuple[float, ...]]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    xs, ys = zip(*pairs, strict=True)
    dx, dy = [x - _mean(xs) for x in xs], [y - _mean(ys) for y in ys]
    scale = math.sqrt(sum(x * x for x in dx) * sum(y * y for y in dy))
    return sum(x * y for x, y in zip(dx, dy, strict=True)) / scale if scale else 0.0
