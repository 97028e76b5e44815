"""Supervised fine-tuning: a model imitates examples, packed, by the same learner, records and checkpoints as PPO."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.best import Best
from fastppo.callbacks import Callback, Callbacks
from fastppo.config import CriticConfig, LearnerConfig
from fastppo.console import Reporter
from fastppo.data import PromptSampler
from fastppo.data.example_writer import Example
from fastppo.data.examples import ExampleDataset, load_examples
from fastppo.distributed import device_of, ranks_of, sharding_of
from fastppo.errors import TrainingError
from fastppo.held_out import ONLY, named_sets, prefix_of
from fastppo.interruption import Interruption
from fastppo.learner import Learner, Losses, NonFiniteUpdates
from fastppo.metrics import Clock
from fastppo.model import context_length, lm_head, packed_hidden
from fastppo.model.host import on_device
from fastppo.model.sharding import WholeCopy, gathered
from fastppo.ops import linear_token_logprobs
from fastppo.plan import Lengths, Microbatch, Minibatch, split_microbatches
from fastppo.roles import Roles
from fastppo.rollout.record import bounds_of
from fastppo.run_folder import RunFolder
from fastppo.run_loop import RunLoop, default_recipe, naming, ready_model, refuse_autocast
from fastppo.run_state import RunState, model_identity, token_sha256
from fastppo.sft_config import SFTConfig
from fastppo.tracking import check_installed

SHOWN_STEPS = 100  # of a run, at most; metrics.jsonl has them all


class SFTTrainer(RunLoop):
    """Supervised fine-tuning of a causal language model: the mean negative log-likelihood of the examples' completions is minimised.

    The mean is over all imitated tokens of a minibatch, however it is split into micro-batches; the logits never exist as a whole.

    Args:
        model: a folder (text or `Path`) or hub name, or a loaded Transformers causal LM, which is trained in place.
        examples: list of rows with `prompt` and `completion`, or `messages`; a `datasets.Dataset`, a file or hub name; or, where `ExamplesConfig`
            has settings for them, what `fastppo.data.examples.load_examples(source, tokenizer, ExamplesConfig(...))` makes of these.
        config: every setting; see `SFTConfig`.
        tokenizer: needed with a loaded model; else the model's own by default.
        eval_examples: held-out examples, in the same forms; or several sets of them, a mapping from name to examples.
        callbacks: called between the steps; see `Callback`.
        reporter: where progress is shown; by default a table on a terminal, plain lines elsewhere.
        dtype: weight type when `model` is a name: "auto" is float32 on the CPU, bfloat16 on a GPU.
        recipe: what to write to the run folder's `config.yaml`; by default the settings and the model's name.

    Raises:
        ValueError, TypeError: an argument that cannot be used, or a model that could not be written in the end, before anything is written.
    """

    # The network is to learn, also where the caller has switched gradients off.
    @torch.inference_mode(mode=False)
    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        *,
        examples: Any,
        config: SFTConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_examples: Any = None,
        callbacks: Sequence[Callback] = (),
        reporter: Reporter | None = None,
        dtype: str = "auto",
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.config = config = config or SFTConfig()
        device = device_of(config.device)
        refuse_autocast("SFTTrainer is made", device)
        check_installed(config.tracking)
        self.callbacks = Callbacks(callbacks)
        self.recipe = recipe or default_recipe(config, model)
        self.ranks = ranks_of(config.distributed, device)
        self.model, self.tokenizer = ready_model(model, tokenizer, dtype, device, self.ranks)
        self.examples = self._load(examples, "examples")
        self.held_out = named_sets(eval_examples, "eval_examples", self._load, config.evaluation)
        self._lengths = _lengths(self.examples)
        self.steps_per_epoch = -(-len(self.examples) // config.learner.minibatch_size)
        self.total_steps = config.learner.epochs * self.steps_per_epoch
        every = -(-self.total_steps // SHOWN_STEPS)
        self.reporter = self._reporter(reporter or Reporter(self.total_steps, every=every))
        again = config.learner.gradient_checkpointing
        self.roles = Roles(self.model, critic="none", gradient_checkpointing=again)
        self._require_same_ranks(self.roles)
        sharding = sharding_of(config.distributed, self.ranks, device)
        if sharding is not None:
            self.whole = WholeCopy(self.model)
            self.roles.shard(sharding)
        shared = ("tokens_per_microbatch", "max_skipped_updates", "gradient_checkpointing")
        self.learner = Learner(
            self.roles,
            optimizer=config.optimizer,
            critic=CriticConfig(kind="none"),
            config=LearnerConfig(**{name: getattr(config.learner, name) for name in shared}),
            total_steps=self.total_steps,
            note=self.reporter.note,
            ranks=self.ranks,
        )
        self.sampler = PromptSampler(len(self.examples), config.learner.minibatch_size, config.seed)
        self.best = Best(config.evaluation)
        more = {"best": self.best, "callbacks": self.callbacks}
        self.state = RunState(self.learner, None, self.sampler, self._identity, **more)
        self._interruption = Interruption()

    def evaluate(self) -> dict[str, float]:
        """Of each set of held-out examples `nll`, nats a token over all its imitated tokens, and `perplexity`, its exponential: as `eval/nll`, or
        of a set with a name as `eval/NAME/nll`, and `eval/nll` is then the mean of the sets'."""
        if self.held_out is None:
            raise ValueError("eval_examples is None, expected held-out examples to evaluate on")
        with self.ranks.together("evaluation of the held-out examples"):
            found = {name: self._nll(examples) for name, examples in self.held_out.items()}
        metrics: dict[str, float] = {}
        for name, nll in (found | {ONLY: sum(found.values()) / len(found)}).items():
            perplexity = torch.tensor(nll, dtype=torch.float64).exp().item()
            metrics |= {f"{prefix_of(name)}nll": nll, f"{prefix_of(name)}perplexity": perplexity}
        return metrics

    @torch.no_grad()
    def _nll(self, examples: ExampleDataset) -> float:
        total = count = 0.0
        for indices in self.ranks.own(self._microbatches(examples, range(len(examples)))):
            if not self.roles.is_sharded:
                self._interruption.check()
            elif not indices:
                self._logprobs([examples[0]])  # other ranks wait for this one's part of a layer
            if indices:
                logprobs = self._logprobs([examples[i] for i in indices])
                total, count = total - logprobs.double().sum().item(), count + len(logprobs)
        found = self.ranks.exchange("held-out loss", (total, count))
        return sum(total for total, _ in found) / sum(count for _, count in found)

    # One step

    @property
    def _evaluates(self) -> bool:
        return self.held_out is not None

    def _train_step(self, folder: RunFolder) -> None:
        clock = Clock(self.model.device)
        metrics = self.learner.start_step(self.step)
        done = self.step % self.steps_per_epoch * self.config.learner.minibatch_size
        indices = self.sampler.next(min(self.config.learner.minibatch_size, len(self.examples) - done))
        plan = [[self._microbatches(self.examples, indices)]]
        self.state.wait()  # a rank that is lost in an update costs that step alone
        with clock("time/update"):
            self.state.begin_update()
            try:
                metrics |= self.learner.minimise(self._losses, plan, self._lengths, learned=("policy",))
            except NonFiniteUpdates as error:
                rows = ", ".join(str(self.examples[i].row) for i in indices)
                raise TrainingError(
                    f"{error}, the last of them from the examples of the rows {rows}: lower optimizer.lr"
                ) from error
        metrics["epoch"] = (self.step + 1) / self.steps_per_epoch
        metrics |= clock.metrics(sum(len(self.examples[i].tokens) for i in indices)) | self.ranks.step_metrics()
        self.state.step_done(metrics)

    def _losses(self, roles: Roles, minibatch: Minibatch, own: list[Microbatch] | None = None) -> Losses:
        """Each micro-batch's, or of those in `own`, part of the mean over the whole minibatch."""
        count = sum(len(self._targets(self.examples[i])) for indices in minibatch for i in indices)
        for indices in minibatch if own is None else own:
            loss = -self._logprobs([self.examples[i] for i in indices]).sum() / count
            yield loss, {"loss/nll": loss.detach()}

    def _logprobs(self, examples: Sequence[Example]) -> Tensor:
        """fp32 [N]: of the N imitated tokens of some examples, packed; differentiable."""
        device, lengths = self.model.device, [len(example.tokens) for example in examples]
        bounds, targets = bounds_of(lengths), [self._targets(example) for example in examples]
        tokens = on_device([token for example in examples for token in example.tokens], device)
        positions = on_device([place for length in lengths for place in range(length)], device)
        places = on_device(
            [start + place for start, own in zip(bounds, targets, strict=False) for place in own], device
        )
        firsts = [own[0] for own in targets]  # nothing that stands before them is asked of the head

        def said() -> Tensor:
            hidden = packed_hidden(self.model, tokens, positions, bounds, prompt_lengths=firsts)
            head = lm_head(self.model)
            return linear_token_logprobs(
                hidden[places - 1],
                head.weight,
                tokens[places],
                head.bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
            )

        return gathered(self.model, said)

    def _targets(self, example: Example) -> Sequence[int]:
        """The places of the tokens whose likelihood counts."""
        return range(1, len(example.tokens)) if self.config.learner.loss_tokens == "all" else example.targets

    def _microbatches(self, examples: ExampleDataset, indices: Sequence[int]) -> Minibatch:
        lengths = self._lengths if examples is self.examples else _lengths(examples)
        return split_microbatches(indices, lengths, self.learner.budget.tokens, self.ranks.size)

    # Set-up, checkpoints

    def _load(self, source: Any, name: str) -> ExampleDataset:
        with naming(name):
            dataset = source if isinstance(source, ExampleDataset) else load_examples(source, self.tokenizer)
            return dataset.limited(context_length(self.model), self.model.get_input_embeddings().weight.shape[0])

    def _identity(self) -> dict[str, Any]:
        return model_identity(self.roles) | {
            "seed": self.config.seed,
            "learner.minibatch_size": self.config.learner.minibatch_size,
            "number of examples": len(self.examples),
            "examples_sha256": token_sha256(part for example in self.examples for part in example[:2]),
        }


def _lengths(examples: ExampleDataset) -> Lengths:
    """None shares anything with another."""
    lengths = [len(example.tokens) for example in examples]
    return Lengths(lengths, [0] * len(lengths), range(len(lengths)))
