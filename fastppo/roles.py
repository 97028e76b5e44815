"""Policy, critic and reference over packed batches: the one place that knows who shares which weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.distributed import ALONE, Ranks
from fastppo.evaluation import Evaluation
from fastppo.model import Critic, Histogram, HistogramHead, ValueHead, lm_head, make_value_head, packed_hidden
from fastppo.model.adapters import Adapters, TrainedAdapter
from fastppo.model.host import Resting, on_device
from fastppo.model.parts_trunk import trunk_of
from fastppo.model.sharding import Sharding, gathered, shard_head, shard_network, start_again
from fastppo.ops import linear_token_logprobs
from fastppo.plan import Plan, first_epoch
from fastppo.rollout.record import places_in
from fastppo.rollout.rollout import Rollout


class Outputs(NamedTuple):
    """For the N actions of a batch, in packed order; None where it was not asked for."""

    logprobs: Tensor | None  # fp32 [N]
    entropy: Tensor | None  # fp32 [N]
    values: Tensor | None  # fp32 [N], value of the state before each action
    final_values: Tensor | None  # fp32 [B], value of the state after each sequence's last token
    value_logits: Tensor | None = (
        None  # fp32 [N, C], of each value's histogram, where the head says one; the values are then constants
    )


class Roles(nn.Module):
    """Policy and critic that learn, and the reference that does not (None where no KL term needs it).

    Args:
        policy: a prepared model, trained in place.
        critic: "separate", a copy of the policy's trunk with a value head, "shared", a value head on the policy's trunk, "lora", a value head on
            that trunk with an adapter of its own, or "none".
        own_critic: the separate critic; by default a copy of the policy's trunk with a new head.
        histogram: what a new value head says; None for a number.
        with_reference: keep a frozen copy of the policy as it is now.
        gradient_checkpointing: keep one hidden state a layer for the backward pass and compute the rest again.
        offload_reference: keep the reference on the host, but while a rollout is scored.
        adapters: of the policy, where these alone learn. The reference then is the same model without them.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        *,
        critic: Literal["separate", "shared", "lora", "none"] = "separate",
        own_critic: Critic | None = None,
        histogram: Histogram | None = None,
        with_reference: bool = False,
        gradient_checkpointing: bool = False,
        adapters: Adapters | None = None,
        offload_reference: bool = False,
    ) -> None:
        super().__init__()
        _require_trainable(policy)
        _require_place_for_critic(critic, adapters)
        # Transformers checkpoints gradients in training mode only; all that is random in it is off in a prepared model.
        policy.train()
        if gradient_checkpointing:
            contexts = {} if adapters is None else {"context_fn": adapters.recomputation}
            policy.gradient_checkpointing_enable({"use_reentrant": False} | contexts)
        self.policy, self.adapters = policy, adapters
        # The critic's head is initialised to zero, so building the networks draws no random numbers.
        self.critic = (own_critic or Critic.from_model(policy, histogram)) if critic == "separate" else None
        if own_critic is not None:
            own_critic.train()
            if gradient_checkpointing:
                own_critic.trunk.gradient_checkpointing_enable({"use_reentrant": False})
        self.value_head = make_value_head(policy, histogram) if critic == "shared" else None
        reference = None
        if adapters is not None:
            if critic == "lora":
                adapters.add_critic()
                self.critic = Critic(policy, make_value_head(policy, histogram))
            if with_reference:
                adapters.keep_reference()
                reference = policy
        elif with_reference:
            reference = copy.deepcopy(policy).requires_grad_(False)
        # Not a submodule: neither optimizers nor checkpoints touch the reference.
        object.__setattr__(self, "reference", reference)
        self._resting = Resting(reference) if offload_reference and reference is not None else None
        self.dtypes = {parameter.dtype for parameter in self.parameters()}
        """Types that the networks compute in."""
        self.dtype, self.is_sharded = policy.dtype, False
        self._seen_exact: set[str] = set()
        """What sampling knows that has been seen to be, bit for bit, what a forward pass gives: "logprobs", "values"."""

    def shard(self, sharding: Sharding) -> None:
        """Divide every network among the ranks, before any optimizer is made for it. The networks have to be the same on every rank. From then
        on each rank has to call `forward` and `evaluate` as often as the others."""
        _ = self.reference_sha256, self.base_sha256  # of whole weights
        self.is_sharded = True
        for network in self._networks():
            shard_network(network, sharding)
        for head in self._heads():
            shard_head(head, sharding)

    def start_again(self) -> None:
        """Sharded networks forget what a pass that was broken off has left in them. Every rank has to call it."""
        for root in (*self._networks(), *self._heads()) if self.is_sharded else ():
            start_again(root)

    def _heads(self) -> list[nn.Module]:
        heads = self.value_head, None if self.critic is None else self.critic.head
        return [head for head in heads if head is not None]

    def _networks(self) -> list[PreTrainedModel]:
        """Each once, whoever shares it."""
        trunk = None if self.critic is None else self.critic.trunk
        return list({id(each): each for each in (self.policy, trunk, self.reference) if each is not None}.values())

    def forward(self, rollout: Rollout, *, policy: bool = True, values: bool = True, entropy: bool = True) -> Outputs:
        """Log-probabilities, entropy and values of the batch's actions; differentiable. `policy=False`: values alone, and of
        a shared trunk nothing learns but the value head."""
        asked = {"policy": policy, "values": values, "entropy": entropy}
        if rollout.speakers is None:
            return self._outputs(rollout, **asked)
        order: list[int] = []
        parts = []
        for speaker in dict.fromkeys(rollout.speakers):
            own = [i for i, name in enumerate(rollout.speakers) if name == speaker]
            with self.speaking(speaker):
                parts.append(self._outputs(rollout.select(own), **asked))
            order += own
        return _in_order(parts, order, rollout)

    def _outputs(self, rollout: Rollout, *, policy: bool, values: bool, entropy: bool) -> Outputs:
        """Of sequences of one speaker, who speaks."""
        on_policy = values and self.critic is None
        said = Outputs(None, None, None, None)
        if policy or on_policy:
            said = gathered(self.policy, lambda: self._policy_outputs(rollout, policy, on_policy, entropy))
        if not values or on_policy:
            return said
        with self.speaking("critic"):
            valued = critic_outputs(self.critic, rollout)
        return valued._replace(logprobs=said.logprobs, entropy=said.entropy)

    def _policy_outputs(self, rollout: Rollout, policy: bool, values: bool, entropy: bool) -> Outputs:
        """What the policy's trunk tells: log-probabilities, and the values of a head on it."""
        logprobs = token_entropy = None
        with nullcontext() if policy else torch.no_grad():
            hidden = _hidden(self.policy, rollout)
        if policy:
            out = _head_logprobs(self.policy, hidden, rollout, with_entropy=entropy)
            logprobs, token_entropy = out if entropy else (out, None)
        said = value_outputs(self.value_head, hidden, rollout) if values else Outputs(None, None, None, None)
        return said._replace(logprobs=logprobs, entropy=token_entropy)

    def speaking(self, role: str) -> AbstractContextManager:
        """Inside the block the trunk that is shared by adapters has those of this role."""
        return nullcontext() if self.adapters is None else self.adapters.speaking(role)

    @torch.no_grad()
    def action_states(self, rollout: Rollout) -> Tensor:
        """[N, H]: the policy's hidden states that score the actions."""
        return gathered(self.policy, lambda: _hidden(self.policy, rollout)[_rows(rollout, rollout.actions - 1)])

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """fp32 [N]: the reference's log-probabilities of the actions, at the sampling temperature."""

        def said() -> Tensor:
            return _head_logprobs(self.reference, _hidden(self.reference, rollout), rollout, with_entropy=False)

        with self.speaking("reference"):
            return gathered(self.reference, said)

    @torch.no_grad()
    def evaluate(
        self,
        rollout: Rollout,
        want: Collection[str],
        plan: Plan,
        recompute_logprobs: Literal["auto", "always", "never"] = "auto",
        ranks: Ranks = ALONE,
    ) -> Evaluation:
        """What `want` names of "logprobs", "values", "final_values" and "reference"; every rank runs its own micro-batches and learns of all.

        The micro-batches are those of the plan's first epoch: the same sequences side by side give the same bits there, so that the
        ratio of the first minibatch is exactly 1. It is so too with the log-probs of sampling, where the same kernels made them: "auto"
        takes these, and the values of a shared trunk, without a forward pass, once one has had the same bits for a whole rollout. "never"
        takes the log-probs of sampling as they are.
        """
        if recompute_logprobs == "never":
            found = self._forward(rollout, set(want) - {"logprobs"}, plan, ranks)
            return Evaluation(rollout.action_bounds, logprobs=rollout.logprobs if "logprobs" in want else None, **found)
        sampled = {name: x for name, x in self._sampled_exactly(rollout).items() if name in want}
        trusted = self._seen_exact & sampled.keys() if recompute_logprobs == "auto" else set()
        found = self._forward(rollout, set(want) - trusted, plan, ranks)
        self._seen_exact |= {name for name in sampled.keys() - trusted if torch.equal(found[name], sampled[name])}
        found |= {name: sampled[name] for name in trusted}
        return Evaluation(rollout.action_bounds, **found)

    def _sampled_exactly(self, rollout: Rollout) -> dict[str, Tensor]:
        """What sampling told that the same kernels make in a forward pass. On a GPU heads of values are not among them."""
        trunk = trunk_of(self.policy)
        if trunk is None:
            return {}
        has_values = self.critic is None and rollout.values is not None and trunk.is_on_cpu
        return {"logprobs": rollout.logprobs} | ({"values": rollout.values} if has_values else {})

    def _forward(self, rollout: Rollout, want: Collection[str], plan: Plan, ranks: Ranks) -> dict[str, Tensor]:
        """The fields of an evaluation that `want` asks for, from forward passes over the micro-batches of all ranks."""
        names = {
            "logprobs": "logprobs",
            "values": "values",
            "final_values": "final_values",
            "reference": "ref_logprobs",
        }
        sizes = {"final_values": rollout.num_sequences}
        device = rollout.tokens.device
        found = {
            name: torch.zeros(sizes.get(name, rollout.num_actions), dtype=torch.float32, device=device)
            for wanted, name in names.items()
            if wanted in want
        }
        with nullcontext() if self._resting is None or "reference" not in want else self._resting.awake():
            self._fill(found, rollout, want, plan, ranks)
        ranks.sum_("evaluation", list(found.values()))
        return found

    def _fill(
        self, found: dict[str, Tensor], rollout: Rollout, want: Collection[str], plan: Plan, ranks: Ranks
    ) -> None:
        """From this rank's micro-batches of the plan's first epoch."""
        device = rollout.tokens.device
        for indices in ranks.own(first_epoch(plan)) if found else ():
            if not indices and not self.is_sharded:
                continue
            batch = rollout.select(indices or [0])  # other ranks wait for this one's part of a layer
            actions = on_device(places_in(rollout.action_bounds, indices), device)
            places = {"final_values": on_device(indices, device)}
            valued = bool({"values", "final_values"} & set(want))
            outputs = self(batch, policy="logprobs" in want, values=valued, entropy=False)._asdict()
            if "reference" in want:
                outputs["ref_logprobs"] = self.reference_logprobs(batch)
            for name, tensor in found.items() if indices else ():
                tensor[places.get(name, actions)] = outputs[name].float()

    def trained(self) -> dict[str, nn.Module | TrainedAdapter]:
        """What learns, each with an optimizer and in a checkpoint's file of its own."""
        trained = {"policy": self.policy, "critic": self.critic if self.critic is not None else self.value_head}
        if self.adapters is not None:
            trained["policy"] = self.adapters.trained("policy")
            if self.critic is not None:
                trained["critic"] = self.adapters.trained("critic", head=self.critic.head)
        return {name: module for name, module in trained.items() if module is not None}

    @cached_property
    def reference_sha256(self) -> str | None:
        """Fingerprint of the reference, to notice that a resumed run was given another one. It never changes."""
        if self.adapters is not None:
            own = self.adapters.reference_parameters()
            return weights_sha256(own.items()) if own else None
        return None if self.reference is None else weights_sha256(self.reference.named_parameters())

    def quantize_base(self) -> None:
        """`Adapters.quantize_base`. The fingerprint stays that of the weights as they were."""
        if self.base_sha256 is not None:
            self.adapters.quantize_base()

    @cached_property
    def base_sha256(self) -> str | None:
        """Fingerprint of the frozen weights under the adapters, which no checkpoint holds."""
        return None if self.adapters is None else weights_sha256(self.adapters.base_parameters())


