"""The loop of a run, whatever its steps are: records, evaluations, checkpoints, signals, and in the end the model and its curves."""

from __future__ import annotations

import dataclasses
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.best import Best
from fastppo.callbacks import Callbacks
from fastppo.config import TrackingConfig
from fastppo.console import Reporter
from fastppo.distributed import ALONE, Ranks, versions
from fastppo.errors import TrainingError
from fastppo.interruption import Interrupted, Interruption, end
from fastppo.learner import Learner
from fastppo.model import load_model, load_tokenizer, prepare_model
from fastppo.model.adapters import Adapters
from fastppo.model.sharding import WholeCopy
from fastppo.model.tensor_parallel import SplitCopy
from fastppo.model.writing import require_writable, write_model
from fastppo.plot import plot_run
from fastppo.roles import Roles, weights_sha256
from fastppo.run_folder import ADAPTER, BEST, MODEL, Onlooker, RunFolder, as_written
from fastppo.run_state import RunState
from fastppo.tracking import Tracking


class RunLoop(ABC):
    """What trainers share. Each sets the attributes below, and says what a step is and how its model is judged."""

    config: Any
    """Its settings, with `output_dir`, `evaluation.every`, `checkpoint` and `tracking` among them."""
    total_steps: int
    recipe: dict[str, Any]
    """What is written to the run folder's `config.yaml`."""
    model: PreTrainedModel
    adapters: Adapters | None = None
    """Of the model, where they alone learn."""
    whole: WholeCopy | SplitCopy | None = None
    """A copy of the model that each rank samples from, alone or as one of a team, and writes, where its weights are divided among the ranks."""
    tokenizer: PreTrainedTokenizerBase
    reporter: Reporter
    learner: Learner
    state: RunState
    ranks: Ranks = ALONE
    """The processes that make the run. Rank 0 records it; the others do the same without a word."""
    callbacks = Callbacks(())
    best: Best | None = None
    """Of the evaluations; None where nothing hangs on which was the best."""
    _interruption: Interruption
    _stop_reason: str | None = None

    # A trainer's own

    @property
    @abstractmethod
    def _evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics of what is held out; a function of the weights and the seed alone."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint is bound to, and every rank has alike."""

    @abstractmethod
    def _train_step(self, folder: RunFolder) -> None:
        """Make one step, and tell `state` that it is done."""

    def _resources(self) -> AbstractContextManager[Any]:
        """What is open while the run goes on; to open it may say what holds for the run."""
        return nullcontext()

    # Public

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state.step

    @property
    def stopped(self) -> str | None:
        """Why the run ends, or has ended, before its last step: a callback's reason, or that nothing improves any more; None where neither is so."""
        return self._stop_reason or (self.best.stopped if self.best else None)

    def stop(self, reason: str) -> None:
        """End the run after the step in hand, as its last step would; for callbacks. `train(resume=True)` goes on from there."""
        self._stop_reason = reason

    @torch.inference_mode(mode=False)
    def train(self, resume: bool = False) -> dict[str, float]:
        """Run to the last step, recording into `output_dir`; with `resume`, go on from its newest checkpoint.

        Returns the last step's metrics. On SIGINT (Ctrl-C), SIGTERM and SIGHUP the update in hand is finished, anything else dropped, and a
        checkpoint is written; then KeyboardInterrupt is raised, or SystemExit with the code 128 + signal. A second signal ends at once.
        Whatever else ends the run, the steps that are done are saved too; `train(resume=True)` goes on, here or in a new process.

        Of several ranks every one calls it. What ends one ends all. Where torchrun has started them again after a failure, they go on from the newest
        checkpoint, whatever `resume` is.

        Raises TrainingError when the run cannot go on, ValueError or CheckpointError where it cannot be recorded or resumed; what was written stays.
        """
        refuse_autocast("train() is called", self.model.device)
        with self.ranks.together("end of the run"):
            return self._train(resume or self.ranks.restarted)

    def _train(self, resume: bool) -> dict[str, float]:
        note = self.reporter.note
        output_dir = self.config.output_dir
        folder = RunFolder(output_dir, resume=resume) if self.ranks.first else Onlooker(output_dir)
        self._stop_reason = None
        with folder.lock(note):
            self.state.begin(folder, self.recipe, resume=resume, evaluate=self._evaluates, note=note)
            self._gather()
            known = {"next_step": self.state.next_record, "resumed": self.step > 0}
            trackers = self.config.tracking if self.ranks.first else TrackingConfig()
            self.tracking = Tracking(trackers, folder, **known, note=note)
            with Interruption() as self._interruption, self.tracking, self.reporter, self._resources():
                try:
                    with self.ranks.together("end of the steps"):
                        metrics = self._run(folder)
                        self.state.wait()
                except BaseException as error:
                    self.state.save_before(error, folder, keep=self.config.checkpoint.keep, note=note)
                    self.ranks.part("last checkpoint")
                    if isinstance(error, Interrupted):
                        end(error)
                    raise
            self._gather()
            if isinstance(self.whole, SplitCopy):
                self.whole.collect(self.model, keep=self.ranks.first)
            if self.ranks.first:
                self._write_model(folder)
                self._plot(folder)
            self.callbacks.call("on_end", self, metrics)
        return metrics

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model and the tokenizer in Transformers' format, its configurations as they came; adapters are merged. Of sharded weights those
        after the last step; where ranks sample together, rank 0 has them once `train` has ended."""
        Path(path).mkdir(parents=True, exist_ok=True)  # an error where it is a file, which Transformers passes over
        holder = self.whole or self
        merged = {} if holder.adapters is None else {"state_dict": holder.adapters.merged_state()}
        if isinstance(holder, SplitCopy):
            merged = {"state_dict": holder.state_dict()}
        write_model(holder.model, self.tokenizer, path, **merged)

    def _gather(self) -> None:
        """Let the copy of sharded weights have what they are now; every rank has to call it."""
        if self.whole is not None:
            self.whole.refresh(self.model)

    # The loop

    def _run(self, folder: RunFolder) -> dict[str, float]:
        """Steps until there are `total_steps`, or the run is stopped; the last one's metrics."""
        metrics: dict[str, float] = {}
        self.callbacks.call("on_begin", self)
        self._agree()
        while self.state.unrecorded is not None or not self._over():
            if self.state.unrecorded is None:
                self._train_step(folder)
            metrics = self._record(folder)
            self._agree()
            if self._due_to_save():
                path = self.state.save(folder, keep=self.config.checkpoint.keep)
                if self.callbacks.hear_of("on_checkpoint"):
                    self.state.wait()
                self.callbacks.call("on_checkpoint", self, path)
                self._agree()
            self._interruption.check()
        if self.step < self.total_steps:
            self.reporter.note(f"ended after step {self.step} of {self.total_steps}: {self.stopped}")
        return metrics

    def _agree(self) -> None:
        """A callback that ends the run on one rank ends it on all."""
        said = self.ranks.exchange("end of a step", self._stop_reason)
        self._stop_reason = next((reason for reason in said if reason is not None), None)

    def _record(self, folder: RunFolder) -> dict[str, float]:
        """Write the metrics of the step that is done, with those of an evaluation where one is due."""
        metrics, at_either_end = self.state.unrecorded, self.step in (0, self.total_steps)
        evaluated = self._evaluates and (at_either_end or self._due(self.config.evaluation.every))
        if evaluated:
            found = self.evaluate()
            if self.best:
                self.best.check(found)
            metrics = metrics | found
        folder.log_metrics(self.step, metrics)
        self.tracking.log(self.step, metrics)
        self.state.unrecorded = None
        if evaluated:
            if self.best:
                self.best.update(self.step, found)
            self.callbacks.call("on_evaluation", self, found)
        if self.step:
            self.reporter.step(self.step, metrics)
            self.callbacks.call("on_step", self, metrics)
        return metrics

    def _over(self) -> bool:
        return self.step >= self.total_steps or self.stopped is not None

    def _due_to_save(self) -> bool:
        regular = self.step > 0 and (self._over() or self._due(self.config.checkpoint.every))
        return regular or (self.best is not None and self.step in self.best.spared)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _write_model(self, folder: RunFolder) -> None:
        name, option, which = MODEL, [], "newest"
        try:
            self.save_pretrained(folder.path / MODEL)
            if self.adapters is not None:
                (self.whole or self).adapters.save(folder.path / ADAPTER)
            if self.best:
                name, option, which = BEST, ["--best"], "best step's"
                policy = self.learner.roles.trained()["policy"] if self.whole is None else self.whole.policy
                self.best.write(policy, self.save_pretrained, folder)
        except Exception as error:  # Transformers and the disk have many
            export = shlex.join(["fastppo", "export", str(folder.path), *option])
            raise TrainingError(
                f"{folder.path / name} could not be written: {error}. The weights are in the {which} checkpoint of {folder.checkpoints}; "
                f"once the cause is gone, `{export}` writes them"
            ) from error

    def _reporter(self, reporter: Reporter) -> Reporter:
        """Rank 0's is the one that shows something."""
        return reporter if self.ranks.first else Reporter(reporter.total_steps, quiet=True)

    def _require_same_ranks(self, roles: Roles) -> None:
        """Raises ValueError naming a setting, a version of a package, or what of model and data differs between ranks. roles: not sharded yet."""
        if self.ranks.size > 1:
            learned = roles.trained().items()
            weights = {f"weights of the {name}": weights_sha256(module.named_parameters()) for name, module in learned}
            self.ranks.require_same(as_written(self.recipe) | versions() | weights | self._identity())

    def _plot(self, folder: RunFolder) -> None:
        try:
            plot_run(folder.path)
        except Exception as error:  # a picture is worth no run
            self.reporter.note(f"no curve.png: {error}")


