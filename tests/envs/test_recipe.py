"""Environments and tools that a recipe names."""

from __future__ import annotations

import pytest
import yaml

from fastppo import cli
from fastppo.envs import AgentProgram, Tools
from fastppo.recipe import load_recipe, resolve_environment
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_tokenizer

FILE = '''
class World:
    def __init__(self, size=1):
        self.size = size

    def reset(self, row, seed):
        return None

    def step(self, completion):
        return None, 0.0, True, False, {}

def double(x: int) -> int:
    """
    Doubles.

    Args:
        x: What.
    """
    return 2 * x
'''


@pytest.fixture
def resolve(tmp_path):
    (tmp_path / "worlds.py").write_text(FILE)

    def resolve_it(environment):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"environment: {environment}")
        return resolve_environment(load_recipe(path).environment)

    return resolve_it


def test_a_class_in_a_file_beside_the_recipe(resolve):
    assert resolve("{factory: worlds.py:World}")().size == 1
    assert resolve("{factory: worlds.py:World, arguments: {size: 5}}")().size == 5
    assert resolve("{}") is None


def test_tools_by_name_and_from_a_file(resolve):
    environment = resolve("{tools: [calculator, worlds.py:double]}")
    assert isinstance(environment, Tools)
    assert [tool["function"]["name"] for tool in environment().tools] == ["calculator", "double"]


def test_a_program_by_its_function_or_its_command(resolve, tmp_path):
    (tmp_path / "agent.py").write_text("def act(row, base_url, api_key):\n    return 1.0\n")
    assert isinstance(resolve("{agent: agent.py:act}"), AgentProgram)
    assert isinstance(resolve("{command: [python, agent.py, --fast]}"), AgentProgram)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.environment.command == ["python", str(tmp_path / "agent.py"), "--fast"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            "{tools: [calculater]}",
            r"environment.tools.0 is 'calculater', expected the name of a ready function \(the nearest is calculator\)",
        ),
        (
            "{factory: World}",
            r"environment.factory is 'World', expected the name of a ready .* \(the nearest is openenv\), package.module:function",
        ),
        ("{factory: worlds.py:Wrld}", "worlds.py has no function Wrld; the nearest is World"),
        ("{factory: worlds.py:World, tools: [calculator]}", "tools is .'calculator'., expected none beside factory"),
        ("{command: [agent.py], agent: worlds.py:World}", "command is .'agent.py'., expected none beside agent"),
        (
            "{agent: worlds.py:double}",
            r"environment.agent: program is a function that cannot be called as \(row, base_url",
        ),
        ("{command: [no-such-command]}", "environment.command: .* there is no command no-such-command"),
        ("{arguments: {size: 5}}", "arguments is {'size': 5}, expected none without factory"),
        ("{max_turns: 0}", "environment.max_turns is 0: expected"),
        ("{max_turn: 1}", "key environment.max_turn is not known; the nearest is max_turns"),
    ],
)
def test_what_is_wrong_is_named(resolve, environment, message):
    with pytest.raises((TypeError, ValueError), match=message):
        resolve(environment)


def test_a_recipe_without_a_reward_trains_on_its_environment(tmp_path, resolve):
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    settings = {
        "output_dir": str(tmp_path / "run"),
        "total_steps": 1,
        "device": "cpu",
        "model": {"name": "model"},
        "data": {"path": "data.jsonl"},
        "environment": {"factory": "worlds.py:World"},
        "rollout": {"prompts_per_step": 2, "max_new_tokens": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert read_metrics(tmp_path / "run")[-1]["environment/turns"] == 1


@pytest.mark.parametrize(
    ("debate", "message"),
    [
        ("{speeches: [{seat: a}]}", r"environment.debate.speeches has the seats \['a'\], expected at least two"),
        ("{speaches: []}", "key environment.debate.speaches is not known; the nearest is speeches"),
        ("{speeches: [{seat: a}, {seat: b}], answers: c}", "answers is 'c', expected one of the seats a, b"),
        (
            "{speeches: [{seat: a}, {seat: b, read: x}]}",
            "key environment.debate.speeches.1.read is not known; the nearest is reads",
        ),
        (
            "{speeches: [{seat: a}, {seat: b}]}, tools: [calculator]",
            "debate has speeches, expected none beside tools",
        ),
    ],
)
def test_what_is_wrong_with_a_debate_is_named(resolve, debate, message):
    with pytest.raises(ValueError, match=message):
        resolve(f"{{debate: {debate}}}")
