"""The command line: exit codes, one-line errors, and commands that do what they say."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastppo import Rollout, SamplingParams, cli, gae
from fastppo.checkpoint import list_checkpoints, save_checkpoint
from fastppo.distributed import ALONE
from fastppo.errors import CheckpointError, TrainingError, is_users
from fastppo.ops import use_backend
from fastppo.run_folder import read_metrics
from tests.tiny import make_folder, make_model, make_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RECIPE = """
total_steps: 1
output_dir: '{run}'
model: {{name: {model}}}
data: {{path: {data}}}
reward: {{functions: [{{function: '{reward}'}}]}}
"""


def write_recipe(tmp_path, model="", data="", reward="exact_answer"):
    path = tmp_path / "recipe.yaml"
    values = {
        "model": model or "./no-model",
        "data": data or "./no-data.jsonl",
        "reward": reward,
        "run": tmp_path / "run",
    }
    path.write_text(RECIPE.format(**values))
    return path


def error_of(capsys, *arguments) -> str:
    assert cli.main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastppo: error: ") and captured.err.count("\n") == 1, "one line, no traceback"
    return captured.err


def test_mistakes_are_one_line_each(tmp_path, capsys):
    assert "nowhere.yaml" in error_of(capsys, "train", tmp_path / "nowhere.yaml")
    assert "nearest is lr" in error_of(capsys, "train", write_recipe(tmp_path), "optimizer.lrr=1")
    assert "no-model" in error_of(capsys, "train", write_recipe(tmp_path))
    assert "sqr" in error_of(capsys, "train", write_recipe(tmp_path, reward="math:sqr"))
    assert "data.path is empty" in error_of(capsys, "train", write_recipe(tmp_path), "data.path=")
    assert "no run folder" in error_of(capsys, "plot", tmp_path)


def test_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPPO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", str(tmp_path / "nowhere.yaml")])


def test_info_lists_every_op(capsys):
    """With what serves it on a CPU and on a GPU, whether or not there is one here."""
    from fastppo.ops._backends import BACKENDS, FAST_BACKENDS

    assert cli.main(["info"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.split("Kernels\n")[1].splitlines()[1:]]
    assert [row[0] for row in rows] == list(FAST_BACKENDS)
    assert all(on_cpu in BACKENDS and on_cuda in BACKENDS for _, on_cpu, on_cuda in rows)


def test_every_op_has_a_kernel_for_either_device():
    from fastppo.ops._backends import FAST_BACKENDS

    assert all("cpu" in kernels and len(kernels) == 2 for kernels in FAST_BACKENDS.values())


def test_help_and_version_answer_at_once():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fastppo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "bench" in done.stdout
    code = "import sys, fastppo.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "no Transformers import"
    assert time.perf_counter() - start < 60


@pytest.fixture
def fake_trainer(monkeypatch):
    """Stands for everything below the command line; `outcome` is what `train` returns or raises, `seen` what it was given."""
    fake = SimpleNamespace(outcome={"objective/scores": 0.5}, seen={})

    class Trainer:
        stopped = None
        ranks = ALONE

        def __init__(self, model, **keywords):
            fake.seen = {"model": model, **keywords}

        def train(self, resume=False):
            fake.seen["resume"] = resume
            if isinstance(fake.outcome, BaseException):
                raise fake.outcome
            return fake.outcome

    monkeypatch.setattr("fastppo.trainer.PPOTrainer", Trainer)
    monkeypatch.setattr(cli, "_warn_of_memory", lambda recipe, prompts: None)
    monkeypatch.setattr("fastppo.data.load_train_and_eval", lambda *arguments: ("train", "held out"))
    monkeypatch.setattr(
        "fastppo.model.load_named_tokenizer", lambda name, tokenizer: f"tokenizer of {tokenizer or name}"
    )
    return fake


def test_the_recipe_reaches_the_trainer(tmp_path, fake_trainer, capsys):
    path = write_recipe(tmp_path)
    assert (
        cli.main(["train", str(path), "model.dtype=float32", "model.tokenizer=t", "optimizer.lr=0.5", "--resume"]) == 0
    )
    seen = fake_trainer.seen
    assert (seen["model"], seen["tokenizer"], seen["dtype"]) == (
        str(tmp_path / "no-model"),
        "tokenizer of t",
        "float32",
    )
    assert (seen["prompts"], seen["eval_prompts"], seen["resume"]) == ("train", "held out", True)
    assert seen["config"].optimizer.lr == seen["recipe"]["optimizer"]["lr"] == 0.5 and callable(
        seen["reward"][0].function
    )
    assert "done: reward 0.500" in capsys.readouterr().out


def test_a_folder_that_is_taken_is_noticed_before_anything_is_loaded(tmp_path, fake_trainer, capsys):
    save_checkpoint(make_folder(tmp_path / "run").checkpoints, 1, {}, {}, keep=1)
    arguments = ("train", write_recipe(tmp_path))
    assert "--resume" in error_of(capsys, *arguments) and not fake_trainer.seen
    assert cli.main([*map(str, arguments), "--resume"]) == 0


def unwritable(tmp_path) -> Path:
    """A folder in which nobody can make a file: below a file, whatever the user may do."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