def _in_order(parts: list[Outputs], order: list[int], rollout: Rollout) -> Outputs:
    """What `parts` say of the rollout's sequences, one after another in this order of theirs, in the rollout's own order."""
    if len(parts) == 1:
        return parts[0]
    device = rollout.tokens.device
    sequences = torch.empty(len(order), dtype=torch.int64)
    sequences[order] = torch.arange(len(order))
    shuffled = places_in(rollout.action_bounds, order)
    actions = torch.empty_like(shuffled)
    actions[shuffled] = torch.arange(len(shuffled))
    places = {"final_values": on_device(sequences, device)}
    by_action, found = on_device(actions, device), {}
    for name in Outputs._fields:
        said = [getattr(part, name) for part in parts]
        found[name] = None if said[0] is None else torch.cat(said)[places.get(name, by_action)]
    return Outputs(**found)


def critic_outputs(critic: Critic, rollout: Rollout) -> Outputs:
    """The values of a critic with a trunk of its own, and nothing else; differentiable."""
    return gathered(critic.trunk, lambda: value_outputs(critic.head, _hidden(critic.trunk, rollout), rollout))


def value_outputs(head: ValueHead | HistogramHead, hidden: Tensor, rollout: Rollout) -> Outputs:
    """The values that a head says of hidden states, [R, H], a row for each token that runs."""
    logits = head.logits(hidden) if isinstance(head, HistogramHead) else None
    state_values = head(hidden) if logits is None else head.mean(logits)  # of the state after each token
    ends = on_device(rollout.bounds[1:], state_values.device) - 1
    before, after = _rows(rollout, rollout.actions - 1), _rows(rollout, ends)
    return Outputs(None, None, state_values[before], state_values[after], None if logits is None else logits[before])


