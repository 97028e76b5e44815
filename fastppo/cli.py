"""The command line: fastppo sft | reward-model | critic | train | plan | generate | serve | export | plot | report | doctor | info | bench."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo import __version__
from fastppo.commands.endings import complete, silence_stdout
from fastppo.errors import is_users

if TYPE_CHECKING:
    from fastppo.distributed import Ranks
    from fastppo.recipe_config import Recipe
    from fastppo.run_loop import RunLoop
    from fastppo.sft import SFTTrainer
    from fastppo.sft_config import SFTRecipe
    from fastppo.trainer import PPOTrainer

# Heavy packages are imported inside the commands: `fastppo --help` answers at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 `doctor` found something, 2 a mistake of the user's (one line says which), 130
    interrupted (143 by SIGTERM), 141 nobody reads what is printed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can be told
        return code
    except KeyboardInterrupt:
        print("fastppo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        silence_stdout()
        return 141
    except Exception as error:
        if not is_users(error) or os.environ.get("FASTPPO_TRACEBACK"):
            raise
        from fastppo.console import printable

        text = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"fastppo: error: {text}", file=sys.stderr)
        silence_stdout()
        return 2


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:  # its options are its own
        from fastppo.bench.__main__ import main as bench

        return bench(arguments[1:])
    parser, commands = _parser()
    if arguments and arguments[0] in commands:  # options and other arguments in any order
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    else:
        options = parser.parse_args(arguments)
    return options.command(options)


def _open_streams() -> None:
    """Standard streams that were closed lead nowhere: else the next file that is opened would be standard output. A character that the
    terminal lacks becomes a question mark."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """(the whole, each command's own)"""
    parser = argparse.ArgumentParser(prog="fastppo", description="PPO for language models")
    parser.add_argument("--version", action="version", version=f"fastppo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    sft = add("sft", _sft, "Fine-tune a model on examples, for PPO to begin with.")
    sft.add_argument("recipe", metavar="RECIPE", help="YAML file; see recipes/sft.yaml and fastppo/sft_config.py")
    sft.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    _add_resume(sft)
    train = add("train", _train, "Train as a recipe file says.")
    train.add_argument("recipe", metavar="RECIPE", help="YAML file; see recipes/ and fastppo/recipe_config.py")
    train.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's, e.g. optimizer.lr=1e-5"
    )
    _add_resume(train)
    reward_model = add("reward-model", _reward_model, "Train a reward model on chosen and rejected answers.")
    reward_model.add_argument("recipe", metavar="RECIPE", help="YAML file; see fastppo/reward_model_config.py")
    reward_model.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    _add_resume(reward_model)
    critic = add("critic", _critic, "Pretrain a recipe's critic on stored rollouts.")
    critic.add_argument("recipe", metavar="RECIPE", help="YAML file of the run that the critic is for")
    critic.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    critic.add_argument(
        "--rollouts",
        metavar="FILE",
        action="append",
        required=True,
        help="JSON Lines with prompt_ids, completion_ids and score, such as a run's samples.jsonl; repeatable",
    )
    critic.add_argument(
        "-o",
        "--out",
        metavar="FOLDER",
        help="where to, new or empty (default: the recipe's output_dir with -critic after it)",
    )
    _add_resume(critic)
    plan = add(
        "plan", _plan, "Say what a run needs of memory, time and money on GPUs. Exit code 1 where it does not fit."
    )
    _add_plan(plan)
    generate = add("generate", _generate, "Sample from a model, streaming to the terminal.")
    generate.add_argument("model", metavar="MODEL", help="folder in Transformers' format, or hub name")
    generate.add_argument(
        "--prompt", metavar="TEXT", action="append", help="repeatable; without it, standard input is the prompt"
    )
    generate.add_argument("--chat", action="store_true", help="give the prompt to the model as a user's message")
    generate.add_argument("-n", type=int, default=1, help="completions of each prompt (default 1)")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P")
    generate.add_argument("--stop", metavar="TEXT", action="append", default=[], help="ends a completion; repeatable")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default: float32 on a CPU, bfloat16 on a GPU)"
    )
    _add_search(generate)
    serve = add("serve", _serve, "Offer a model as a server that speaks OpenAI's chat completions.")
    serve.add_argument(
        "model",
        metavar="RECIPE",
        help="recipe, whose model it is once that is trained; or run folder, model folder, hub name",
    )
    serve.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; beyond this machine FASTPPO_API_KEY has to be set (default 127.0.0.1)",
    )
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    export = add("export", _export, "Write the policy of a run's newest checkpoint, or of another, as a model folder.")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("folder", metavar="FOLDER", nargs="?", help="where to (default: model in the run folder)")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    export.add_argument("--best", action="store_true", help="the checkpoint of the best step (evaluation.keep_best)")
    export.add_argument(
        "--model", metavar="MODEL", help="what the run started from, where its config.yaml does not say"
    )
    export.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, in peft's format")
    info = add("info", _info, "Print versions, devices, and which backend serves each op here and why others do not.")
    info.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="say of this model instead how large it is and what ends its completions",
    )
    plot = add("plot", _plot, "Draw the curves of a run, or of several over each other.")
    plot.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    plot.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="picture to write (default: curve.png in the run folder; of several runs curves.png here)",
    )
    report = add(
        "report", _report, "Write a run as one HTML file: curves, settings, samples with every token's numbers."
    )
    report.add_argument("run", metavar="RUN", help="run folder")
    report.add_argument("-o", "--out", metavar="FILE", help="file to write (default: report.html in the run folder)")
    doctor = add(
        "doctor", _doctor, "Say what went wrong in a run, and which setting to try. Exit code 1 if anything did."
    )
    doctor.add_argument("run", metavar="RUN", help="run folder")
    commands.add_parser("bench", help="Time every op against plain PyTorch (python -m fastppo.bench).", add_help=False)
    return parser, commands.choices


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("model", metavar="MODEL", help="folder in Transformers' format, or hub name; no weights are read")
    plan.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="YAML file of the run (default: all settings as they are by default)",
    )
    plan.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's")
    plan.add_argument(
        "--gpus", type=int, metavar="N", help="how many, 1 to 1024 (default: a line for each of 1, 2, 4, ..., 1024)"
    )
    plan.add_argument(
        "--gpu",
        default="h200",
        metavar="NAME",
        help="a100, h100, h200, b200, l40s, rtx4090, ..., or cpu (default h200)",
    )
    plan.add_argument(
        "--sharding",
        choices=("none", "full"),
        help="whole weights on each GPU, or spread over all (default: none where it fits)",
    )
    plan.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="longest prompt (default: data.max_prompt_tokens, or 512)"
    )
    plan.add_argument("--price", type=float, metavar="P", help="of one GPU for an hour, in any currency: adds the cost")
    plan.add_argument(
        "--network", type=float, default=50.0, metavar="GB/s", help="from a GPU to other nodes (default 50: 400 Gb/s)"
    )


