"""A reward file that a recipe names: what stands beside it is found, from any working directory and in the processes of its pools."""

from __future__ import annotations

import sys
import textwrap

import pytest

from fastppo.recipe import resolve_rewards
from fastppo.recipe_config import RecipeRewardConfig, RewardFunctionConfig
from fastppo.rewards import RewardRunner


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("file_reward", "file_helpers", "fastppo_reward_")):
            del sys.modules[name]


def scores(folder, files, function="f", file="file_reward.py", timeout=20.0, **arguments):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    named = RewardFunctionConfig(function=f"{folder / file}:{function}", arguments=arguments)
    reward = resolve_rewards(RecipeRewardConfig(functions=[named]))[0]
    with RewardRunner(reward, timeout=timeout, retries=0) as runner:
        result = runner(["p", "q"], ["one", "three"], {})
    assert result.errors == []
    return result.scores


CASES = {
    "a module": {
        "file_reward.py": "from file_helpers import grade\ndef f(completions): return [grade(c) for c in completions]",
        "file_helpers.py": "def grade(text): return len(text)",
    },
    "a package": {
        "file_reward.py": "from file_helpers.length import grade\ndef f(completions): return [grade(c) for c in completions]",
        "file_helpers/__init__.py": "",
        "file_helpers/length.py": "def grade(text): return len(text)",
    },
    "a module that is imported late": {
        "file_reward.py": """
            def f(completions):
                from file_helpers import grade
                return [grade(c) for c in completions]
        """,
        "file_helpers.py": "def grade(text): return len(text)",
    },
    "data": {
        "file_reward.py": """
            import json
            from pathlib import Path
            table = json.loads((Path(__file__).parent / "lengths.json").read_text())
            def f(completions): return [table[c] for c in completions]
        """,
        "lengths.json": '{"one": 3, "three": 5}',
    },
    "a spawned pool of its own function": {
        "file_reward.py": """
            import multiprocessing
            def grade(text): return len(text)
            def f(completions):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    return pool.map(grade, completions)
        """,
    },
    "a spawned pool of a neighbour's function": {
        "file_reward.py": """
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor
            from file_helpers import grade
            pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            def f(completions): return list(pool.map(grade, completions))
        """,
        "file_helpers.py": "def grade(text): return len(text)",
    },
}


@pytest.mark.parametrize("files", CASES.values(), ids=CASES.keys())
def test_what_stands_beside_the_file_is_found(tmp_path, monkeypatch, files):
    monkeypatch.chdir("/")
    assert scores(tmp_path, files) == [3, 5]


def test_data_in_the_working_directory_is_found_too(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bonus.txt").write_text("7")
    monkeypatch.chdir(tmp_path / "work")
    code = "def f(completions): return [float(open('bonus.txt').read())] * len(completions)"
    assert scores(tmp_path / "rewards", {"file_reward.py": code}) == [7, 7]


@pytest.mark.parametrize("name", ["json.py", "torch.py", "wave.py", "file-reward.py", "2.py"])
def test_a_file_shadows_no_other_module(tmp_path, name):
    """Loaded already (json, torch), not loaded yet (wave), or no name that could be imported."""
    sys.modules.pop("wave", None)
    assert scores(tmp_path, {name: "def f(completions): return [1.0] * len(completions)"}, file=name) == [1, 1]
    import json
    import wave

    assert all(str(tmp_path) not in module.__file__ for module in (json, wave))


def test_a_file_that_was_edited_is_read_again(tmp_path):
    for value in (1, 2):
        code = f"def f(completions): return [{value}.0] * len(completions)"
        assert scores(tmp_path, {"file_reward.py": code}, timeout=None) == [value, value]


def test_two_folders_may_each_have_a_file_of_one_name(tmp_path):
    for value in (1, 2):
        code = f"def f(completions): return [{value}.0] * len(completions)"
        assert scores(tmp_path / str(value), {"file_reward.py": code}, timeout=None) == [value, value]


def test_a_class_in_a_file_is_made_with_its_arguments(tmp_path):
    code = "class Grader:\n    def __init__(self, mark=1.0): self.mark = mark\n"
    code += "    def __call__(self, completions): return [self.mark] * len(completions)\n"
    assert scores(tmp_path, {"file_reward.py": code}, function="Grader") == [1, 1]
    assert scores(tmp_path, {"file_reward.py": code}, function="Grader", mark=2.0) == [2, 2]
    with pytest.raises(
        ValueError, match=r"reward.functions.0.arguments is .*Grader got an unexpected keyword argument 'marks'"
    ):
        scores(tmp_path, {"file_reward.py": code}, function="Grader", marks=2.0)
