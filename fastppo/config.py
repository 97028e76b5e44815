"""Every setting of a PPO run, as plain dataclasses. What a recipe names besides (model, data, rewards) is in `recipe_config.py`."""

from __future__ import annotations

from dataclasses import field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from fastppo.critic_config import CriticConfig, refuse_unused
from fastppo.distributed_config import DistributedConfig
from fastppo.environment_config import EnvironmentConfig
from fastppo.evaluation_config import CheckpointConfig, DifficultyConfig, EvaluationConfig
from fastppo.lora_config import LoRAConfig
from fastppo.optimizer_config import OptimizerConfig
from fastppo.rollout_config import RolloutConfig
from fastppo.search_config import SAMPLED, SearchConfig
from fastppo.setting_types import (
    STRICT,
    Count,
    Finite,
    NonNegative,
    OptionalCount,
    PathText,
    Positive,
    Seed,
    Share,
    one_or_more,
)


def _check_kl_target(section: RewardConfig | LossConfig) -> None:
    """Only a coefficient above 0 can grow."""
    if section.kl_target is not None and section.kl_coef == 0:
        raise ValueError(f"kl_coef is 0, expected a first value above 0 with kl_target {section.kl_target}")


@dataclass(config=STRICT)
class RewardConfig:
    """How rewards are called, and what is added to them."""

    timeout: Positive | None = 60.0
    """Seconds a reward function may take for one batch before its process is killed; `None` calls it in-process."""
    retries: OptionalCount = 1
    """Further attempts after a reward function failed."""
    solved_score: Finite = 1.0
    """A completion with at least this score has solved its prompt, for `evaluation.pass_at_k` and `difficulty`."""
    max_failure_rate: Share = 0.5
    """The run stops when more than this share of a step's scores is invalid. Invalid samples are never trained on."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a completion that did not finish by itself."""
    kl_coef: NonNegative = 0.0
    """Coefficient of the KL penalty to the frozen reference inside the reward; 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Per-token KL estimator of the penalty (Schulman, "Approximating KL divergence")."""
    kl_target: Positive | None = None
    """Move `kl_coef` after each step so that the KL of a completion, in nats, comes to this (Ziegler et al. 2019); `None` keeps it fixed."""
    kl_horizon: Count = 10_000
    """Completions in which the coefficient may grow or fall by a fifth."""
    whiten: bool = False
    """Divide the shaped rewards by their standard deviation (the mean is kept)."""

    @model_validator(mode="after")
    def _check_kl(self) -> RewardConfig:
        _check_kl_target(self)
        return self


GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "opo")
"""Their baseline is made of the scores of the other samples of a prompt."""
CRITIC_ESTIMATORS = ("gae", "vtrace")
WHITENED_ESTIMATORS = ("gae", "vtrace", "reinforce++")
DISCOUNTED_ESTIMATORS = ("gae", "vtrace", "reinforce++", "remax")


