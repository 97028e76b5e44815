"""What moves from step to step, towards a target: coefficients, and whether the critic's warm-up is over. It is in the checkpoint; what is fixed
is the config's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass
class KLController:
    """The coefficient β of a KL penalty, fixed where there is no target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2):

    β <- β (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon) after n completions, a factor of at least 0.8 and at most 1.2
    """

    coef: float
    target: float | None
    """Nats a completion."""
    horizon: int
    """Completions."""

    MOVES: ClassVar = ("coef",)

    def update(self, kl: float, completions: int) -> None:
        """After a step: the mean KL of its completions to the reference, in nats, and their number."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * min(completions / self.horizon, 1.0)


@dataclass
class EntropyController:
    """The coefficient of an entropy bonus, fixed where there is no target (Skywork-OR1, arXiv:2505.22312, "adaptive entropy control"):

    c <- c + step after a step whose entropy was below the target, else c - step, at least 0; the coefficient is c, or 0 where the
    entropy was above the target
    """

    inner: float
    target: float | None
    """Nats a token."""
    step: float
    above: bool = False
    """Whether the entropy was above the target when it was last seen."""

    MOVES: ClassVar = ("inner", "above")

    @property
    def coef(self) -> float:
        return 0.0 if self.above else self.inner

    def update(self, entropy: float) -> None:
        """After a step: the mean entropy of its tokens in nats."""
        self.above = entropy > self.target
        self.inner = self.inner + self.step if entropy < self.target else max(0.0, self.inner - self.step)


@dataclass
class CriticWarmup:
    """Which steps only the critic learns in: the first `steps`, and, where there is a target, those until a step's values explain as much."""

    steps: int
    target: float | None
    """Explained variance, 1 - Var(returns - values) / Var(returns)."""
    max_steps: int
    """Then a warm-up that waits for the target is over in any case."""
    over: bool = False
    """Whether the target has been reached; it stays so."""

    MOVES: ClassVar = ("over",)

    def update(self, step: int, explained_variance: float) -> None:
        """At the beginning of the update of `step` (0-based)."""
        reached = explained_variance >= self.target or step >= self.max_steps
        self.over = self.over or (step >= self.steps and reached)

    def holds(self, step: int) -> bool:
        """Whether the policy stays as it is in `step`."""
        return step < self.steps or (self.target is not None and not self.over)


Controller = KLController | EntropyController | CriticWarmup


def states(controllers: Mapping[str, Controller]) -> dict[str, dict[str, float]]:
    """name -> what has moved, of those that have a target."""
    return {
        name: {field: getattr(controller, field) for field in controller.MOVES}
        for name, controller in controllers.items()
        if controller.target is not None
    }


def restore(controllers: Mapping[str, Controller], saved: Mapping[str, Mapping[str, float]]) -> None:
    """Those that had a target and have one go on where they were; all others start from the config."""
    for name in saved.keys() & states(controllers).keys():
        for field, value in saved[name].items():
            setattr(controllers[name], field, value)