def _add_search(generate: argparse.ArgumentParser) -> None:
    search = generate.add_argument_group("search", "for one good answer to each prompt; docs/search.md")
    search.add_argument(
        "--search",
        choices=("majority", "best-of-n", "value-guided", "puct"),
        help="what most of -n answers say, or the one that the critic likes best; its choice of each token; a tree of steps",
    )
    search.add_argument(
        "--critic", metavar="RUN", help="run folder whose newest checkpoint has the critic; MODEL is its policy"
    )
    search.add_argument(
        "--answer", metavar="REGEX", help="majority: what an answer says is the last match, or its first group"
    )
    search.add_argument(
        "--budget", type=int, metavar="N", help="most tokens for an answer (default 8 times --max-new-tokens)"
    )
    search.add_argument(
        "--width", type=int, metavar="N", help="tokens looked at (default 8), or steps sampled at a time (2)"
    )
    search.add_argument(
        "--step", metavar="TEXT", action="append", help="puct: ends a step; repeatable (default a newline)"
    )
    search.add_argument("--step-tokens", type=int, metavar="N", help="puct: longest step (default 64)")
    search.add_argument("--simulations", type=int, metavar="N", help="puct: descents for each step (default 32)")
    search.add_argument("--c-puct", type=float, metavar="C", help="puct: weight of prior and novelty (default 1)")


