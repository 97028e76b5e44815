"""What users set around fastppo for reasons of their own changes neither what it computes nor what it keeps, or is refused by name.

Each is a habit or a report of users of this or other trainers.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import runpy
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

import fastppo
from fastppo import Engine, PPOConfig, PPOTrainer, SamplingParams
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a, tiny_config

SAMPLING = SamplingParams(n=2, max_new_tokens=6)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.roles.state_dict().items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The weights of a run where nothing is set."""
    config = tiny_config(tmp_path_factory.mktemp("plain"), reward__kl_coef=0.05, total_steps=1)
    trainer = PPOTrainer(make_model(), reward=count_a, prompts=PROMPTS, config=config, tokenizer=make_tokenizer())
    trainer.train()
    return weights(trainer)


@contextmanager
def random_numbers():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def shallow_stack():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(500)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@contextmanager
def tracing():
    """As debuggers and coverage do."""
    previous = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        yield
    finally:
        sys.settrace(previous)


NO_GRADIENTS = {
    "inference mode (LlamaFactory#220, trl#2983)": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients off for the thread": lambda: torch.set_grad_enabled(False),
}
OTHERS = {
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "random numbers of the user's": random_numbers,
    "a low recursion limit": shallow_stack,
    "a tracer": tracing,
}


@pytest.mark.parametrize("around", [*NO_GRADIENTS.values(), *OTHERS.values()], ids=[*NO_GRADIENTS, *OTHERS])
def test_a_run_is_the_same_inside(make_trainer, expected, around):
    model = make_model()
    with around():
        trainer = make_trainer(model=model, reward__kl_coef=0.05, total_steps=1)
        trainer.train()
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("inside", ["the trainer is made", "it trains"])
@pytest.mark.parametrize("around", NO_GRADIENTS.values(), ids=NO_GRADIENTS)
def test_gradients_are_on_wherever_they_are_switched_off(make_trainer, expected, around, inside):
    """What is made in inference mode cannot learn outside, and the other way round."""
    model = make_model()
    with around() if inside == "the trainer is made" else nullcontext():
        trainer = make_trainer(model=model, reward__kl_coef=0.05, total_steps=1)
    with around() if inside == "it trains" else nullcontext():
        trainer.train()
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_the_trainer_is_refused_by_name(make_trainer):
    """It would round some products and not others, and so train on log-probs of another model than the one sampled from."""
    named = (
        r"inside torch.autocast\('cpu', torch.bfloat16\), expected outside of it: .* weights' type, which `dtype` sets"
    )
    trainer = make_trainer(total_steps=1)
    with bf16_autocast():
        with pytest.raises(ValueError, match=rf"^PPOTrainer is made {named}"):
            make_trainer(total_steps=1)
        with pytest.raises(ValueError, match=rf"^train\(\) is called {named}"):
            trainer.train()
    trainer.train()


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_sampling_under_autocast_is_sampling_without(activation):
    """With steps of our own, and with the model's modules (which take any activation)."""
    model = make_model(hidden_act=activation)
    expected = Engine(model).generate([[2, 3]], SAMPLING)
    with bf16_autocast():
        rollout = Engine(model).generate([[2, 3]], SAMPLING)
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.logprobs, expected.logprobs)


def test_a_reward_that_switches_gradients_off_does_not_stop_the_updates(make_trainer, expected):
    """Reward models are run that way, in this process for their GPU."""

    def reward(prompts, completions, **_):
        torch.set_grad_enabled(False)
        return count_a(prompts, completions)

    try:
        trainer = make_trainer(reward, reward__kl_coef=0.05, total_steps=1)
        trainer.train()
    finally:
        torch.set_grad_enabled(True)
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("many_turns", [False, True])
@pytest.mark.parametrize("family", ["parts", "modules"])
def test_what_is_sampled_in_inference_mode_can_be_trained_on(family, many_turns):
    """Its tensors were such that autograd refuses to save, and a session opened inside could not go on outside (trl#2983, unsloth#2434)."""
    model = make_model() if family == "parts" else make_model().double()
    engine = Engine(model, keep_cache=True)
    with torch.inference_mode():
        if many_turns:
            session = engine.open(SAMPLING)
            session.add([2, 3])
        else:
            rollout = engine.generate([[2, 3]], SAMPLING)
    if many_turns:
        with session:
            for turn in session:
                session.close(turn.id)
        rollout = session.rollout()
    assert not any(value.is_inference() for value in vars(rollout).values() if isinstance(value, torch.Tensor))
    again = engine.generate([[2, 3]], SAMPLING)
    assert torch.equal(again.tokens, rollout.tokens)


def made_in_inference_mode():
    with torch.inference_mode():
        return make_model()


