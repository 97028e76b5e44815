"""What other packages' functions are called with in `drop_in`: inputs, and how each is called, the same for theirs and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastppo.bench import linear_ppo_loss, peers
from fastppo.bench.harness import Provider, Tensors, compare_tensors
from fastppo.bench.ppo_loss import CLIP, VALUE_CLIP, make_inputs
from fastppo.bench.setting import DTYPES
from fastppo.bench.stand_ins import find
from fastppo.reference.gae import gae as reference_gae
from fastppo.reference.linear_ppo_loss import linear_ppo_loss as reference_linear_ppo_loss
from fastppo.reference.linear_token_logprobs import linear_token_logprobs as reference_linear
from fastppo.reference.token_logprobs import token_logprobs as reference_token_logprobs

GAMMA, LAM = 0.99, 0.95
TYPES = ("fp32", "bf16")
LEEWAY = 10.0  # theirs may round more often than a check of ours allows: their error is a figure, not a fault
CHECKED_EVERY = 32  # position of a sequence, where fp64 of all logits would take longer than what is measured


@dataclass(frozen=True)
class Comparison:
    """A function of an installed package and ours of its name.

    `theirs` is "package.module:function" or "package.module:Class.method"; `ours` its name in our module, where it is not the last part of
    theirs. `wrap` makes a provider of either. `exact` is the truth; None: what theirs gives in fp64.
    """

    package: str
    theirs: str
    size: str
    inputs: Callable[[torch.Generator], Tensors]
    wrap: Callable[[Callable], Provider]
    ours: str | None = None
    exact: Provider | None = None
    compare: Callable[[Tensors, Tensors, Tensors], float] = partial(compare_tensors, leeway=LEEWAY)
    largest: int = 0

    @property
    def function(self) -> str:
        """Theirs, as it is called: "function" or "Class.method"."""
        return self.theirs.partition(":")[2]

    @property
    def our_target(self) -> str:
        module = self.package.replace("-", "_")
        return f"fastppo.integrations.{module}:{self.ours or self.function.rpartition('.')[2]}"


# Log-probabilities and entropies of logits [B, T, V].


def logits_inputs(shape: tuple[int, int, int], dtype: str) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        logits = torch.randn(shape, generator=generator).mul_(3).to(DTYPES[dtype])
        return {
            "logits": logits.requires_grad_(),
            "labels": torch.randint(shape[-1], shape[:2], generator=generator),
            "d_logprobs": torch.randn(shape[:2], generator=generator),
            "d_entropy": torch.randn(shape[:2], generator=generator),
        }

    return inputs


def gradients(outputs: tuple[Tensor, ...], x: Tensors, upstream: tuple[str, ...], wanted: tuple[str, ...]) -> Tensors:
    d_outputs = [x[name].to(output.dtype) for name, output in zip(upstream, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [x[name] for name in wanted], d_outputs)
    return {f"d_{name}": d for name, d in zip(wanted, found, strict=True)}


def of_loss(x: Tensors, wanted: tuple[str, ...], loss: Tensor, **statistics: Tensor) -> Tensors:
    found = torch.autograd.grad(loss, [x[name] for name in wanted])
    return {"loss": loss.detach()} | {f"d_{name}": d for name, d in zip(wanted, found, strict=True)} | statistics


def logprobs(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        found = function(x["logits"], x["labels"])
        return {"logprobs": found.detach()} | gradients((found,), x, ("d_logprobs",), ("logits",))

    return run


def entropies(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        found = function(x["logits"])
        return {"entropy": found.detach()} | gradients((found,), x, ("d_entropy",), ("logits",))

    return run


def logprobs_and_entropies(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        found = function(x["logits"], x["labels"])
        made = dict(zip(("logprobs", "entropy"), (one.detach() for one in found), strict=True))
        return made | gradients(tuple(found), x, ("d_logprobs", "d_entropy"), ("logits",))

    return run


def exact_logprobs_and_entropies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return reference_token_logprobs(logits, labels, return_entropy=True)


def exact_entropies(logits: Tensor) -> Tensor:
    return exact_logprobs_and_entropies(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))[1]


def on_some_positions(run: Provider) -> Provider:
    return lambda x: run(some_positions(x))


def some_positions(x: Tensors) -> Tensors:
    return {name: value[:, ::CHECKED_EVERY].detach().requires_grad_(value.requires_grad) for name, value in x.items()}


def compare_some_positions(inputs: Tensors, outputs: Tensors, exact: Tensors) -> float:
    return compare_tensors(inputs, some_positions(outputs), exact, LEEWAY)


def of_logits(
    package: str, theirs: str, wrap: Callable, exact: Callable, shape: tuple[int, int, int], dtype: str = "fp32"
) -> Comparison:
    return Comparison(
        package,
        theirs,
        f"{list(shape)} {dtype}, forward + backward",
        logits_inputs(shape, dtype),
        wrap,
        exact=on_some_positions(wrap(exact)),
        compare=compare_some_positions,
        largest=math.prod(shape),
    )


def logits_comparisons(quick: bool) -> list[Comparison]:
    whole, part = ((2, 16, 400), (2, 16, 400)) if quick else ((8, 512, 32000), (2, 512, 32000))
    utils, torch_functional, models = "trl.trainer.utils", "verl.utils.torch_functional", "openrlhf.models.utils"
    of_labels = (
        ("trl", f"{utils}:selective_log_softmax"),
        ("verl", f"{torch_functional}:logprobs_from_logits"),
        ("openrlhf", f"{models}:log_probs_from_logits"),
    )
    of_all = (
        ("trl", f"{utils}:entropy_from_logits"),
        ("verl", f"{torch_functional}:entropy_from_logits"),
        ("openrlhf", f"{models}:compute_entropy"),
    )
    both = "trl", f"{utils}:selective_log_softmax_and_entropy"
    return [
        *(of_logits(*one, logprobs, reference_token_logprobs, whole, dtype) for one in of_labels for dtype in TYPES),
        of_logits(*both, logprobs_and_entropies, exact_logprobs_and_entropies, part),
        *(of_logits(*one, entropies, exact_entropies, part) for one in of_all),
    ]


# The same from hidden states [N, H], which a head [V, H] multiplies.


def head_inputs(tokens: int, hidden: int, vocab: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "hidden": torch.randn(tokens, hidden, generator=generator).requires_grad_(),
            "weight": torch.randn(vocab, hidden, generator=generator).mul_(3 / hidden**0.5).requires_grad_(),
            "labels": torch.randint(vocab, (tokens,), generator=generator),
            "d_logprobs": torch.randn(tokens, generator=generator),
            "d_entropy": torch.randn(tokens, generator=generator),
        }

    return inputs


def of_head(x: Tensors, logprobs: Tensor, entropy: Tensor) -> Tensors:
    made = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
    return made | gradients((logprobs, entropy), x, ("d_logprobs", "d_entropy"), ("hidden", "weight"))


def exact_head(x: Tensors) -> Tensors:
    return of_head(x, *reference_linear(x["hidden"], x["weight"], x["labels"], return_entropy=True))


def trl_head(function: Callable) -> Provider:
    options = 1.0, peers.TRL_VOCABULARY_CHUNK, None, 1.0, ("entropy",)  # temperature, chunk, softcap, scale

    def run(x: Tensors) -> Tensors:
        return of_head(x, *function(x["hidden"], x["weight"], None, x["labels"], *options)[:2])

    return run


def verl_head(function: Callable) -> Provider:
    options = find("verl.utils.experimental.torch_functional:FusedLinearForPPO")()
    return lambda x: of_head(x, *function(options, x["hidden"], x["weight"], x["labels"]))


def liger_head(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        losses, entropy = function(x["hidden"], x["weight"], x["labels"], return_entropy=True)
        return of_head(x, -losses, entropy)

    return run


def grpo_inputs(batch: int, time: int, hidden: int, vocab: int) -> Callable[[torch.Generator], Tensors]:
    """As those of `linear_ppo_loss`, [B, T] tokens and one advantage a sequence."""
    flat = linear_ppo_loss.make_case(batch * time, hidden, vocab, "fp32", peers.CPU).inputs

    def inputs(generator: torch.Generator) -> Tensors:
        made = {name: x.unflatten(0, (batch, time)) if name != "weight" else x for name, x in flat(generator).items()}
        return made | {"advantages": made["advantages"][:, 0], "mask": made["mask"].long()}

    return inputs


def liger_grpo_loss(function: Callable) -> Provider:
    make = find("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    options = make(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def run(x: Tensors) -> Tensors:
        columns = [x[name] for name in ("hidden", "weight", "labels", "mask", "advantages")]
        loss, _ = function(options, *columns, old_per_token_logps=x["old_logprobs"])
        return of_loss(x, ("hidden", "weight"), loss)

    return run


def exact_grpo_loss(x: Tensors) -> Tensors:
    """Whose aggregation "bnpo" is the mean over tokens."""
    columns = [x[name].flatten(0, 1) for name in ("labels", "old_logprobs")]
    advantages, mask = x["advantages"].repeat_interleave(x["mask"].shape[1]), x["mask"].flatten().bool()
    given = x["hidden"].flatten(0, 1), x["weight"], *columns, advantages, mask
    return of_loss(x, ("hidden", "weight"), reference_linear_ppo_loss(*given, clip_low=CLIP, clip_high=CLIP)[0])


def head_comparisons(quick: bool) -> list[Comparison]:
    batch, time, hidden, vocab = (2, 8, 32, 400) if quick else (8, 64, 512, 32000)
    tokens, size = batch * time, f"H={hidden}, V={vocab}, forward + backward"
    fused, experimental = "FusedLinearForPPO.forward", "verl.utils.experimental.torch_functional"
    chunked, scaled = "ChunkedLogProbFunction.apply", "LigerFusedLinearScaledCrossEntropyFunction.apply"
    functions = (
        ("trl", f"trl.kernels:{chunked}", trl_head, chunked),
        ("verl", f"{experimental}:{fused}", verl_head, fused),
        ("liger", f"liger_kernel.ops:{scaled}", liger_head, scaled),
    )
    inputs, loss = head_inputs(tokens, hidden, vocab), "LigerFusedLinearGRPOLoss.forward"
    return [
        *(
            Comparison(
                package, theirs, f"{tokens} tokens, {size}", inputs, wrap, ours, exact_head, largest=tokens * vocab
            )
            for package, theirs, wrap, ours in functions
        ),
        Comparison(
            "liger",
            f"liger_kernel.chunked_loss.grpo_loss:{loss}",
            f"{[batch, time]} tokens, {size}",
            grpo_inputs(batch, time, hidden, vocab),
            liger_grpo_loss,
            loss,
            exact_grpo_loss,
            largest=tokens * vocab,
        ),
    ]


# Advantages of token rewards [B, T].


def token_rewards(shape: tuple[int, int]) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        columns = {name: torch.randn(shape, generator=generator) for name in ("rewards", "values")}
        lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
        return columns | {"mask": (torch.arange(shape[1]) < lengths).long()}

    return inputs


def verl_gae(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        advantages, returns = function(x["rewards"], x["values"], x["mask"], GAMMA, LAM)
        return {"advantages": advantages, "returns": returns}

    return run


def openrlhf_gae(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        advantages, returns = function(None, x["values"], x["rewards"], x["mask"], GAMMA, LAM)
        return {"advantages": advantages, "returns": returns}

    return run


# Advantages of steps of environments, [T, N] in NumPy or [B, T, 1] in torch.


def buffer_inputs(steps: int, envs: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        columns = {name: torch.randn(steps, envs, generator=generator) for name in ("rewards", "values")}
        return columns | {
            "episode_starts": (torch.rand(steps, envs, generator=generator) < 0.02).float(),
            "last_values": torch.randn(envs, generator=generator),
            "dones": torch.rand(envs, generator=generator) < 0.5,
        }

    return inputs


def rollout_buffer(steps: int, envs: int):
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.common.buffers import RolloutBuffer

    spaces = Box(-1.0, 1.0, (4,)), Discrete(2)
    return RolloutBuffer(steps, *spaces, device="cpu", gae_lambda=LAM, gamma=GAMMA, n_envs=envs)


def buffer_gae(function: Callable) -> Provider:
    buffers = {}

    def run(x: Tensors) -> Tensors:
        shape = x["rewards"].shape
        if shape not in buffers:
            buffers[shape] = rollout_buffer(*shape)
        buffer = buffers[shape]
        for name in ("rewards", "values", "episode_starts"):
            setattr(buffer, name, x[name].numpy())
        function(buffer, x["last_values"], x["dones"].numpy())
        return {"advantages": torch.from_numpy(buffer.advantages), "returns": torch.from_numpy(buffer.returns)}

    return run


def exact_buffer_gae(buffer, last_values: Tensor, dones) -> None:
    """Fills the buffer's arrays, as theirs and ours do."""
    rewards, values, starts = (torch.from_numpy(x) for x in (buffer.rewards, buffer.values, buffer.episode_starts))
    ends = torch.cat((starts[1:].bool(), torch.from_numpy(dones)[None])).T
    found = reference_gae(rewards.T, values.T, gamma=GAMMA, lam=LAM, dones=ends, next_values=last_values)
    buffer.advantages, buffer.returns = (one.T.numpy() for one in found)


