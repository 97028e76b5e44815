"""The command line: fastppo train | generate | export | plot | info | bench."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastppo.errors import is_users

if TYPE_CHECKING:
    from transformers import TextStreamer

    from fastppo.ops._backends import OpStatus
    from fastppo.rollout import Engine

# Heavy packages are imported inside the commands: `fastppo --help` answers at once.

EXTRAS = {
    "data": "datasets",
    "math": "math_verify",
    "bleu": "sacrebleu",
    "json-schema": "jsonschema",
    "reasoning-gym": "reasoning_gym",
    "plot": "matplotlib",
    "flash-attn": "flash_attn",
}
NOT_INSTALLED = "not installed"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 a mistake of the user's (one line says which), 130 interrupted (143 by SIGTERM), 141
    nobody reads what is printed."""
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
        _silence_stdout()
        return 141
    except Exception as error:
        if not is_users(error) or os.environ.get("FASTPPO_TRACEBACK"):
            raise
        from fastppo.console import printable

        text = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"fastppo: error: {text}", file=sys.stderr)
        _silence_stdout()
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


def _silence_stdout() -> None:
    """What is still in its buffer is lost; the exit of Python would complain of it."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_stdout(text: str = "") -> None:
    """Print what a run ends with, or what is left of it: the run is over, whether or not anybody reads this."""
    from fastppo.console import printable

    try:
        print(printable(text), end="\n" if text else "", flush=True)
    except OSError:
        _silence_stdout()


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """(the whole, each command's own)"""
    parser = argparse.ArgumentParser(prog="fastppo", description="PPO for language models")
    parser.add_argument("--version", action="version", version=f"fastppo {_version('fastppo')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    train = add("train", _train, "Train as a recipe file says.")
    train.add_argument("recipe", metavar="RECIPE", help="YAML file; see recipes/ and fastppo/config.py")
    train.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace the recipe's, e.g. optimizer.lr=1e-5"
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
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
    export = add("export", _export, "Write the policy of a run's newest checkpoint as a model folder.")
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument("folder", metavar="FOLDER", nargs="?", help="where to (default: model in the run folder)")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    export.add_argument(
        "--model", metavar="MODEL", help="what the run started from, where its config.yaml does not say"
    )
    info = add("info", _info, "Print versions, devices, and which backend serves each op here and why others do not.")
    info.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="say of this model instead how large it is and what ends its completions",
    )
    plot = add("plot", _plot, "Draw the curves of a run.")
    plot.add_argument("run", metavar="RUN", help="run folder")
    plot.add_argument("-o", "--out", metavar="FILE", help="picture to write (default: curve.png in the run folder)")
    commands.add_parser("bench", help="Time every op against plain PyTorch (python -m fastppo.bench).", add_help=False)
    return parser, commands.choices


def _train(options: argparse.Namespace) -> int:
    import dataclasses

    from fastppo.recipe import load_recipe, resolve_rewards
    from fastppo.run_folder import check_usable

    recipe = load_recipe(options.recipe, options.overrides)
    for section, key in (("model", "name"), ("data", "path"), ("reward", "functions")):
        if not getattr(getattr(recipe, section), key):
            raise ValueError(f"{section}.{key} is empty; the recipe has to set it")
    check_usable(recipe.output_dir, resume=options.resume)  # before minutes go by in loading a model
    reward = resolve_rewards(recipe.reward)

    from fastppo.data import load_train_and_eval
    from fastppo.model import load_tokenizer
    from fastppo.trainer import PPOTrainer

    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.name)
    train, held_out = load_train_and_eval(recipe.data, tokenizer)
    trainer = PPOTrainer(
        recipe.model.name,
        reward=reward,
        prompts=train,
        eval_prompts=held_out,
        config=recipe,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        recipe=dataclasses.asdict(recipe),
    )
    try:
        metrics = trainer.train(resume=options.resume)
    except (KeyboardInterrupt, SystemExit) as end:
        with suppress(OSError):  # a terminal that is gone
            print(f"fastppo: interrupted; {_how_to_go_on(options, recipe.output_dir)}", file=sys.stderr)
        _settle_stdout()
        return end.code if isinstance(end, SystemExit) else 130
    if not metrics:
        _settle_stdout(
            f"nothing to do: {recipe.output_dir} has all its {recipe.total_steps} steps; to go on, raise total_steps"
        )
        return 0
    reward_now = metrics.get("eval/scores", metrics["objective/scores"])
    _settle_stdout(f"done: reward {reward_now:.3f}; model, metrics and curve in {recipe.output_dir}")
    return 0


def _how_to_go_on(options: argparse.Namespace, output_dir: str) -> str:
    """Where the newest checkpoint is, and the command that resumes from it: the same one, overrides included."""
    from fastppo.checkpoint import list_checkpoints
    from fastppo.run_folder import CHECKPOINTS

    checkpoints = list(list_checkpoints(f"{output_dir}/{CHECKPOINTS}").values())
    if not checkpoints:
        return "no step is done, so there is no checkpoint yet"
    command = shlex.join(["fastppo", "train", options.recipe, *options.overrides, "--resume"])
    return f"the last checkpoint is {checkpoints[-1]}; go on with: {command}"