def _train(options: argparse.Namespace) -> int:
    from fastppo.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    with _connected(recipe) as ranks:
        trainer = _ppo_trainer(recipe, options, ranks)
    result = ["reward", "eval/scores", "objective/scores"]
    return _run_to_the_end(trainer, options, recipe.output_dir, command="train", length="total_steps", result=result)


def _ppo_trainer(recipe: Recipe, options: argparse.Namespace, ranks: Ranks) -> PPOTrainer:
    import dataclasses

    from fastppo.recipe import resolve_environment, resolve_rewards
    from fastppo.run_folder import check_usable

    environment = resolve_environment(recipe.environment)
    paid_by = [] if environment is not None else [("reward", "functions")]
    _require_set(recipe, ("model", "name"), ("data", "path"), *paid_by)
    if ranks.first:  # before minutes go by in loading a model
        check_usable(recipe.output_dir, resume=options.resume or ranks.restarted)
    reward = resolve_rewards(recipe.reward) or None

    from fastppo.data import load_train_and_eval
    from fastppo.model import load_named_tokenizer
    from fastppo.trainer import PPOTrainer

    tokenizer = load_named_tokenizer(recipe.model.name, recipe.model.tokenizer)
    train, held_out = load_train_and_eval(recipe.data, tokenizer)
    if ranks.size == 1:
        _warn_of_memory(recipe, train)
    return PPOTrainer(
        recipe.model.name,
        reward=reward,
        environment=environment,
        prompts=train,
        eval_prompts=held_out,
        config=recipe,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        recipe=dataclasses.asdict(recipe),
    )


@contextmanager
def _connected(recipe: Recipe | SFTRecipe) -> Iterator[Ranks]:
    """This process among those that torchrun has started; what goes wrong in one of them inside ends all."""
    from fastppo.distributed import device_of, ranks_of

    ranks = ranks_of(recipe.distributed, device_of(recipe.device))
    with ranks.together("the run's preparation"):
        yield ranks