def compiled_forward():
    model = make_model()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def made_on_meta():
    with torch.device("meta"):
        return make_model()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (made_in_inference_mode, "made inside torch.inference_mode"),
        (lambda: make_model().requires_grad_(False), "no parameter with requires_grad"),
        (made_on_meta, "embed_tokens.weight is on the meta device"),  # offloaded by a device_map (cookbook#292)
        (compiled_forward, "a forward of its own"),
        (lambda: make_model().model, "LlamaModel has no language-model head"),
        (lambda: torch.compile(make_model(), backend="eager"), "model is OptimizedModule"),
        # what torch.compile returns (transformers#23966)
        (lambda: torch.nn.DataParallel(make_model()), "model is DataParallel"),
        (lambda: make_model().config, "model is LlamaConfig"),
        (lambda: make_model().state_dict(), "model is OrderedDict"),
        (lambda: type(make_model()), "model is type"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_name(make_trainer, tmp_path, model, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(model=model())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    {
        "frozen in part": lambda model: model.model.embed_tokens.requires_grad_(False),
        "in evaluation mode": lambda model: model.eval(),
        "no cache in its settings": lambda model: setattr(model.config, "use_cache", False),
        "hidden states in its settings": lambda model: setattr(model.config, "output_hidden_states", True),
        "checkpointed gradients": lambda model: model.gradient_checkpointing_enable(),
        "inputs that require gradients": lambda model: model.enable_input_require_grads(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_model_as_users_leave_it_trains(make_trainer, change):
    model = make_model()
    change[1](model)
    trainer = make_trainer(model=model, total_steps=1)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    frozen = {name for name, parameter in trainer.roles.named_parameters() if not parameter.requires_grad}
    assert moved and not moved & frozen


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_settings_rollouts_and_engines_can_be_copied(copied):
    """Into other processes, and for sweeps over settings (ml-agents#4842, trl#2979)."""
    engine = Engine(make_model(), make_tokenizer())
    rollout = engine.generate(["ab", "c"], SAMPLING)
    for value in (PPOConfig(total_steps=3, rollout={"stop_strings": ["a"]}), SAMPLING, engine.stats):
        assert copied(value) == value
    for part in (rollout, rollout.select([3, 0])):
        assert copied(part).completions() == part.completions() and torch.equal(copied(part).logprobs, part.logprobs)
    assert torch.equal(copied(engine).generate(["ab", "c"], SAMPLING).logprobs, rollout.logprobs)


def test_an_output_folder_that_is_a_link(make_trainer, tmp_path):
    """To a larger disk; a link whose disk is not there is no folder that could be made."""
    (tmp_path / "scratch disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch disk")
    make_trainer(total_steps=1).train()
    assert (tmp_path / "scratch disk" / "metrics.jsonl").exists() and (tmp_path / "run").is_symlink()
    (tmp_path / "gone").symlink_to(tmp_path / "no disk")
    with pytest.raises(ValueError, match=r"output_dir is '.*gone', a link to '.*no disk', which does not exist"):
        make_trainer(output_dir=tmp_path / "gone", total_steps=1).train()


def test_an_output_folder_whose_name_is_not_utf8(make_trainer, tmp_path):
    """In a locale of another encoding, or a name that an old archive has brought: the tokenizer could not be written at the end."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:  # not pytest.raises: that name in a failure's text would end a test process of pytest-xdist
        make_trainer(output_dir=folder, total_steps=1).train()
        error = None
    except Exception as raised:
        error = ascii(raised)
    assert error and error.startswith("ValueError(") and "is not UTF-8" in error and "PYTHONUTF8=1" in error
    assert not folder.exists()


def test_a_full_temporary_folder_is_not_the_models_fault(make_trainer, monkeypatch):
    """Shared machines have a small /tmp."""

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # what the tokenizers library raises

    monkeypatch.setattr("fastppo.model.writing.write_model", full)
    with pytest.raises(OSError, match="no room .* in the temporary folder .*TMPDIR"):
        make_trainer()


# How Python was started

RUN = """
import sys
from pathlib import Path
from fastppo import PPOTrainer
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a, tiny_config
config = tiny_config(Path(sys.argv[1]), reward__timeout=30.0, total_steps=1)
trainer = PPOTrainer(make_model(), reward=count_a, prompts=PROMPTS, config=config, tokenizer=make_tokenizer())
trainer.train()
"""
ROOT = Path(__file__).resolve().parents[1]


def test_a_run_in_a_bare_and_strict_process(tmp_path):
    """No environment at all (cron, containers): no HOME, no locale, no PATH; asserts away, warnings and mixed-up bytes and texts errors; few
    files, a private umask, no standard output, and a folder whose name has blanks, brackets and letters outside ASCII."""
    script, folder = tmp_path / "run.py", tmp_path / "mein Lauf [é]"
    script.write_text(f"sys_path = {str(ROOT)!r}\nimport sys\nsys.path.insert(0, sys_path)\n{RUN}", encoding="utf-8")
    python = [sys.executable, "-O", "-bb", "-W", "error", str(script), str(folder)]
    shell = ["/bin/sh", "-c", 'ulimit -n 64; umask 077; exec "$@" >&-', "sh", *python]
    done = subprocess.run(shell, cwd="/", env={"LC_ALL": "C"}, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "model" / "model.safetensors").exists() and (folder / "curve.png").exists()


def test_the_package_works_without_its_metadata(monkeypatch):
    """In a zipped or frozen application there is none."""

    def none_found(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", none_found)
    names = runpy.run_path(str(Path(fastppo.__file__)))
    assert names["__version__"] == "unknown" and names["gae"] is fastppo.gae
