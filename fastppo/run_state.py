"""Where a run stands between two steps: saved as a checkpoint, and gone on from."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fastppo.ahead import SamplingAhead
from fastppo.algorithms import Algorithm
from fastppo.best import Best
from fastppo.callbacks import Callbacks
from fastppo.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from fastppo.config import PPOConfig
from fastppo.data import PromptDataset, PromptSampler
from fastppo.distributed import LostRank
from fastppo.errors import CheckpointError
from fastppo.learner import Learner
from fastppo.roles import Roles
from fastppo.run_folder import RunFolder
from fastppo.sharded_checkpoint import ShardedCheckpoints

Note = Callable[[str], None]
AHEAD = "sampled_ahead"  # in a checkpoint: the weights that completions in hand were sampled with


class RunState:
    """Counts the steps of a run, saves them and goes back to them.

    Args:
        learner, algorithm, sampler: whose states a checkpoint holds; None where the algorithm has none.
        identity: what a checkpoint is bound to, as `identity` gives it.
        best, callbacks: whose states it holds too, where there are any. The checkpoint of the best step stays.
        ahead: whose weights and state it holds too, where completions are sampled ahead.
    """

    def __init__(
        self,
        learner: Learner,
        algorithm: Algorithm | None,
        sampler: PromptSampler,
        identity: Callable[[], dict[str, Any]],
        best: Best | None = None,
        callbacks: Callbacks | None = None,
        ahead: SamplingAhead | None = None,
    ) -> None:
        self._learner, self._algorithm, self._sampler, self._make_identity = learner, algorithm, sampler, identity
        self._best, self._ranks, self._ahead = best, learner.ranks, ahead
        self._shards = ShardedCheckpoints(self._ranks.timeout) if learner.is_sharded else None
        self._more = {name: part for name, part in {"best": best, "callbacks": callbacks}.items() if part is not None}
        self.step = 0
        self.unrecorded: dict[str, float] | None = None
        """Metrics of the step that is done, while they wait for an evaluation."""
        self.whole = True
        """The weights are those after `step` steps: no update is half done."""
        self._next_prompts = self._prompts_after_update = sampler.state_dict()
        self._saved: int | None = None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return self._make_identity()

    @property
    def next_record(self) -> int:
        """The step whose metrics are the next to be recorded."""
        return self.step + (self.unrecorded is None)

    @property
    def _spared(self) -> set[int]:
        return set() if self._best is None else self._best.spared

    def begin_update(self) -> None:
        """All prompts of the step in hand are drawn; those that are drawn from here on are of later ones."""
        self._prompts_after_update, self.whole = self._sampler.state_dict(), False

    def step_done(self, metrics: dict[str, float]) -> None:
        self.step, self.unrecorded = self.step + 1, metrics
        self._next_prompts, self.whole = self._prompts_after_update, True

    def begin(
        self, folder: RunFolder, settings: Mapping[str, Any], *, resume: bool, evaluate: bool, note: Note
    ) -> None:
        """Put this state and the folder where the run starts, with an evaluation or without, or goes on. Nothing is written before all is
        found to fit."""
        found = self._newest(folder) if resume else None
        if found is not None:
            changes = self._go_back_to(folder, settings, *found)
            note(f"resumed from {found[0]}" + (f", with changes: {'; '.join(changes)}" if changes else ""))
            kept = self._ranks.broadcast("checkpoints that are kept", list(list_checkpoints(folder.checkpoints)))
            if lost := self._spared - set(kept):
                self._best.forget()
                note(f"the best step, {lost.pop()}, has no checkpoint: the best is chosen anew")
            return
        if self.step or not self.whole:
            raise ValueError(
                f"this trainer has trained already, and {folder.path} has no checkpoint to go back to: make a new trainer"
            )
        self._sampler.load_state_dict(self._next_prompts)  # also after a first rollout that was dropped
        if self._best is not None:
            self._best.load_state_dict(None)
        self.unrecorded = {} if evaluate else None
        aside = folder.start(settings)
        if resume:
            where = "" if aside is None else f"; the records of before are in {aside}"
            note(f"no checkpoint in {folder.checkpoints}: starting from step 0{where}")

    def _newest(self, folder: RunFolder) -> tuple[Path, Checkpoint] | None:
        """Rank 0 says which is the newest that is whole; the others read the same one."""
        found = load_latest_checkpoint(folder.checkpoints) if self._ranks.first else None
        path = self._ranks.broadcast("newest checkpoint", None if found is None else found[0])
        return (path, load_checkpoint(path, verify=False)) if found is None and path is not None else found

    def _go_back_to(
        self, folder: RunFolder, settings: Mapping[str, Any], path: Path, checkpoint: Checkpoint
    ) -> list[str]:
        """The settings that are not what they were."""
        tensors, state, step = checkpoint
        if "identity" not in state:
            raise CheckpointError(f"{path} was written by an earlier version of fastppo, expected one of this version")
        saved = state["identity"]
        require_same(saved, self._identity, path)
        self.whole = False
        self._learner.load_state_dict(tensors, state)
        if self._algorithm is not None:
            self._algorithm.load_state_dict(state["algorithm"])
        if saved.get(_PROMPTS) != self._identity.get(_PROMPTS):
            state["sampler"].pop("pools", None)  # of other prompts
        self._sampler.load_state_dict(state["sampler"])
        if self._ahead is not None:
            self._ahead.load_state_dict(tensors.get(AHEAD), state.get(AHEAD), step)
        for name, part in self._more.items():
            part.load_state_dict(state.get(name))
        self.step = self._saved = step
        self._next_prompts, self.unrecorded, self.whole = state["sampler"], state["unrecorded"], True
        changes = folder.resume(settings, step, metrics_step=step if self.unrecorded is None else step - 1)
        return changes + [what for name, what in _DATA.items() if saved.get(name) != self._identity.get(name)]

    def save(self, folder: RunFolder, *, keep: int) -> Path:
        """Returns where. Ranks that have the same weights let the first one write them; sharded ones are written by all, while the run goes on
        (`wait`)."""
        if self._shards is None and not self._ranks.first:
            self._saved = self.step
            return checkpoint_path(folder.checkpoints, self.step)
        return self._write(folder, keep)

    def _write(self, folder: RunFolder, keep: int) -> Path:
        tensors, state = self._learner.state_dict()
        state |= {"sampler": self._next_prompts, "unrecorded": self.unrecorded, "identity": self._identity}
        if self._algorithm is not None:
            state["algorithm"] = self._algorithm.state_dict()
        if self._ahead is not None:
            tensors[AHEAD], state[AHEAD] = self._ahead.state_dict()
        state |= {name: part.state_dict() for name, part in self._more.items()}
        save = save_checkpoint if self._shards is None else self._shards.save
        save(folder.checkpoints, self.step, tensors, state, keep=keep, spared=self._spared)
        self._saved = self.step
        return checkpoint_path(folder.checkpoints, self.step)

    def wait(self) -> None:
        """Until what `save` has begun is whole. Every rank has to call it. Raises CheckpointError where it could not be written."""
        if self._shards is not None:
            self._shards.wait()

    def save_before(self, error: BaseException, folder: RunFolder, *, keep: int, note: Note) -> None:
        """A checkpoint of the steps that the newest one lacks, before `error` ends the run. After a fault no older one is removed for it:
        its weights may be what is wrong."""
        try:
            if not isinstance(error, LostRank):
                self.wait()
            if not self.whole or self.step in (0, self._saved) or isinstance(error, CheckpointError):
                return
            keep = keep if isinstance(error, KeyboardInterrupt) else keep + 1
            if self._shards is not None:
                self._write_parts(error, folder, keep)
            elif self._ranks.first:
                self._write(folder, keep)
            elif isinstance(error, LostRank):
                self._write_as_heir(folder, keep, note)
        except Exception as failure:  # `error` is what the user has to hear of
            note(f"step {self.step} could not be saved: {failure}")

    def _write_parts(self, error: BaseException, folder: RunFolder, keep: int) -> None:
        if isinstance(error, LostRank):
            raise CheckpointError("the lost rank had a part of the weights")
        self._write(folder, keep)
        self.wait()

    def _write_as_heir(self, folder: RunFolder, keep: int, note: Note) -> None:
        """Where rank 0 is the one that is lost, whoever gets its folder saves: raises ValueError where another rank has it."""
        own = RunFolder(folder.path, resume=True)
        with own.lock(note):
            if max(list_checkpoints(own.checkpoints), default=0) < self.step:
                self._write(own, keep)


_REFERENCE, _PROMPTS, _BASE = "reference_sha256", "prompts_sha256", "base_sha256"
_DATA = {
    _PROMPTS: "other prompts",
    "examples_sha256": "other examples",
    "completions_sha256": "other completions or scores",
}
# Of a model's configuration: where it came from, how it is stored, who wrote it, how it is sampled from.
_IRRELEVANT = re.compile(r"_.*|architectures|(torch_)?dtype|transformers_version|use_cache|\w+_token_id")


def identity(config: PPOConfig, roles: Roles, prompts: PromptDataset) -> dict[str, Any]:
    """Setting -> value, as JSON holds it, of all that may not change between a checkpoint and the run that goes on from it: its numbers would
    mean something else. The prompts themselves may: that is only said."""
    critic = config.critic
    return {
        **model_identity(roles),
        "critic.kind": critic.kind,
        "critic.head": critic.head,
        "critic.bins": critic.bins,
        "critic.value_range": None if critic.value_range is None else list(critic.value_range),
        "critic.freeze_attention": critic.freeze_attention,
        "critic": {} if roles.critic is None else model_shape(roles.critic.trunk),
        "reward.kl_coef": "above 0" if config.reward.kl_coef else "0",
        "loss.kl_coef": "above 0" if config.loss.kl_coef else "0",
        "seed": config.seed,
        "number of prompts": len(prompts),
        _PROMPTS: token_sha256(row["prompt_ids"] for row in prompts),
        _REFERENCE: roles.reference_sha256,
        "lora": None if roles.adapters is None else roles.adapters.description(),
        "lora.quantization": config.lora.quantization,
        "lora.seats": [] if roles.adapters is None else [list(seat) for seat in roles.adapters.seats.items()],
        _BASE: roles.base_sha256,
    }


def model_identity(roles: Roles) -> dict[str, Any]:
    """What `identity` holds of the model that is trained."""
    return {"model": model_shape(roles.policy), "model.dtype": str(roles.dtype).removeprefix("torch.")}


def model_shape(model: PreTrainedModel) -> dict[str, Any]:
    """What of a model's configuration its weights mean nothing without."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if not _IRRELEVANT.fullmatch(key)}


def token_sha256(token_lists: Iterable[list[int]]) -> str:
    digest = hashlib.sha256()
    for tokens in token_lists:
        digest.update(array("q", [len(tokens), *tokens]).tobytes())
    return digest.hexdigest()


def require_same(saved: Mapping[str, Any], mine: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises CheckpointError naming every setting that is not the one that `checkpoint` was written with."""
    found = _changes(saved, mine)
    changes = [f"{name} is {new!r}, was {old!r}" for name, (old, new) in found.items() if "sha256" not in name]
    if _BASE in found and not changes:
        changes = ["its adapters are of another base model"]
    if _REFERENCE in found and not changes:
        changes = ["the run started from another reference model"]
    if changes:
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(changes)}. Resume with what the run started with, or choose another output_dir"
        )


def _changes(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (saved, mine), of what both have: another version of Transformers may add keys."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in saved.keys() & mine.keys():
        old, new = saved[name], mine[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {f"{name}.{key}": change for key, change in _changes(old, new).items()}
        elif old != new:
            found[name] = (old, new)
    return dict(sorted(found.items()))