def default_recipe(config: Any, model: str | os.PathLike | PreTrainedModel) -> dict[str, Any]:
    """The settings of a run that no recipe file describes, with the name of the model that it started from."""
    name = os.path.expanduser(model) if is_name(model) else getattr(model, "name_or_path", None) or ""
    name = os.path.abspath(name) if os.path.isdir(name) else name
    return dataclasses.asdict(config) | {"model": {"name": name}}


def ready_model(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: torch.device,
    ranks: Ranks,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, loaded where it is a name, that fastppo runs and can write, and its tokenizer. Raises ValueError or TypeError where it cannot."""
    if not is_name(model) and not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise TypeError(f"model is {kind}, expected a folder, a hub name or a loaded transformers.PreTrainedModel")
    if tokenizer is None and not is_name(model):
        raise ValueError("tokenizer is None, expected a tokenizer because model is a loaded model, not a name")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model, "model")
    loaded = load_model(model, dtype=dtype, device=device) if is_name(model) else model
    prepared = prepare_model(loaded, device)
    if ranks.first:  # Transformers writes nothing on the others
        require_writable(prepared, tokenizer)
    return prepared, tokenizer


def is_name(model: Any) -> bool:
    return isinstance(model, str | os.PathLike)


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Errors about an argument begin with the name that the caller knows it by, and stay what and where they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        error.args = (f"{argument}: {error}",)
        raise


def refuse_autocast(what: str, device: torch.device) -> None:
    """Its products would be rounded, and only some of them: the sampler's and the losses' kernels are its own."""
    if torch.is_autocast_enabled(device.type):
        kind = torch.get_autocast_dtype(device.type)
        raise ValueError(
            f"{what} inside torch.autocast({device.type!r}, {kind}), expected outside of it: "
            f"a model computes in its weights' type, which `dtype` sets"
        )