@dataclass(config=STRICT)
class AdvantageConfig:
    """From rewards and values to advantages."""

    estimator: Literal["gae", "vtrace", "grpo", "dr_grpo", "rloo", "reinforce++", "remax", "opo"] = "gae"
    """`gae` has a critic, and so has `vtrace`, for completions that were drawn from another distribution. The others have none: `grpo`, `dr_grpo`,
    `rloo` and `opo` compare the samples of a prompt with each other (`rollout.samples_per_prompt` of at least 2), `remax` with its greedy completion,
    `reinforce++` all of a step. docs/algorithms.md has the formulas."""
    gamma: Share = 1.0
    """Discount factor; 1 with the estimators that compare whole completions."""
    gae_lambda: Share = 0.95
    """GAE's λ for the policy's advantages, and for the critic's returns where `critic_gae_lambda` is not set."""
    critic_gae_lambda: Share | None = None
    """GAE's λ for the returns that the critic learns (VAPO, arXiv:2504.05118, "decoupled GAE": 1); `None` is `gae_lambda`."""
    length_adaptive_alpha: Positive | None = None
    """The policy's λ is 1 - 1 / (α length) for a completion of `length` tokens, and 0 up to 1/α tokens, instead of `gae_lambda` (VAPO,
    arXiv:2504.05118, "length-adaptive GAE": 0.05); `None` is off."""
    vtrace_rho_bar: Positive = 1.0
    """V-trace's bound on the importance weight of a TD error and of an advantage."""
    vtrace_c_bar: Positive = 1.0
    """V-trace's bound on the importance weight with which later TD errors count."""
    bootstrap_truncated: bool = False
    """Bootstrap a truncated completion with the critic's value of its last state (instead of 0)."""
    whiten: bool | None = None
    """Normalise the advantages to mean 0, variance 1 over the whole batch; by default with `gae`, `vtrace` and `reinforce++`."""

    @model_validator(mode="after")
    def _complete(self) -> AdvantageConfig:
        if self.whiten is None:
            self.whiten = self.estimator in WHITENED_ESTIMATORS
        needs_critic = {"bootstrap_truncated": False} if self.estimator not in CRITIC_ESTIMATORS else {}
        needs_gae = {"critic_gae_lambda": None, "length_adaptive_alpha": None} if self.estimator != "gae" else {}
        needs_vtrace = {"vtrace_rho_bar": 1.0, "vtrace_c_bar": 1.0} if self.estimator != "vtrace" else {}
        for name, off in (needs_gae | needs_vtrace | needs_critic).items():
            if getattr(self, name) != off:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {off} with estimator {self.estimator}")
        if self.gamma != 1 and self.estimator not in DISCOUNTED_ESTIMATORS:
            raise ValueError(
                f"gamma is {self.gamma}, expected 1 with estimator {self.estimator}, which compares whole completions"
            )
        return self