def _generate(options: argparse.Namespace) -> int:
    import torch

    from fastppo.console import printable
    from fastppo.model import load_model, load_tokenizer
    from fastppo.model.decoding import decodable, decode
    from fastppo.rollout import Engine, SamplingParams

    sampling = SamplingParams(
        n=options.n,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        max_new_tokens=options.max_new_tokens,
        stop_strings=tuple(options.stop),
        seed=options.seed,
    )
    prompts = options.prompt or [sys.stdin.read() if sys.stdin else ""]
    tokenizer = load_tokenizer(options.model)
    if options.chat:
        prompts = [_as_message(tokenizer, text) for text in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(load_model(options.model, dtype=options.dtype, device=device), tokenizer)
    if len(prompts) * options.n == 1:
        streamer = _streamer(tokenizer)

        def show(new: list[tuple[int, int]]) -> None:
            for token in decodable(tokenizer, [token for _, token in new]):
                streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))

        engine.generate(prompts, sampling, on_tokens=show)
        streamer.end()
    else:
        with _rollout_bar(engine) as progress:
            rollout = engine.generate(prompts, sampling, progress=progress)
        texts = [decode(tokenizer, ids, skip_special_tokens=True) for ids in rollout.completions()]
        for index, text in zip(rollout.prompt_index.tolist(), texts, strict=True):
            print(f"--- prompt {index}\n{printable(text)}")
    stats = engine.stats
    print(
        f"prompt {stats.prefill_tokens} tokens, {stats.prefill_tokens_per_second:,.0f} a second; "
        f"new {stats.decode_tokens_per_second:,.0f} a second, {stats.decode_bytes_per_second / 1e9:.1f} GB/s",
        file=sys.stderr,
    )
    return 0


def _streamer(tokenizer) -> TextStreamer:
    """Prints completions as they grow, without what could drive the terminal."""
    from transformers import TextStreamer

    from fastppo.console import printable

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Printer(tokenizer, skip_special_tokens=True)


@contextmanager
def _rollout_bar(engine: Engine) -> Iterator[Callable[[int, int], None]]:
    """A bar of finished sequences and new tokens a second on a terminal's standard error; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, description=f"{engine.stats.tokens_per_second:,.0f} tok/s"
        )


def _as_message(tokenizer, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError("--chat: this model's tokenizer has no chat template")
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]


def _export(options: argparse.Namespace) -> int:
    from fastppo.export import export_run

    print(export_run(options.run, options.folder, step=options.step, model=options.model))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from fastppo.plot import plot_run

    print(plot_run(options.run, options.out))
    return 0


def _info_model(name: str) -> int:
    """From its configurations and tokenizer alone: the weights are not read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastppo.console import printable
    from fastppo.model import context_length, ending_ids, load_outline, load_tokenizer
    from fastppo.model.decoding import token_text
    from fastppo.model.parts import why_not_parts

    model, tokenizer = load_outline(name), load_tokenizer(name)
    facts = Table(box=None, show_header=False)
    facts.add_row("architecture", type(model).__name__)
    facts.add_row("parameters", f"{model.num_parameters():,}")
    facts.add_row("context", f"{context_length(model) or 'no limit'}")
    reason = why_not_parts(model)
    facts.add_row(
        "layers", "built as Llama's: our kernels run them" if reason is None else f"its own modules run: {reason}"
    )
    facts.add_row("chat template", "yes" if getattr(tokenizer, "chat_template", None) else "no")
    for token, places in ending_ids(model, tokenizer).items() or {None: []}.items():
        text = "nothing" if token is None else f"{token_text(tokenizer, token)} ({token}): {', '.join(places)}"
        facts.add_row("ends with", Text(printable(text)))
    Console(highlight=False, soft_wrap=True).print(facts)
    return 0


def _info(options: argparse.Namespace) -> int:
    if options.model is not None:
        return _info_model(options.model)
    import platform

    import torch
    from rich.console import Console
    from rich.table import Table

    from fastppo import native
    from fastppo.integrations import PATCHED
    from fastppo.ops._backends import describe

    console = Console(highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False)
    for package in ("fastppo", "torch", "triton", "transformers", "numpy"):
        facts.add_row(package, _version(package))
    facts.add_row("python", platform.python_version())
    facts.add_row(
        "CPU kernels", native.unavailable_reason or f"built, {native.cpu_isa()}, {torch.get_num_threads()} threads"
    )
    facts.add_row("CUDA kernels", native.cuda_unavailable_reason() or "built")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(gpus) or "none")
    installed = [name for name, module in EXTRAS.items() if find_spec(module)]
    facts.add_row("extras", ", ".join(installed) or "none")
    missing = [name for name in EXTRAS if name not in installed]
    facts.add_row("not installed", ", ".join(missing) or "none")
    peers = [f"{name} {found}" for name in PATCHED.values() if (found := _version(name)) != NOT_INSTALLED]
    facts.add_row("drop-in for", ", ".join(peers) or "none that is installed")
    console.print(facts)
    table = Table("op", "on CPU tensors", "on CUDA tensors", title="\nKernels", title_justify="left", box=None)
    for on_cpu, on_cuda in zip(describe("cpu"), describe("cuda"), strict=True):
        table.add_row(on_cpu.op, _backend(on_cpu), _backend(on_cuda))
    console.print(table)
    return 0


def _backend(status: OpStatus) -> str:
    """Its name, and where plain PyTorch serves the reasons too."""
    return status.backend if status.backend != "reference" else f"reference ({'; '.join(status.reasons.values())})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
