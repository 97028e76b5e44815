"""Trains a reward model on pairs of a chosen and a rejected answer (Bradley-Terry), through TRL's RewardTrainer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.calibration import agreement, looks_swapped, plot_calibration
from fastppo.data.preferences import Preference, load_preferences
from fastppo.errors import TrainingError
from fastppo.interruption import Interrupted, Interruption, end
from fastppo.model import load_named_tokenizer, load_reward_model, resolve_device
from fastppo.reward_model_checkpoints import Sealed, SealedCheckpoints
from fastppo.reward_model_config import RewardModelRecipe
from fastppo.rewards.reward_model import RewardModel, most_tokens
from fastppo.run_folder import MODEL, RunFolder, check_usable
from fastppo.run_state import model_shape, require_same, token_sha256

METRICS, PICTURE = "metrics.json", "calibration.png"

Note = Callable[[str], None]


def train_reward_model(recipe: RewardModelRecipe, note: Note = print, *, resume: bool = False) -> dict[str, float]:
    """Train as `recipe` says, write `config.yaml`, `model/`, `metrics.json` and `calibration.png` to its `output_dir`, return the metrics.

    The loss is -log sigmoid(chosen score - rejected score - margin) (Bradley and Terry 1952; the margin of Touvron et al. 2023, arXiv:2307.09288,
    equation 2), plus `training.center_coef` * (chosen score + rejected score)². The metrics are those of `fastppo.calibration.agreement` on the
    held-out pairs, scored by the `RewardModel` that PPO would use, with the number of pairs and the mean and standard deviation of the scores.
    Nothing is written before model and data are found to fit. Checkpoints are written as `checkpoint` says, and where SIGINT (Ctrl-C), SIGTERM or
    SIGHUP comes: the step in hand is finished and saved.

    note: is told of the progress, of pairs that were left out, and of an accuracy so low that chosen and rejected look swapped.
    resume: go on from the newest checkpoint in `output_dir`; on a CPU to the same bits.

    Raises:
        ImportError: TRL is not installed.
        ValueError, TypeError: a setting, a model, a row of the data that cannot be used, or an `output_dir` that holds something.
        CheckpointError: the newest checkpoint is of other settings, or of other numbers of pairs.
        TrainingError: the scores are no longer finite.
        KeyboardInterrupt, SystemExit: a signal has ended it.
    """
    _require_trl()
    check_usable(recipe.output_dir, resume=resume)
    if not recipe.model.name:
        raise ValueError("model.name is empty; the recipe has to set it")
    tokenizer = load_named_tokenizer(recipe.model.name, recipe.model.tokenizer)
    _require_pad_token(tokenizer)
    torch.manual_seed(recipe.seed)  # of the new head
    model = load_reward_model(recipe.model.name, dtype="float32", device=resolve_device(recipe.device), new_head=True)
    train, held_out = load_preferences(
        recipe.data,
        tokenizer,
        max_tokens=min(recipe.training.max_length, most_tokens(model, tokenizer)),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        note=note,
    )
    folder = RunFolder(recipe.output_dir, resume=resume)
    with folder.lock(note):
        checkpoints = SealedCheckpoints(folder.checkpoints, recipe.checkpoint.keep, _identity(recipe, model, train))
        begun = _begin(folder, checkpoints, recipe, resume=resume, note=note)
        with Interruption() as interruption:
            try:
                _train(recipe, model, tokenizer, train, checkpoints, begun, interruption, note)
                with interruption.at_once():
                    metrics, margins = _judged(model, tokenizer, held_out, note)
            except Interrupted as interrupted:
                end(interrupted)
        metrics = {"train_pairs": len(train), **metrics}
        _write(folder.path, model, tokenizer, metrics, margins, note)
    return metrics


def report(metrics: dict[str, float], output_dir: str) -> str:
    """What a training comes to, in one line."""
    return (
        f"done: accuracy {metrics['accuracy']:.3f} on {metrics['held_out_pairs']} held-out pairs, mean margin {metrics['mean_margin']:.3f}, "
        f"calibration error {metrics['calibration_error']:.3f}; model, metrics and picture in {output_dir}"
    )


def _require_trl() -> None:
    try:
        importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"training a reward model needs trl ({error}): pip install fastppo[reward-model]") from error


def _require_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL pads with the end of sequence where there is no pad token."""
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has neither a pad token nor an end of sequence, expected one to pad with: set tokenizer.pad_token and save it"
        )


# A checkpoint holds the optimizer with its rates, and counts steps of so many pairs in an order that the seed decides. The rest may change.
_MAY_CHANGE = ("epochs", "microbatch_size", "gradient_checkpointing")
_PAIRS = "pairs_sha256"