@pytest.mark.parametrize("command", ["train", "sft", "reward-model", "critic"])
def test_a_folder_that_cannot_be_written_to_is_noticed_before_anything_is_loaded(tmp_path, capsys, command):
    """The model's name alone would be an error too, as soon as it is looked at."""
    recipe, folder = tmp_path / "recipe.yaml", unwritable(tmp_path)
    reward = "reward: {functions: [{function: exact_answer}]}\n" if command in ("train", "critic") else ""
    recipe.write_text(f"model: {{name: ./no-model}}\ndata: {{path: ./no-data.jsonl}}\n{reward}")
    more = ["--rollouts", "none.jsonl", "-o", folder] if command == "critic" else [f"output_dir={folder}"]
    printed = error_of(capsys, command, recipe, *more)
    assert (
        f"output_dir is '{folder}', expected a folder that can be written to: {tmp_path / 'file'} is a file" in printed
    )


@pytest.mark.parametrize("command", ["train", "sft", "reward-model", "critic", "serve", "generate", "info"])
def test_a_model_that_is_not_there_is_not_called_the_tokenizer(tmp_path, capsys, command):
    recipe = tmp_path / "recipe.yaml"
    reward = "reward: {functions: [{function: exact_answer}]}\n" if command in ("train", "critic", "serve") else ""
    recipe.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{name: ./no-model}}\ndata: {{path: ./no-data.jsonl}}\n{reward}"
    )
    more = {"critic": ["--rollouts", "none.jsonl"], "generate": ["--prompt", "a"]}.get(command, [])
    by_name = command in ("generate", "info")
    printed = error_of(capsys, command, "./no-model" if by_name else recipe, *more)
    assert re.search(r"model(\.name)? is '.*no-model', expected a folder in Transformers' format", printed)
    if not by_name:
        assert "model.name is empty" in error_of(capsys, command, recipe, *more, "model.name=")


def test_a_finished_run_has_nothing_to_resume(tmp_path, fake_trainer, capsys):
    fake_trainer.outcome = {}
    assert cli.main(["train", str(write_recipe(tmp_path)), "--resume"]) == 0
    assert "raise total_steps" in capsys.readouterr().out


def test_interrupting_a_run_says_how_to_go_on(tmp_path, fake_trainer, capsys):
    """The command that is shown is the one that was given: without its overrides it would look in another folder."""
    fake_trainer.outcome = KeyboardInterrupt()
    recipe, override = write_recipe(tmp_path), f"output_dir={tmp_path / 'a run'}"
    assert cli.main(["train", str(recipe), override]) == 130
    assert "no checkpoint yet" in capsys.readouterr().err
    folder = make_folder(tmp_path / "a run")
    for step in (9, 10):
        save_checkpoint(folder.checkpoints, step, {}, {}, keep=2)
    assert cli.main(["train", str(recipe), override, "--resume"]) == 130
    printed = capsys.readouterr().err
    assert str(tmp_path / "a run" / "checkpoints" / "step-000010") in printed
    assert shlex.split(printed.split("go on with: ")[1]) == ["fastppo", "train", str(recipe), override, "--resume"]


@pytest.mark.parametrize(
    "order",
    [
        ["recipe", "--resume", "seed=3", "lr"],
        ["recipe", "seed=3", "--resume", "lr"],
        ["recipe", "seed=3", "lr", "--resume"],
        ["--resume", "recipe", "seed=3", "lr"],
    ],
    ids=" ".join,
)
def test_flags_and_overrides_in_any_order(tmp_path, fake_trainer, order):
    words = {"recipe": str(write_recipe(tmp_path)), "lr": "optimizer.lr=1e-5"}
    assert cli.main(["train", *(words.get(word, word) for word in order)]) == 0
    config = fake_trainer.seen["config"]
    assert (config.seed, config.optimizer.lr, fake_trainer.seen["resume"]) == (3, 1e-5, True)


def test_ended_by_a_signal_says_how_to_go_on_and_gives_its_code(tmp_path, fake_trainer, capsys):
    fake_trainer.outcome = SystemExit(143)
    assert cli.main(["train", str(write_recipe(tmp_path))]) == 143
    assert "interrupted" in capsys.readouterr().err


