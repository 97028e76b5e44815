"""A run on a Ray cluster: `python examples/launch/ray_train.py --workers 16 recipes/gsm8k.yaml output_dir=/shared/runs/gsm8k`

Needs pip install 'fastppo[ray]'. Each worker has a GPU (with `--cpu` none) and is one rank; Ray connects them, fastppo does the rest. fastppo,
recipe, model and data lie at the same places on every machine, `output_dir` on a disk that all share. A worker that dies makes Ray start all of
them again, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.run_folder import check_usable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument("--max-failures", type=int, default=3, metavar="N", help="how often workers are started again")
    options = parser.parse_args()
    recipe = str(Path(options.recipe).resolve())
    output_dir = Path(load_recipe(recipe, options.overrides).output_dir).resolve()
    check_usable(output_dir, resume=options.resume)
    trainer = TorchTrainer(
        train,
        # Workers resume: a run that is there is meant to go on, and one that is not there begins.
        train_loop_config={"words": ["train", recipe, *options.overrides, f"output_dir={output_dir}", "--resume"]},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(
            name=output_dir.name,
            storage_path=str(output_dir.parent / "ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    trainer.fit()


def train(config: dict) -> None:
    """One rank."""
    if code := cli.main(config["words"]):
        raise RuntimeError(
            f"fastppo train ended with exit code {code} on rank {ray.train.get_context().get_world_rank()}"
        )


if __name__ == "__main__":
    main()
