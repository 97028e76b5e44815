"""Recipes: one to one on the dataclasses, and every mistake is named with the nearest right thing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from fastppo.data.sources import is_task
from fastppo.recipe import load_recipe, resolve_rewards
from fastppo.recipe_config import Recipe, RecipeRewardConfig, RewardFunctionConfig
from fastppo.reward_model_config import RewardModelRecipe
from fastppo.sft_config import SFTRecipe
from tests.tiny import make_reward_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
OTHER_KINDS = {"reward_model.yaml": RewardModelRecipe, "sft.yaml": SFTRecipe}
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.name not in OTHER_KINDS)
MINIMAL = "total_steps: 5\nmodel: {name: m}\ndata: {path: p}\nreward: {functions: [{function: 'math:sqrt'}]}\noptimizer: {lr: 1e-5}\n"


def resolve(function, arguments=None):
    """What a recipe with this one reward function calls."""
    config = RewardFunctionConfig(function=function, arguments=arguments or {})
    return resolve_rewards(RecipeRewardConfig(functions=[config]))[0].function


def write(tmp_path, text=MINIMAL) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in (make_reward_model(), make_tokenizer()):  # what recipes/reward_model.yaml writes
        part.save_pretrained("runs/reward_model/model")
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    assert all(callable(reward.function) for reward in resolve_rewards(recipe.reward))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_recipes_need_nothing_outside_the_repository_but_the_hub(path):
    """A recipe that names a file beside the checkout fails for everyone who has only cloned it."""
    recipe = load_recipe(path, (), OTHER_KINDS.get(path.name, Recipe))
    for name in (recipe.model.name, recipe.model.tokenizer, recipe.data.path, recipe.data.eval_path):
        if name:
            hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) and not name.startswith(".")
            assert hub_name or is_task(name) or (Path(name).is_relative_to(ROOT) and Path(name).exists()), name


def test_values_and_overrides(tmp_path):
    changes = [
        "optimizer.lr=2e-5",
        "gamma=0.9",
        "data.chat=false",
        "rollout.stop_strings=[a, b]",
        "total_steps=7",
        "seed=3",
    ]
    recipe = load_recipe(write(tmp_path), changes)
    assert (recipe.total_steps, recipe.seed, recipe.optimizer.lr, recipe.advantage.gamma) == (7, 3, 2e-5, 0.9)
    assert recipe.data.chat is False and recipe.rollout.stop_strings == ("a", "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "key optimizer.lrr is not known; the nearest is lr"),
        ("gama=1", "key gama is not known; the nearest is advantage.gamma"),
        ("total_step=1", "key total_step is not known; the nearest is total_steps"),
        ("optimiser.lr=1", "section optimiser is not known; the nearest is optimizer"),
        ("lr=1", "several sections have lr; write critic.lr or optimizer.lr"),
        ("rollout=1", "rollout is a section, expected rollout.key=value"),
        ("optimizer.lr", "has no '='"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr is -1: expected greater than or equal to 0"),
        ("critic.kind=both", "critic.kind is 'both': expected 'separate', 'shared', 'lora' or 'none'"),
        ("total_steps=2.5", "total_steps is 2.5"),
        ("rollout.min_new_tokens=1000", "rollout.min_new_tokens is 1000, expected at most max_new_tokens = 256"),
        ("optimizer.lr=[", "not valid YAML"),
        ("optimizer.betas=&a [*a]", "aliases"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    with pytest.raises(ValueError) as error:
        load_recipe(write(tmp_path), [override])
    assert message in str(error.value) and "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections"),
        ("- a", "is list, expected sections"),
        ("loss: 3", "loss is 3, expected keys and values"),
        ("loss:", "loss is None, expected keys and values"),
        ("critic: {lr: 1, lr: 2}", "lr stands there twice"),
        ("seed: 1\nseed: 2", "seed stands there twice"),
        ("loss: {clip_low: 1", "not valid YAML"),
        ("optimiser: {}", "section optimiser is not known; the nearest is optimizer"),
        ("ouput_dir: x", "key ouput_dir is not known; the nearest is output_dir"),
        ("optimizer: {learning_rate: 1}", "key optimizer.learning_rate is not known"),
        ("critic: {lr: !!python/object/apply:os.system [ls]}", "not valid YAML"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message.replace("!", ".")):
        load_recipe(write(tmp_path, text))


OLD_NAMES = [
    ("lr", "optimizer.lr"),
    ("critic_lr", "critic.lr"),
    ("critic", "critic.kind"),
    ("gamma", "advantage.gamma"),
    ("total_steps", "total_steps"),
    ("temperature", "rollout.temperature"),
    ("save_every", "checkpoint.every"),
]


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
def test_a_setting_of_the_old_ppo_section_is_an_error_that_names_its_place(tmp_path, old, new):
    message = f"ppo.{old} is now {re.escape(new)}$"
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, f"ppo: {{{old}: 1}}"))
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path), [f"ppo.{old}=1"])


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("critic_lr: 1", "critic_lr=1", "key critic_lr is not known; critic.lr is"),
        ("gamma: 1", None, "key gamma is not known; advantage.gamma is"),
        ("critic: shared", "critic=shared", r"critic.kind"),
        ("optimizer: {lr_schedule: cosine}", "optimizer.lr_schedule=cosine", "optimizer.schedule is"),
        ("loss: {total_steps: 3}", "loss.total_steps=3", "key loss.total_steps is not known; total_steps is"),
        ("ppo: {larning_rate: 1}", "ppo.larning_rate=1", "ppo.larning_rate is not known; the nearest is"),
        ("ppo: {lr: 1, seed: 2}", None, "ppo.lr is now optimizer.lr; ppo.seed is now seed"),
        ("ppo: {}", None, "section ppo is not known"),
        ("ppo: 3", None, "key ppo is not known"),
    ],
)
def test_a_key_that_stands_elsewhere_now_is_found(tmp_path, text, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text))
    if override:
        with pytest.raises(ValueError, match=message):
            load_recipe(write(tmp_path), [override])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="is no file"):
        load_recipe(tmp_path)


def test_files_beside_the_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "reward.py").write_text(
        "def score(prompts, completions, scale=1, **_):\n    return [scale] * len(completions)\n"
    )
    text = "model: {name: model}\ndata: {path: hub/data}\nreward: {functions: [{function: 'reward.py:score', arguments: {scale: 3}}]}"
    monkeypatch.chdir("/")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.model.name == str(tmp_path / "model")
    assert recipe.data.path == "hub/data", "a name that is no file stays a hub name"
    reward = resolve_rewards(recipe.reward)[0].function
    assert reward(["a"], ["b"]) == [3] and reward.__name__ == "score"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("", "expected the name of a ready function"),
        ("math", r"'math', expected the name of a ready function \(the nearest is maths\), package.module:function"),
        ("gsm8", "the nearest is gsm8k"),
        ("no_such_module_here:f", "module no_such_module_here cannot be imported"),
        ("math:sqr", "has no function sqr; the nearest is sqrt"),
        ("math:pi", "has no function pi"),
    ],
)
def test_wrong_reward_names(function, message):
    with pytest.raises(ValueError, match=f"^reward.functions.0.function.*{message}"):
        resolve(function)


def test_the_written_config_is_a_recipe_again(tmp_path):
    import dataclasses

    from fastppo.run_folder import RunFolder

    recipe = load_recipe(write(tmp_path), ["rollout.stop_token_ids=[3]"])
    folder = RunFolder(tmp_path / "run")
    folder.start(dataclasses.asdict(recipe))
    assert load_recipe(folder.path / "config.yaml") == recipe
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["total_steps"] == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=true", "optimizer.lr is True: expected no true or false"),
        ("total_steps=yes", "total_steps is True"),
        ("model.lr=1", "key model.lr is not known; critic.lr and optimizer.lr are"),
        ("reward.functions=on", "reward.functions is True"),
        ("reward.functions=[{function: bleu, weight: yes}]", "reward.functions.0.weight is True"),
    ],
)
def test_slips_that_would_pass_for_a_number_or_hide_in_another_section(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path), [override])


@pytest.mark.parametrize("text", ["critic: {lr: 1", "? [a]\n: 1", "a: b: c"])
def test_a_yaml_error_is_one_line(tmp_path, text):
    with pytest.raises(ValueError, match="not valid YAML") as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


def reward(tmp_path, code, **arguments):
    path = tmp_path / "my_reward.py"
    path.write_text(code)
    return resolve(f"{path}:f", arguments)


def test_a_bound_argument_that_the_function_requires_is_not_asked_for_again(tmp_path):
    from fastppo.rewards import RewardRunner

    bound = reward(tmp_path, "def f(prompts, completions, scale):\n    return [scale for _ in completions]\n", scale=3)
    with RewardRunner(bound, timeout=None) as runner:
        assert runner(["a"], ["b"], {}).scores == [3.0]


def test_a_misspelt_argument_is_found_before_the_run(tmp_path):
    with pytest.raises(
        ValueError, match="reward.functions.0.arguments is {'sclae': 3}.*unexpected keyword argument 'sclae'"
    ):
        reward(tmp_path, "def f(prompts, completions, scale=1):\n    return []\n", sclae=3)


@pytest.mark.parametrize(
    ("code", "message"),
    [("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("import nowhere_xyz", "nowhere_xyz")],
)
def test_a_reward_file_that_fails_is_named(tmp_path, code, message):
    with pytest.raises(ValueError, match=f"my_reward.py cannot be imported: .*{message}"):
        reward(tmp_path, code)


def test_a_reward_file_may_define_dataclasses(tmp_path):
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
    code += "@dataclass\nclass Rule:\n    weight: ClassVar[int] = 1\ndef f(prompts, completions):\n    return []\n"
    assert reward(tmp_path, code)([], []) == []


def test_a_file_named_as_a_module_gets_a_hint(tmp_path, monkeypatch):
    (tmp_path / "score_xyz.py").write_text("def f():\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    with pytest.raises(ValueError, match=r"write \./score_xyz.py:function"):
        resolve("score_xyz:f")


TEXTS = [
    "Solve {prompt}, after #### please",
    "Q: {prompt} A:",
    "a: b",
    "# no comment",
    "[x",
    "null and void",
    " x ",
    "",
    "010",
]
TEXTS += ["yes", "~x", "*a", "&a", "!tag", "'quoted'", '"', "{a: 1}", "a=b", "- x", "1e5", "\\n", "true"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["data.prompt_template", "data.system_prompt", "output_dir", "data.split"])
def test_a_text_is_taken_as_it_was_typed(tmp_path, key, text):
    recipe = load_recipe(write(tmp_path), [f"{key}={text}"])
    section, _, name = key.rpartition(".")
    assert getattr(getattr(recipe, section) if section else recipe, name) == text


def test_only_null_is_no_text_where_there_may_be_none(tmp_path):
    text = MINIMAL.replace("{path: p}", "{path: p, system_prompt: x}")
    assert load_recipe(write(tmp_path, text), ["data.system_prompt=null"]).data.system_prompt is None
    assert load_recipe(write(tmp_path), ["data.prompt_template=null"]).data.prompt_template == "null"


PATHS = {
    "model.name": ("model", "name"),
    "model.tokenizer": ("model", "tokenizer"),
    "data.path": ("data", "path"),
    "data.eval_path": ("data", "eval_path"),
}
REWARD = "reward.functions.0.function"


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """(beside the recipe, the working directory, which is also the home); each has its own `x` and `r.py`."""
    for name in ("beside", "here"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "r.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    return tmp_path / "beside", tmp_path / "here"


def setting(key, value, override=False):
    """`key` with a value, as a recipe or an override has it."""
    if key == REWARD:
        return f"reward{'.' if override else ': {'}functions{'=' if override else ': '}[{{function: '{value}:f'}}]{'' if override else '}'}"
    return f"{key}={value}" if override else "{}: {{{}: '{}'}}".format(*PATHS[key], value)


@pytest.mark.parametrize("key", [*PATHS, REWARD])
def test_a_path_starts_where_it_was_written(two_folders, key):
    beside, here = two_folders
    file = "r.py" if key == REWARD else "x"
    in_recipe = setting(key, file)
    for text, overrides, expected in (
        (in_recipe, [], beside),
        ("{}", [setting(key, file, override=True)], here),
        ("{}", [setting(key, f"./{file}", override=True)], here),
        ("{}", [setting(key, f"~/{file}", override=True)], here),
        (in_recipe, [setting(key, file, override=True)], here),
        (setting(key, f"~/{file}"), [], here),
        (setting(key, f"../here/{file}"), [], here),
    ):
        recipe = load_recipe(write(beside, text), overrides)
        if key == REWARD:
            found = recipe.reward.functions[0].function.removesuffix(":f")
        else:
            section, name = PATHS[key]
            found = getattr(getattr(recipe, section), name)
        assert found == str(expected / file), (text, overrides)


@pytest.mark.parametrize("key", [*PATHS, REWARD])
def test_a_path_that_stands_in_the_wrong_place_is_not_taken_silently(two_folders, key):
    beside, here = two_folders
    (here / "only-here.py").mkdir()
    with pytest.raises(
        ValueError, match=f"{key} is 'only-here.py', which is not beside the recipe .*{beside}/only-here.py"
    ):
        load_recipe(write(beside, setting(key, "only-here.py")))


def test_what_is_no_path_stays(two_folders):
    text = "model: {name: gpt2}\ndata: {path: openai/gsm8k:main}\nreward: {functions: [{function: math:sqrt}]}"
    recipe = load_recipe(write(two_folders[0], text))
    names = recipe.model.name, recipe.data.path, recipe.reward.functions[0].function
    assert names == ("gpt2", "openai/gsm8k:main", "math:sqrt")


def bomb(levels: int, merge: str = "") -> str:
    lines = ["a0: &a0 {k: 1}" if merge else "a0: &a0 [x]"]
    for i in range(levels):
        value = f"{{<<: [*a{i}, *a{i}]}}" if merge else f"[*a{i}, *a{i}]"
        lines.append(f"a{i + 1}: &a{i + 1} {value}")
    return "data:\n  task_arguments:\n" + "".join(f"    {line}\n" for line in lines)


BOMBS = {
    "lists": bomb(40),
    "merges": bomb(40, merge="<<"),
    "a loop": "data: {task_arguments: &a {b: *a}}",
    "deep": "[" * 5000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_aliases_that_multiply_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="recipe.yaml is not valid YAML") as error:
        load_recipe(write(tmp_path, text))
    assert len(str(error.value)) < 500


def test_plain_aliases_are_welcome(tmp_path):
    recipe = load_recipe(write(tmp_path, "data: {task_arguments: {a: &x [1, 2], b: *x}}"))
    assert recipe.data.task_arguments == {"a": [1, 2], "b": [1, 2]}


def test_arguments_may_name_the_environment(tmp_path, monkeypatch):
    """Resolved where they are used: no record of the run holds the value."""
    code = "def f(prompts, completions, key, nested):\n    return [key, nested]\n"
    arguments = {"key": "Bearer ${env:MY_KEY}", "nested": {"a": ["${env:MY_KEY}", 3]}}
    with pytest.raises(ValueError, match="reward.functions.0.arguments.key is .*MY_KEY is not set"):
        reward(tmp_path, code, **arguments)
    monkeypatch.setenv("MY_KEY", "s3cret")
    assert reward(tmp_path, code, **arguments)([], []) == ["Bearer s3cret", {"a": ["s3cret", 3]}]
    assert arguments["key"] == "Bearer ${env:MY_KEY}"


def test_a_recipe_in_another_encoding_is_named(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"output_dir: caf\xe9")
    with pytest.raises(ValueError, match="recipe .* is not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize("value", ["1e-300", "-1", ".nan", "1e11"])
@pytest.mark.parametrize("key", ["rollout.temperature", "evaluation.temperature"])
def test_a_temperature_that_the_sampler_would_refuse_ends_no_run_at_its_first_draw(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"^{key} is"):
        load_recipe(write(tmp_path), [f"{key}={value}"])


SEVERAL = """
reward:
  functions:
    - function: bleu
      weight: 0.7
    - {function: repetition, normalise: true, arguments: {n: 2}}