@pytest.fixture
def tiny_run(tmp_path, monkeypatch) -> list[str]:
    """`fastppo train` of a recipe with more steps than any test waits for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "ab"}\n' * 8)
    (tmp_path / "r.py").write_text("def f(prompts, completions):\n    return list(map(len, completions))\n")
    text = "device: cpu\nmodel: {name: model}\ndata: {path: data.jsonl}\nreward: {functions: [{function: 'r.py:f'}]}\n"
    text += "rollout: {prompts_per_step: 4, max_new_tokens: 4}\ntotal_steps: 100000\ncheckpoint: {every: 0}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return [sys.executable, "-m", "fastppo", "train", str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'run'}"]


def test_a_real_process_saves_on_sigterm_with_nobody_reading_its_output(tiny_run, tmp_path):
    """Standard output is a pipe that closes after a line, as `| head -1` does."""
    with subprocess.Popen(tiny_run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        process.stdout.close()
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and len(metrics.read_text().splitlines()) < 4:
            time.sleep(0.05)
        process.terminate()
        printed = process.stderr.read()
    assert process.returncode == 143, printed
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    steps = [row["step"] for row in read_metrics(tmp_path / "run")]
    assert list(checkpoints) == [steps[-1]] and len(steps) >= 4
    assert str(checkpoints[steps[-1]]) in printed and "goes on without a display" in printed


def test_a_finished_run_is_done_whatever_becomes_of_its_output(tiny_run, tmp_path):
    """On a full disk the display is lost, and on closed descriptors; records, checkpoint and model are not."""
    for steps, redirect in ((1, ">/dev/full"), (2, "<&- >&- 2>&-")):
        command = shlex.join([*tiny_run, f"total_steps={steps}", "--resume"])
        assert subprocess.run(["bash", "-c", f"{command} {redirect}"]).returncode == 0
        assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == steps
        assert list(list_checkpoints(tmp_path / "run" / "checkpoints"))[-1] == steps
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_export_writes_the_policy_of_a_checkpoint(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main([*tiny_run[3:], "total_steps=2", "checkpoint.every=1"]) == 0
    trained = load_file(run / "model" / "model.safetensors")
    capsys.readouterr()
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in trained.items()) and len(exported) == len(trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()
    assert cli.main(["export", "--step", "1", str(run)]) == 0
    first = load_file(run / "model-step-000001" / "model.safetensors")
    assert any(not torch.equal(first[name], value) for name, value in trained.items())
    capsys.readouterr()
    assert "step is 3, expected one that has a checkpoint: 1, 2" in error_of(capsys, "export", run, "--step", 3)
    assert "is not empty" in error_of(capsys, "export", run, tmp_path / "out")
    beneath = unwritable(tmp_path)
    assert f"folder is '{beneath}', expected a folder that can be" in error_of(capsys, "export", run, beneath)
    assert "no checkpoints" in error_of(capsys, "export", tmp_path / "model")
    other = other_model(tmp_path / "other")
    assert cli.main(["export", str(run), str(tmp_path / "new"), "--model", str(other)]) == 2
    assert "another model" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    (run / "history.jsonl").unlink()
    assert "--model" in error_of(capsys, "export", run, tmp_path / "new")
    assert cli.main(["export", str(run), str(tmp_path / "new"), "--model", str(tmp_path / "model")]) == 0


def other_model(path) -> Path:
    make_model(hidden_size=16).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [CheckpointError, TrainingError, OSError, PermissionError])
def test_what_ends_a_run_is_one_line(tmp_path, fake_trainer, capsys, kind):
    """And shown harmlessly: it may quote what a model wrote."""
    fake_trainer.outcome = kind("two\nlines\x1b[2J")
    printed = error_of(capsys, "train", write_recipe(tmp_path))
    assert "two lines" in printed and "\x1b" not in printed


def refused_argument():
    return SamplingParams(temperature=-1)


def refused_backend():
    with use_backend("abacus"):
        pass


def refused_by_the_check_of_an_op():
    return gae(torch.ones(2), torch.ones(2), gamma=7, lam=1)


def broken_record():
    return Rollout(*[None] * 9)


def wrong_number():
    return int("seven")


def wrong_types():
    return 1 + None


def unequal_lengths():
    return list(zip([1], [], strict=True))


def deep_inside_torch():
    return torch.ones(2).view(3, 3)


def raised_elsewhere():
    raise ValueError("a reward, a data set or a test says so")


def own_modules_do_not_fit():
    return importlib.import_module("fastppo.ops.no_such_module")


FAULTS = (refused_by_the_check_of_an_op, broken_record, wrong_number, wrong_types, unequal_lengths, deep_inside_torch)
FAULTS += (raised_elsewhere, own_modules_do_not_fit)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch, fault):
    """Whatever its class: only what a check of ours says of an argument is the user's."""
    monkeypatch.setattr(cli, "_train", lambda options: fault())
    with pytest.raises((ValueError, TypeError, RuntimeError, ImportError)) as error:
        cli.main(["train", str(write_recipe(tmp_path))])
    assert not is_users(error.value)