def trajectory_inputs(batch: int, steps: int) -> Callable[[torch.Generator], Tensors]:
    def inputs(generator: torch.Generator) -> Tensors:
        names = ("state_value", "next_state_value", "reward")
        columns = {name: torch.randn(batch, steps, 1, generator=generator) for name in names}
        done = torch.rand(batch, steps, 1, generator=generator) < 0.02
        return columns | {"done": done, "terminated": done & (torch.rand(done.shape, generator=generator) < 0.5)}

    return inputs


def trajectory_gae(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        advantage, target = function(GAMMA, LAM, **x)
        return {"advantage": advantage, "value_target": target}

    return run


def exact_trajectory_gae(gamma, lmbda, state_value, next_state_value, reward, done, terminated) -> tuple[Tensor, ...]:
    value, following, reward, done, terminated = (
        x[..., 0] for x in (state_value, next_state_value, reward, done, terminated)
    )
    ends = {"dones": terminated, "truncated": done & ~terminated}
    found = reference_gae(reward, value, gamma=gamma, lam=lmbda, next_values=following, **ends)
    return tuple(one[..., None] for one in found)


def advantage_comparisons(quick: bool) -> list[Comparison]:
    tokens = (8, 64) if quick else (256, 1024)
    found = [
        Comparison(
            "verl",
            "verl.trainer.ppo.core_algos:compute_gae_advantage_return",
            str(list(tokens)),
            token_rewards(tokens),
            verl_gae,
        ),
        Comparison(
            "openrlhf",
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
            str(list(tokens)),
            token_rewards(tokens),
            openrlhf_gae,
        ),
    ]
    for steps, envs in ((16, 1), (16, 4)) if quick else ((2048, 1), (2048, 64)):
        method = "stable_baselines3.common.buffers:RolloutBuffer.compute_returns_and_advantage"
        inputs, size = buffer_inputs(steps, envs), f"{steps} steps of {envs} environment{'s' * (envs > 1)}"
        found.append(
            Comparison("stable-baselines3", method, size, inputs, buffer_gae, exact=buffer_gae(exact_buffer_gae))
        )
    batch, steps = (4, 16) if quick else (64, 1000)
    for name in ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"):
        function, size = f"torchrl.objectives.value.functional:{name}", str([batch, steps, 1])
        inputs = trajectory_inputs(batch, steps)
        found.append(
            Comparison("torchrl", function, size, inputs, trajectory_gae, exact=trajectory_gae(exact_trajectory_gae))
        )
    return found


# Losses and KL estimates of log-probabilities and values [B, T].


def loss_inputs(shape: tuple[int, int], *names: str) -> Callable[[torch.Generator], Tensors]:
    """As those of `ppo_loss`, at no kink of a loss; the mask counts as trainers' do, in numbers."""

    def inputs(generator: torch.Generator) -> Tensors:
        made = {name: x.view(shape) for name, x in make_inputs(shape[0] * shape[1], generator).items()}
        made |= {"mask": made["mask"].long(), "d_kl": torch.randn(shape, generator=generator)}
        return {name: made[name] for name in names}

    return inputs


POLICY = ("logprobs", "old_logprobs", "advantages", "mask")
VALUE = ("values", "old_values", "returns", "mask")
KL = ("logprobs", "ref_logprobs", "d_kl")


def verl_policy_loss(function: Callable) -> Provider:
    make = find("verl.workers.config:ActorConfig")
    config = make(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=CLIP)

    def run(x: Tensors) -> Tensors:
        columns = x["old_logprobs"], x["logprobs"], x["advantages"], x["mask"]
        return of_loss(x, ("logprobs",), function(*columns, config=config)[0])

    return run


def verl_value_loss(function: Callable) -> Provider:
    def run(x: Tensors) -> Tensors:
        loss, clip_fraction = function(x["values"], x["returns"], x["old_values"], x["mask"], VALUE_CLIP)
        return of_loss(x, ("values",), loss, clip_fraction=clip_fraction)

    return run


def openrlhf_policy_loss(function: Callable) -> Provider:
    options = find("openrlhf.models.loss:PolicyLoss")(CLIP, CLIP)

    def run(x: Tensors) -> Tensors:
        loss, clip_fraction, kl, *_ = function(options, *(x[name] for name in POLICY))
        return of_loss(x, ("logprobs",), loss, clip_fraction=clip_fraction, kl=kl)

    return run


def openrlhf_value_loss(function: Callable) -> Provider:
    options = find("openrlhf.models.loss:ValueLoss")(VALUE_CLIP)

    def run(x: Tensors) -> Tensors:
        return of_loss(x, ("values",), function(options, *(x[name] for name in VALUE)))

    return run


def kl_estimate(**options) -> Callable[[Callable], Provider]:
    def wrap(function: Callable) -> Provider:
        def run(x: Tensors) -> Tensors:
            kl = function(x["logprobs"], x["ref_logprobs"], **options)
            return {"kl": kl.detach()} | gradients((kl,), x, ("d_kl",), ("logprobs",))

        return run

    return wrap


def exact_k3(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str) -> Tensor:
    """OpenRLHF's, which itself reads fp32 alone; no estimate here is so large that it would be clamped."""
    difference = log_probs_base - log_probs
    return difference.exp() - 1 - difference


def whitened(function: Callable) -> Provider:
    return lambda x: {"whitened": function(x["advantages"], x["mask"])}


def loss_comparisons(quick: bool) -> list[Comparison]:
    shape = (8, 64) if quick else (256, 1024)
    algorithms, losses = "verl.trainer.ppo.core_algos", "openrlhf.models.loss"
    functions = (
        ("verl", f"{algorithms}:compute_policy_loss_vanilla", POLICY, verl_policy_loss),
        ("verl", f"{algorithms}:compute_policy_loss_gspo", POLICY, verl_policy_loss),
        ("verl", f"{algorithms}:compute_policy_loss_cispo", POLICY, verl_policy_loss),
        ("verl", f"{algorithms}:compute_value_loss", VALUE, verl_value_loss),
        ("verl", f"{algorithms}:kl_penalty", KL, kl_estimate(kl_penalty="k3")),
        ("openrlhf", f"{losses}:PolicyLoss.forward", POLICY, openrlhf_policy_loss, "PolicyLoss.forward"),
        ("openrlhf", f"{losses}:ValueLoss.forward", VALUE, openrlhf_value_loss, "ValueLoss.forward"),
    )
    size = f"{list(shape)}, forward + backward"
    k3 = kl_estimate(kl_estimator="k3")
    estimate = "openrlhf.models.utils:compute_approx_kl", size, loss_inputs(shape, *KL), k3
    whitening = "verl.utils.torch_functional:masked_whiten", str(list(shape)), loss_inputs(shape, "advantages", "mask")
    return [
        *(
            Comparison(package, theirs, size, loss_inputs(shape, *names), *rest)
            for package, theirs, names, *rest in functions
        ),
        Comparison("openrlhf", *estimate, exact=k3(exact_k3)),
        Comparison("verl", *whitening, whitened),
    ]


def comparisons(quick: bool) -> list[Comparison]:
    made = (logits_comparisons, head_comparisons, advantage_comparisons, loss_comparisons)
    return [one for make in made for one in make(quick)]