@dataclass(config=STRICT)
class LossConfig:
    """The policy's loss. docs/algorithms.md has the formulas."""

    objective: Literal["clip", "cispo", "dis"] = "clip"
    """`clip` is PPO's; `cispo` (MiniMax-M1, arXiv:2506.13585) weighs the gradient of every log-prob by the clipped ratio; `dis` (SAO,
    arXiv:2607.07508, section 3.1) by the ratio, and drops tokens whose ratio is outside of the clip range, whatever their advantage's sign."""
    ratio_level: Literal["token", "sequence"] = "token"
    """The ratio of each token, or of its whole completion (GSPO-token, arXiv:2507.18071)."""
    clip_low: NonNegative = 0.2
    """The ratio is clipped below at 1 - clip_low; 1 or more never clips."""
    clip_high: NonNegative = 0.2
    """The ratio is clipped above at 1 + clip_high ("clip-higher": a larger value than `clip_low`)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c > 1 on the loss of a negative advantage (Ye et al. 2020); `None` is off."""
    kl_coef: NonNegative = 0.0
    """Coefficient of the KL to the frozen reference as a term of the loss; 0 is off. `reward.kl_coef` puts it into the reward instead."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+"] = "k3"
    """Per-token estimator of that term; `k1+` and `k3+` have the gradient of k2, which is in expectation that of the KL (`k3`'s is not)."""
    kl_target: Positive | None = None
    """Move `kl_coef` after each step so that the KL of a completion, in nats, comes to this (Ziegler et al. 2019); `None` keeps it fixed."""
    kl_horizon: Count = 10_000
    """Completions in which the coefficient may grow or fall by a fifth."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    entropy_target: Positive | None = None
    """Raise `entropy_coef` by `entropy_coef_step` after a step whose entropy, in nats a token, was below this, and lower it after others, in
    which there is no bonus (Skywork-OR1, arXiv:2505.22312); `None` keeps it fixed."""
    entropy_coef_step: Positive = 1e-4
    """By how much `entropy_coef` moves in a step."""
    rollout_correction: Literal["truncate", "mask"] | None = None
    """Weigh the policy's loss by the ratio w of training's probability (before the update) to that of sampling, which top-k, top-p, min-p and
    `rollout.min_new_tokens` change, and other kernels round otherwise: `truncate` cuts w at the upper of `rollout_bounds`, `mask` drops what is
    outside of them."""
    rollout_correction_level: Literal["token", "sequence", "geometric"] = "token"
    """w of each token, of the whole completion (the product of its tokens'), or the geometric mean over the completion's tokens."""
    rollout_bounds: tuple[NonNegative, Positive] = (0.5, 2.0)
    """(lower, upper) bound of w; `truncate` has the upper one only."""
    positive_nll_coef: NonNegative = 0.0
    """Weight of the mean negative log-likelihood of the tokens of good completions (VAPO, arXiv:2504.05118: 0.1); 0 is off."""
    positive_nll_threshold: float = 0.0
    """A completion is good when its score is above this."""
    mask_truncated_completions: bool = False
    """Learn nothing from completions that hit the length limit ("overlong filtering", DAPO, arXiv:2503.14476, section 3.4): their scores count
    for their group's baseline, their tokens for nothing."""
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-denominator"] = "token-mean"
    """How token losses become one number; denominators are those of the whole minibatch. `fixed-denominator` divides the sum by completions times
    `rollout.max_new_tokens` (Dr. GRPO, arXiv:2503.20783)."""

    @model_validator(mode="after")
    def _check_terms(self) -> LossConfig:
        _check_kl_target(self)
        if self.objective != "clip" and self.dual_clip is not None:
            raise ValueError(
                f"dual_clip is {self.dual_clip}, expected none with objective {self.objective}, whose weight is bounded already"
            )
        if self.objective == "dis" and self.ratio_level != "token":
            raise ValueError(
                f"ratio_level is {self.ratio_level}, expected token with objective dis, which drops tokens"
            )
        if self.rollout_bounds[0] > self.rollout_bounds[1]:
            raise ValueError(f"rollout_bounds is {list(self.rollout_bounds)}, expected the lower bound first")
        return self


@dataclass(config=STRICT)
class TRPOConfig:
    """`algorithm: trpo`. One policy step a rollout; `learner.epochs`, `learner.num_minibatches` and the optimizer are the critic's alone."""

    max_kl: Positive = 0.01
    """Most KL of the policy before a step to that after it, in nats, the mean over the states of the rollout."""
    cg_iterations: Count = 10
    """Most conjugate-gradient iterations; each costs three forward passes and one backward pass over the rollout."""
    cg_damping: NonNegative = 0.1
    """Added to the diagonal of the Fisher matrix."""
    line_search_steps: Count = 10
    """Most lengths of the step that are tried; the policy stays as it is where none will do."""
    line_search_factor: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Each is this times the one before."""


@dataclass(config=STRICT)
class LearnerConfig:
    """How a rollout is learned from."""

    epochs: Count = 2
    """Passes over a rollout."""
    num_minibatches: Count = 4
    """Optimizer steps in each pass."""
    tokens_per_microbatch: Count = 8192
    """Most tokens in one forward/backward, a prompt's once for all its samples; gradients accumulate over the micro-batches of a
    minibatch and do not depend on the split. A single longer sequence makes a micro-batch of its own."""
    max_skipped_updates: Count = 5
    """The run stops after this many non-finite updates in a row; each is skipped and counted."""
    gradient_checkpointing: bool = False
    """Keep one hidden state a layer and compute the rest again in the backward pass: less memory, about a third more time."""
    offload_reference: bool = False
    """Keep the reference in the host's memory, and bring it to the GPU while a rollout is scored."""


@dataclass(config=STRICT)
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl`, which is always written. A tracker that fails is said once and never ends the run."""

    to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], BeforeValidator(one_or_more)] = ()
    """Trackers, each with the package of its name: `[tensorboard, wandb]`. Servers, keys and modes are the packages' own settings
    (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, ...)."""
    project: Annotated[str, Field(min_length=1)] = "fastppo"
    """Project, or MLflow's experiment, that the run is filed under."""
    run_name: str | None = None
    """What the trackers call the run; by default its folder's name."""


@dataclass(config=STRICT)
class PPOConfig:
    """Settings of one PPO run, by component; a component may be given as a dict: `PPOConfig(optimizer={"lr": 1e-5})`.

    Defaults suit a small instruct model on one device. Symbols follow Schulman et al. 2017 (PPO) and 2016 (GAE).
    A *step* is one rollout of `rollout.prompts_per_step * rollout.samples_per_prompt` completions and the updates made from it.
    """

    output_dir: PathText = "runs/ppo"
    """Folder that receives config, metrics, samples, curve and checkpoints."""
    total_steps: Count = 100
    """Number of rollout-and-update steps."""
    algorithm: Literal["ppo", "trpo", "expert_iteration"] = "ppo"
    """How the policy moves: by PPO's loss, by steps within a KL limit (Schulman et al. 2015, arXiv:1502.05477), or towards the answers that a
    search finds (Anthony et al. 2017, arXiv:1705.08439)."""
    seed: Seed = 0
    """Seeds prompt order, sampling and minibatch order. On the CPU a run is bitwise reproducible."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`."""
    num_logged_samples: OptionalCount = 4
    """Completions written to `samples.jsonl` at each step."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @model_validator(mode="before")
    @classmethod
    def _name_moved_keys(cls, values: Any) -> Any:
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        for key in given or ():
            if key not in {spec.name for spec in fields(cls)} and (target := moved_to(key)):
                raise ValueError(f"{key} is not known; {target} is")
        return values

    @model_validator(mode="after")
    def _check_together(self) -> PPOConfig:
        """What depends on settings of more than one section."""
        estimator, samples = self.advantage.estimator, self.rollout.samples_per_prompt
        if estimator in GROUP_ESTIMATORS and samples < 2:
            raise ValueError(
                f"rollout.samples_per_prompt is {samples}, expected at least 2 with advantage.estimator {estimator}, "
                f"which compares the samples of a prompt"
            )
        with_critic = ("lora", "shared") if self.lora.r else ("separate", "shared", "lora")
        kinds = with_critic if estimator in CRITIC_ESTIMATORS else ("none",)
        if self.algorithm == "expert_iteration" and self.search.kind in SAMPLED:
            kinds = (*kinds, "none")
        if self.critic.kind is None:
            self.critic = replace(self.critic, kind=kinds[0])
        if self.critic.kind not in kinds:
            raise ValueError(
                f"critic.kind is {self.critic.kind}, expected {' or '.join(kinds)} with advantage.estimator {estimator}"
                + (f" and lora.r {self.lora.r}" if self.lora.r else "")
            )
        refuse_unused(self.critic, estimator)
        if estimator == "vtrace" and self.loss.rollout_correction is not None:
            raise ValueError(
                f"loss.rollout_correction is {self.loss.rollout_correction}, expected none with advantage.estimator vtrace, "
                f"whose advantages are weighed already"
            )
        if self.algorithm != "ppo" and (changed := _changed(self.loss)):
            raise ValueError(
                f"loss.{changed} is set, expected no setting of loss with algorithm {self.algorithm}, which has none"
            )
        if self.algorithm != "trpo" and (changed := _changed(self.trpo)):
            raise ValueError(
                f"trpo.{changed} is set, expected no setting of trpo with algorithm {self.algorithm}, which has none"
            )
        if self.algorithm == "expert_iteration":
            self._check_search()
        elif changed := _changed(self.search):
            raise ValueError(
                f"search.{changed} is set, expected no setting of search with algorithm {self.algorithm}, which has none"
            )
        return self

    def _check_search(self) -> None:
        """What depends on the search whose answers are learned from."""
        kind, budget, most = self.search.kind, self.search.budget, self.rollout.max_new_tokens
        expected = {
            "reward.kl_coef": (
                self.reward.kl_coef,
                0,
                "algorithm expert_iteration, whose policy loss has no reward in it",
            )
        }
        expected["advantage.estimator"] = self.advantage.estimator, "gae", "algorithm expert_iteration"
        if self.critic.kind == "none":
            bootstrap = self.advantage.bootstrap_truncated
            expected["advantage.bootstrap_truncated"] = bootstrap, False, "critic.kind none"
        if kind not in SAMPLED:
            why = f"search.kind {kind}, which puts an answer together"
            expected["rollout.min_new_tokens"] = self.rollout.min_new_tokens, 0, why
            # A rank asks the critic when its own search does; divided weights would have to be gathered by all ranks at once.
            expected["distributed.sharding"] = self.distributed.sharding, "none", why
        for name, (found, wanted, why) in expected.items():
            if found != wanted:
                raise ValueError(f"{name} is {found}, expected {wanted} with {why}")
        if kind in SAMPLED and self.rollout.samples_per_prompt < 2:
            raise ValueError(f"rollout.samples_per_prompt is 1, expected at least 2 with search.kind {kind}")
        if budget is not None and budget < most:
            raise ValueError(f"search.budget is {budget}, expected at least rollout.max_new_tokens = {most}")

    @model_validator(mode="after")
    def _check_sharding(self) -> PPOConfig:
        self.distributed.require_divisible(self)
        return self

    @model_validator(mode="after")
    def _check_exact(self) -> PPOConfig:
        for name, found, off in (
            ("lora.r", self.lora.r, 0),
            ("distributed.sharding", self.distributed.sharding, "none"),
            ("rollout.staleness", self.rollout.staleness, 0),
        ):
            if self.rollout.exact and found != off:
                raise ValueError(f"rollout.exact is true, expected false with {name} {found}")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> PPOConfig:
        if self.optimizer.offload and self.optimizer.bf16_stochastic_round:
            raise ValueError(
                "optimizer.bf16_stochastic_round is true, expected false with optimizer.offload, which keeps fp32 masters"
            )
        if self.lora.r and self.learner.offload_reference:
            raise ValueError(
                f"learner.offload_reference is true, expected false with lora.r = {self.lora.r}: the reference is the policy's own trunk"
            )
        return self

    @model_validator(mode="after")
    def _check_staleness(self) -> PPOConfig:
        """What was sampled with older weights has to be weighed for it."""
        served = {"algorithm": (self.algorithm, "ppo"), "distributed.sharding": (self.distributed.sharding, "none")}
        for name, (value, expected) in served.items() if self.rollout.staleness else ():
            if value != expected:
                raise ValueError(f"{name} is {value}, expected {expected} with rollout.staleness 1")
        weighed = self.advantage.estimator == "vtrace" or self.rollout.recompute_logprobs == "never"
        if self.rollout.staleness and self.loss.rollout_correction is None and not weighed:
            self.loss = replace(self.loss, rollout_correction="truncate")
        return self

    def sampling_warning(self) -> str | None:
        """A sentence where completions are drawn from another distribution than the one that is trained, and nothing corrects for it."""
        rollout = self.rollout
        off = {"top_k": 0, "top_p": 1, "min_p": 0, "min_new_tokens": 0}
        changed = [f"rollout.{name}" for name, value in off.items() if getattr(rollout, name) != value]
        if not changed or self.loss.rollout_correction is not None or self.advantage.estimator == "vtrace":
            return None
        return (
            f"{', '.join(changed)}: completions are drawn from another distribution than the one that is trained, and nothing "
            f"weighs them for it; loss.rollout_correction=truncate does"
        )


def _changed(section: LossConfig | TRPOConfig | SearchConfig) -> str | None:
    """The first of its settings that is not as it is by default."""
    default = type(section)()
    names = (spec.name for spec in fields(default) if getattr(section, spec.name) != getattr(default, spec.name))
    return next(names, None)


# Where the settings of recipes with one section `ppo` have gone.
MOVED = {
    "temperature": "rollout.temperature",
    "rollout_batch_size": "rollout.batch_size",
    "reward_timeout": "reward.timeout",
    "reward_retries": "reward.retries",
    "max_reward_failure_rate": "reward.max_failure_rate",
    "kl_coef": "reward.kl_coef",
    "kl_estimator": "reward.kl_estimator",
    "whiten_rewards": "reward.whiten",
    "whiten_advantages": "advantage.whiten",
    "loss_aggregation": "loss.aggregation",
    "critic": "critic.kind",
    "critic_lr": "critic.lr",
    "critic_warmup_steps": "critic.warmup_steps",
    "lr": "optimizer.lr",
    "lr_schedule": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "adam_betas": "optimizer.betas",
    "adam_eps": "optimizer.eps",
    "ppo_epochs": "learner.epochs",
    "eval_every": "evaluation.every",
    "eval_temperature": "evaluation.temperature",
    "save_every": "checkpoint.every",
    "keep_checkpoints": "checkpoint.keep",
}


def moved_to(key: str) -> str | None:
    """Where a setting stands that recipes used to have under `ppo`: "section.key", or None where there is none of that name."""
    if key in MOVED:
        return MOVED[key]
    sections = {spec.name: spec.default_factory for spec in fields(PPOConfig) if isinstance(spec.default_factory, type)}
    owners = [name for name, section in sections.items() if key in {spec.name for spec in fields(section)}]
    return f"{owners[0]}.{key}" if len(owners) == 1 else None
