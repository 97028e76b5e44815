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
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.calibration import agreement, looks_swapped, plot_calibration
from fastppo.data.preferences import Preference, load_preferences
from fastppo.errors import TrainingError
from fastppo.model import load_reward_model, load_tokenizer, resolve_device
from fastppo.reward_model_config import RewardModelRecipe
from fastppo.rewards.reward_model import RewardModel, most_tokens
from fastppo.run_folder import CONFIG, MODEL, check_usable
from fastppo.yaml_numbers import NumberDumper

METRICS, PICTURE = "metrics.json", "calibration.png"
MARK = "# Settings of a reward model of fastppo\n"

Note = Callable[[str], None]


def train_reward_model(recipe: RewardModelRecipe, note: Note = print) -> dict[str, float]:
    """Train as `recipe` says, write `config.yaml`, `model/`, `metrics.json` and `calibration.png` to its `output_dir`, return the metrics.

    The loss is -log sigmoid(chosen score - rejected score - margin) (Bradley and Terry 1952; the margin of Touvron et al. 2023, arXiv:2307.09288,
    equation 2), plus `training.center_coef` * (chosen score + rejected score)². The metrics are those of `fastppo.calibration.agreement` on the
    held-out pairs, scored by the `RewardModel` that PPO would use, with the number of pairs and the mean and standard deviation of the scores.
    Nothing but an empty folder is written before the model is trained.

    note: is told of the progress, of pairs that were left out, and of an accuracy so low that chosen and rejected look swapped.

    Raises:
        ImportError: TRL is not installed.
        ValueError, TypeError: a setting, a model, a row of the data that cannot be used, or an `output_dir` that holds something.
        TrainingError: the scores are no longer finite.
    """
    _require_trl()
    check_usable(recipe.output_dir)
    if not recipe.model.name:
        raise ValueError("model.name is empty; the recipe has to set it")
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.name)
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
    _train(recipe, model, tokenizer, train, note)
    scores = _scores(model, tokenizer, held_out)
    margins = (scores[0] - scores[1]).tolist()
    metrics = {"train_pairs": len(train), "held_out_pairs": len(held_out), **agreement(margins)}
    metrics |= {"mean_score": scores.mean().item(), "std_score": scores.std(correction=0).item()}
    if looks_swapped(metrics["accuracy"], len(held_out)):
        note(
            f"accuracy {metrics['accuracy']:.2f} on the held-out pairs is far below one half: chosen and rejected look swapped, in these pairs or in "
            "those that it was trained on"
        )
    _write(recipe, model, tokenizer, metrics, margins, note)
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


def _train(
    recipe: RewardModelRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
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
        args=_trl_config(recipe, model.device),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_progress(note)],
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    trainer.train()


def _trl_config(recipe: RewardModelRecipe, device: torch.device) -> Any:
    from trl import RewardConfig

    training = recipe.training
    microbatch = min(training.microbatch_size, training.batch_size)
    return RewardConfig(
        output_dir=recipe.output_dir,
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
        save_strategy="no",
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


def _scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Preference]) -> torch.Tensor:
    """fp64 [2, pairs], of the chosen and of the rejected answers. Raises TrainingError where one is not finite."""
    reward, prompts = RewardModel(model, tokenizer), [pair.prompt for pair in pairs]
    scores = [reward(prompts, [pair.chosen for pair in pairs]), reward(prompts, [pair.rejected for pair in pairs])]
    if not all(math.isfinite(score) for side in scores for score in side):
        raise TrainingError("the trained model's scores are not finite: lower training.lr, or training.max_grad_norm")
    return torch.tensor(scores, dtype=torch.float64)


def _write(
    recipe: RewardModelRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, float],
    margins: list[float],
    note: Note,
) -> None:
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.dump(dataclasses.asdict(recipe), Dumper=NumberDumper, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(MARK + settings, encoding="utf-8")
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    try:
        plot_calibration(margins, folder / PICTURE)
    except Exception as error:  # a picture is worth no model
        note(f"no {PICTURE}: {error}")