def _identity(recipe: RewardModelRecipe, model: PreTrainedModel, pairs: list[Preference]) -> dict[str, Any]:
    """Setting -> value of what a checkpoint is bound to."""
    training = {name: value for name, value in dataclasses.asdict(recipe.training).items() if name not in _MAY_CHANGE}
    return {
        "model": model_shape(model),
        "seed": recipe.seed,
        **{f"training.{name}": value for name, value in training.items()},
        "number of pairs": len(pairs),
        _PAIRS: token_sha256(ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)),
    }


def _begin(
    folder: RunFolder, checkpoints: SealedCheckpoints, recipe: RewardModelRecipe, *, resume: bool, note: Note
) -> Sealed | None:
    """The checkpoint that the training goes on from, with the folder's records put there; None where it begins."""
    settings, mine = dataclasses.asdict(recipe), checkpoints.identity
    found = checkpoints.newest() if resume else None
    if found is not None:
        require_same(found.identity, mine, found.path)
        changes = folder.resume(settings, found.step)
        changes += ["other pairs"] if found.identity[_PAIRS] != mine[_PAIRS] else []
        note(f"resumed from {found.path}" + (f", with changes: {'; '.join(changes)}" if changes else ""))
    else:
        folder.start(settings)
        if resume:
            note(f"no checkpoint in {folder.checkpoints}: starting from step 0")
    checkpoints.remove_after(0 if found is None else found.step)
    return found


def _train(
    recipe: RewardModelRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
    checkpoints: SealedCheckpoints,
    begun: Sealed | None,
    interruption: Interruption,
    note: Note,
) -> None:
    """TRL encodes and filters nothing: it gets token ids."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from trl import RewardTrainer

    rows = [{"chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids} for pair in pairs]
    if pairs[0].margin is not None:
        rows = [row | {"margin": pair.margin} for row, pair in zip(rows, pairs, strict=True)]
    trainer = RewardTrainer(
        model,
        args=_trl_config(recipe, checkpoints.root, model.device),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_progress(note), _saving(recipe.checkpoint.every, checkpoints, interruption)],
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    trainer.train(resume_from_checkpoint=None if begun is None else str(begun.path))


def _trl_config(recipe: RewardModelRecipe, checkpoints: Path, device: torch.device) -> Any:
    from trl import RewardConfig

    training = recipe.training
    microbatch = min(training.microbatch_size, training.batch_size)
    return RewardConfig(
        output_dir=str(checkpoints),
        num_train_epochs=training.epochs,
        learning_rate=training.lr,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=training.batch_size // microbatch,
        center_rewards_coefficient=training.center_coef or None,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        max_length=None,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        save_strategy="no",  # `_saving` says when
        report_to="none",
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )


def _progress(note: Note) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
            if "accuracy" in logs and "loss" in logs:  # not the summary at the end
                note(
                    f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}, accuracy {logs['accuracy']:.2f}"
                )

    return Progress()


def _saving(every: int, checkpoints: SealedCheckpoints, interruption: Interruption) -> Any:
    from transformers import TrainerCallback

    class Saving(TrainerCallback):
        """Has a checkpoint written every so many steps, after the last one, and where a signal has come, which ends the training."""

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if interruption.number is not None:
                control.should_training_stop = True
            due = every > 0 and state.global_step % every == 0
            control.should_save = due or control.should_training_stop

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            checkpoints.seal(state.global_step)

    return Saving()


def _judged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Preference], note: Note
) -> tuple[dict[str, float], list[float]]:
    """(metrics, the chosen scores less the rejected ones) of the held-out pairs."""
    scores = _scores(model, tokenizer, held_out)
    margins = (scores[0] - scores[1]).tolist()
    metrics = {"held_out_pairs": len(held_out), **agreement(margins)}
    metrics |= {"mean_score": scores.mean().item(), "std_score": scores.std(correction=0).item()}
    if looks_swapped(metrics["accuracy"], len(held_out)):
        note(
            f"accuracy {metrics['accuracy']:.2f} on the held-out pairs is far below one half: chosen and rejected look swapped, in these pairs or in "
            "those that it was trained on"
        )
    return metrics, margins


def _scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Preference]) -> torch.Tensor:
    """fp64 [2, pairs], of the chosen and of the rejected answers. Raises TrainingError where one is not finite."""
    reward, prompts = RewardModel(model, tokenizer), [pair.prompt for pair in pairs]
    scores = [reward(prompts, [pair.chosen for pair in pairs]), reward(prompts, [pair.rejected for pair in pairs])]
    if not all(math.isfinite(score) for side in scores for score in side):
        raise TrainingError("the trained model's scores are not finite: lower training.lr, or training.max_grad_norm")
    return torch.tensor(scores, dtype=torch.float64)


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, float],
    margins: list[float],
    note: Note,
) -> None:
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    try:
        plot_calibration(margins, folder / PICTURE)
    except Exception as error:  # a picture is worth no model
        note(f"no {PICTURE}: {error}")