@pytest.mark.parametrize(("mistake", "message"), [(refused_argument, "temperature is -1"), (refused_backend, "abacus")])
def test_what_a_check_says_of_an_argument_is_the_users(tmp_path, monkeypatch, capsys, mistake, message):
    monkeypatch.setattr(cli, "_train", lambda options: mistake())
    assert message in error_of(capsys, "train", write_recipe(tmp_path))


def test_bench_gets_its_own_arguments_and_the_same_error_line(monkeypatch, capsys):
    def bench(arguments):
        assert arguments == ["--op", "gae"]
        raise TrainingError("no such op")

    monkeypatch.setitem(sys.modules, "fastppo.bench.__main__", SimpleNamespace(main=bench))
    assert "no such op" in error_of(capsys, "bench", "--op", "gae")


def train(recipe, *arguments) -> int:
    return cli.main(["train", str(recipe), "device=cpu", *map(str, arguments)])


TINY_STEPS = [
    "total_steps=2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=1",
    "rollout.max_new_tokens=16",
    "data.eval_size=4",
]


def test_generate_streams_what_the_engine_samples(stories_model, capsys):
    """The streamed text is that of the same prompt, seed and sequence number sampled beside others."""
    common = ["generate", str(stories_model), "--max-new-tokens", "20", "--seed", "3", "--prompt", "Once upon a time"]
    assert cli.main(common) == 0
    streamed = capsys.readouterr()
    assert cli.main([*common, "-n", "2"]) == 0
    together = capsys.readouterr().out
    assert streamed.out.strip() and streamed.out.strip() == together.split("--- prompt 0\n")[1].strip()
    assert "GB/s" in streamed.err and "new " in streamed.err


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["streamed", "several"])
def test_what_a_model_writes_cannot_drive_the_terminal(tmp_path, capsys, arguments):
    hostile = ["a", *(f"owned{number}\x1b[2J\x1b]0;\x07\x9b31m\u202e" for number in range(15))]
    make_model().save_pretrained(tmp_path)
    make_tokenizer(hostile).save_pretrained(tmp_path)
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--max-new-tokens", "9", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "owned" in printed and not re.search("[\x1b\x07\x9b\u202e]", printed)


def test_generate_names_what_is_no_text(stories_model, capsys, monkeypatch):
    model = str(stories_model)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "standard input is no text in utf-8, expected the prompt" in error_of(capsys, "generate", model)
    # what a command line makes of a byte that is no UTF-8
    assert cli.main(["generate", model, "--prompt", "caf\udce9"]) == 2
    assert "a text holds '\\udce9', half a character" in capsys.readouterr().err


def test_generate_names_mistakes(stories_model, capsys):
    model = str(stories_model)
    assert "max_new_tokens is 0" in error_of(capsys, "generate", model, "--prompt", "a", "--max-new-tokens", "0")
    assert "no chat template" in error_of(capsys, "generate", model, "--prompt", "a", "--chat")
    assert "no such folder" in error_of(capsys, "generate", "./nowhere", "--prompt", "a")


@pytest.mark.usefixtures("curves")
def test_training_a_real_model_from_its_recipe(stories_model, tmp_path, capsys):
    """recipes/stories.yaml on the real pretrained Llama, shortened: runs, records, plots, resumes."""
    run = tmp_path / "run"
    arguments = [*TINY_STEPS, f"model.name={stories_model}", f"output_dir={run}"]
    assert train(RECIPES / "stories.yaml", *arguments) == 0
    assert "done: reward" in capsys.readouterr().out
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "curve.png", "checkpoints", "model"} <= {
        p.name for p in run.iterdir()
    }
    assert cli.main(["plot", str(run), "-o", str(tmp_path / "x.png")]) == 0 and (tmp_path / "x.png").exists()
    assert "--resume" in error_of(capsys, "train", RECIPES / "stories.yaml", *arguments)
    assert train(run / "config.yaml", "total_steps=3", "--resume") == 0


def test_gsm8k_end_to_end_on_a_tiny_model_of_its_architecture(gsm8k_train, gsm8k_test, stories_model, tmp_path):
    """recipes/gsm8k.yaml with a random Qwen2 of two layers: real questions, the real reward, every part of the path."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    files = [f"model.name={tmp_path / 'model'}", f"data.path={gsm8k_train}", f"data.eval_path={gsm8k_test}"]
    assert train(RECIPES / "gsm8k.yaml", *TINY_STEPS, *files, f"output_dir={run}") == 0
    assert (run / "model" / "model.safetensors").exists()