"""


def test_several_rewards_with_weights(tmp_path):
    bleu, repetition = resolve_rewards(load_recipe(write(tmp_path, SEVERAL)).reward)
    assert (bleu.function.__name__, bleu.weight, bleu.normalise) == ("bleu", 0.7, False)
    assert (repetition.function.__name__, repetition.weight, repetition.normalise) == ("repetition", 1.0, True)
    assert repetition.function(["a b a b a b"]) == [2 / 5 - 1]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("gsm8k", "reward.functions is 'gsm8k': expected a valid list"),
        ("[gsm8k]", "reward.functions.0 is 'gsm8k', expected keys and values: function, weight"),
        ("[{function: bleu, wieght: 2}]", "key reward.functions.0.wieght is not known; the nearest is weight"),
        ("[{function: bleu}, {function: chrf, weight: 0}]", "reward.functions.1.weight is 0, expected another number"),
        ("[{function: bleu, weight: .nan}]", "reward.functions.0.weight is nan"),
        ("[{function: bleu, weight: '2'}]", "reward.functions.0.weight is '2'"),
        ("[{weight: 2}]", "reward.functions.0.function is missing"),
    ],
)
def test_wrong_lists_of_rewards(tmp_path, functions, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write(tmp_path, f"reward: {{functions: {functions}}}"))
    assert "pydantic" not in str(error.value) and "Config" not in str(error.value)


def test_the_key_of_before_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="key reward.function is not known; the nearest is functions"):
        load_recipe(write(tmp_path, "reward: {function: gsm8k}"))