def _warn_of_memory(recipe: Recipe, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Of a run by itself. A model that cannot be planned for is none that cannot be trained."""
    from fastppo.console import printable
    from fastppo.sizing import memory_warning

    with suppress(ValueError):
        if warning := memory_warning(recipe, max(len(row["prompt_ids"]) for row in prompts)):
            print(printable(f"fastppo: {warning}"), file=sys.stderr)


def _run_to_the_end(
    trainer: RunLoop, options: argparse.Namespace, output_dir: str, *, command: str, length: str, result: list[str]
) -> int:
    """Train, and print what came of it: what it is called, and its metrics, of which the first that there is counts. length: the setting that
    makes a run longer."""

    def train() -> str | None:
        metrics = trainer.train(resume=options.resume)
        if not trainer.ranks.first:
            return None
        if not metrics:
            return f"nothing to do: {output_dir} {_why_over(trainer.stopped, length)}"
        title, *names = result
        found = next(metrics[name] for name in names if name in metrics)
        return f"done: {title} {found:.3f}; model, metrics and curve in {output_dir}"

    words = ["fastppo", command, options.recipe, *options.overrides]
    return complete(train, words, lambda: _newest_checkpoint(output_dir), first=trainer.ranks.first)


def _require_set(recipe: object, *settings: tuple[str, str]) -> None:
    for section, key in settings:
        if not getattr(getattr(recipe, section), key):
            raise ValueError(f"{section}.{key} is empty; the recipe has to set it")


def _why_over(stopped: str | None, length: str) -> str:
    if stopped is None:
        return f"has all its steps; to go on, raise {length}"
    return f"has ended early, {stopped}; to go on, raise evaluation.patience"


def _newest_checkpoint(output_dir: str) -> Path | None:
    from fastppo.checkpoint import list_checkpoints
    from fastppo.run_folder import CHECKPOINTS

    return next(reversed(list_checkpoints(Path(output_dir).expanduser() / CHECKPOINTS).values()), None)


def _plan(options: argparse.Namespace) -> int:
    from fastppo.commands import plan

    return plan.run(options)


def _sft(options: argparse.Namespace) -> int:
    from fastppo.recipe import load_recipe
    from fastppo.sft_config import SFTRecipe

    recipe = load_recipe(options.recipe, options.overrides, SFTRecipe)
    with _connected(recipe) as ranks:
        trainer = _sft_trainer(recipe, options, ranks)
    result = ["loss", "eval/nll", "loss/nll"]
    return _run_to_the_end(trainer, options, recipe.output_dir, command="sft", length="learner.epochs", result=result)


def _sft_trainer(recipe: SFTRecipe, options: argparse.Namespace, ranks: Ranks) -> SFTTrainer:
    import dataclasses

    from fastppo.run_folder import check_usable

    _require_set(recipe, ("model", "name"), ("data", "path"))
    if ranks.first:  # before minutes go by in loading a model
        check_usable(recipe.output_dir, resume=options.resume or ranks.restarted)

    from fastppo.data.examples import load_train_and_eval_examples
    from fastppo.model import load_named_tokenizer
    from fastppo.sft import SFTTrainer

    tokenizer = load_named_tokenizer(recipe.model.name, recipe.model.tokenizer)
    train, held_out = load_train_and_eval_examples(recipe.data, tokenizer)
    return SFTTrainer(
        recipe.model.name,
        examples=train,
        eval_examples=held_out,
        config=recipe,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        recipe=dataclasses.asdict(recipe),
    )


def _reward_model(options: argparse.Namespace) -> int:
    from fastppo.distributed import refuse_several
    from fastppo.recipe import load_recipe
    from fastppo.reward_model_checkpoints import newest_checkpoint
    from fastppo.reward_model_config import RewardModelRecipe
    from fastppo.reward_model_training import report, train_reward_model

    recipe = load_recipe(options.recipe, options.overrides, RewardModelRecipe)
    refuse_several("fastppo reward-model")

    def train() -> str:
        return report(train_reward_model(recipe, resume=options.resume), recipe.output_dir)

    words = ["fastppo", "reward-model", options.recipe, *options.overrides]
    return complete(train, words, lambda: newest_checkpoint(recipe.output_dir), first=True)


def _critic(options: argparse.Namespace) -> int:
    from fastppo.critic_training import report, train_critic
    from fastppo.distributed import refuse_several
    from fastppo.recipe import load_recipe

    refuse_several("fastppo critic")
    recipe = load_recipe(options.recipe, options.overrides)
    out = options.out or f"{recipe.output_dir.rstrip('/')}-critic"

    def train() -> str:
        return report(train_critic(recipe, options.rollouts, out, resume=options.resume), options.recipe)

    rollouts = [word for path in options.rollouts for word in ("--rollouts", path)]
    where = [] if options.out is None else ["-o", options.out]
    words = ["fastppo", "critic", options.recipe, *options.overrides, *rollouts, *where]
    return complete(train, words, lambda: _newest_checkpoint(out), first=True)


def _export(options: argparse.Namespace) -> int:
    from fastppo.export import export_run

    chosen = {"step": options.step, "best": options.best, "model": options.model, "adapter": options.adapter}
    print(export_run(options.run, options.folder, **chosen))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from fastppo.plot import plot_run, plot_runs

    if len(options.runs) == 1:
        print(plot_run(options.runs[0], options.out))
    else:
        print(plot_runs(options.runs, options.out or "curves.png"))
    return 0


def _report(options: argparse.Namespace) -> int:
    from fastppo.report import write_report

    print(write_report(options.run, options.out))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from fastppo.console import printable
    from fastppo.doctor import examine_run

    diagnosis = examine_run(options.run)
    print(printable(diagnosis.text()))
    return 1 if diagnosis.findings else 0


def _generate(options: argparse.Namespace) -> int:
    from fastppo.commands import generate

    return generate.run(options)


def _serve(options: argparse.Namespace) -> int:
    from fastppo.commands import serve

    return serve.run(options)


def _info(options: argparse.Namespace) -> int:
    from fastppo.commands import info

    return info.run(options)