def _require_trainable(policy: PreTrainedModel) -> None:
    """Raises ValueError where no gradient can reach the policy."""
    if any(parameter.is_inference() for parameter in policy.parameters()):
        raise ValueError(
            f"{type(policy).__name__} was made inside torch.inference_mode(), where parameters never get gradients: load it outside"
        )
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            f"{type(policy).__name__} has no parameter with requires_grad, expected some that learn: model.requires_grad_(True) frees all"
        )


def _require_place_for_critic(kind: str, adapters: Adapters | None) -> None:
    """Raises ValueError for a critic that cannot be beside this policy."""
    if kind == "lora" and adapters is None:
        raise ValueError(
            "critic.kind is lora, expected another kind where the policy has no adapters (lora.r above 0, or a PeftModel)"
        )
    if kind == "separate" and adapters is not None:
        raise ValueError("critic.kind is separate, expected lora, shared or none where the policy has adapters")


def _hidden(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Those that score an action or follow one."""
    packed = rollout.tokens, rollout.position_ids, rollout.bounds
    return packed_hidden(model, *packed, rollout.shared_prompts, rollout.prompt_lengths)


def _rows(rollout: Rollout, places: Tensor) -> Tensor:
    """The rows of hidden states or values that belong to these packed places."""
    return places if rollout.shared_prompts is None else rollout.shared_prompts.rows[places]


def _head_logprobs(model: PreTrainedModel, hidden: Tensor, rollout: Rollout, with_entropy: bool):
    """The state before token t is hidden[t - 1]: only the rows that score an action go through the head."""
    head = lm_head(model)
    return linear_token_logprobs(
        hidden[_rows(rollout, rollout.actions - 1)],
        head.weight,
        rollout.tokens[rollout.actions],
        head.bias,
        temperature=rollout.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        return_entropy=with_entropy,
        batch_invariant=trunk_of(model) is not None,
    )


def weights_sha256(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Of parameters and their names, whatever their order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named_parameters):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
