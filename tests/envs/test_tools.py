"""Functions as tools, TRL's environment classes, the calculator and the sandbox."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import psutil
import pytest

from fastppo.envs import PythonSandbox, Tools, calculator, python
from fastppo.envs.tools import ToolEnvironment, as_environment


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def later(text: str) -> str:
    """
    Says it later.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0)
    return text * 2


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def step(environment, *calls, **message):
    return asyncio.run(environment.step({"role": "assistant", "content": "", "tool_calls": list(calls)} | message))


def answers(*calls, tools=(add, later)):
    """What the tools say to the calls."""
    observation, reward, terminated, truncated, _ = step(Tools(*tools)(), *calls)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert all(message["role"] == "tool" for message in observation)
    return [(message["name"], message["content"]) for message in observation]


def test_calls_are_answered_in_their_order():
    assert answers(call("add", a=1, b=2), call("later", text="ab"), call("add", a=5, b=5)) == [
        ("add", "3"),
        ("later", "abab"),
        ("add", "10"),
    ]


FAULTS = {
    "no such tool": (call("sub", a=1), ("sub", "Error: there is no tool 'sub', expected one of add, later")),
    "raises": (call("add", a=1, b="x"), ("add", "Error: TypeError: unsupported operand")),
    "arguments it lacks": (call("add", a=1), ("add", "Error: TypeError: add() missing 1 required")),
    "no name": ({"function": {"arguments": {}}}, ("unknown", "Error: {'function'")),
    "no object": ({"function": {"name": "add", "arguments": [1]}}, ("unknown", "Error: {'function'")),
    "no call": ("add", ("unknown", "Error: 'add' is no call, expected a name and an object of arguments")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_model_reads_what_was_wrong(name):
    wrong, (who, text) = FAULTS[name]
    [(found, said)] = answers(wrong)
    assert found == who and said.startswith(text)


def test_a_call_that_does_not_parse_is_answered():
    observation, _, terminated, _, _ = step(Tools(add)(), tool_calls=[], parse_error="not JSON")
    assert observation == [{"role": "tool", "name": "unknown", "content": "Error: not JSON"}] and not terminated


def test_an_answer_without_a_call_ends_the_episode():
    assert step(Tools(add)(), content="4")[:4] == ([], 0.0, True, False)


def test_what_cannot_be_described_is_refused():
    def bare(a):
        return a

    with pytest.raises(TypeError, match="the tool bare cannot be described"):
        Tools(bare)
    with pytest.raises(TypeError, match="a tool is int, expected a function"):
        Tools(5)
    with pytest.raises(ValueError, match="two tools are called add"):
        Tools(add, add)
    with pytest.raises(ValueError, match="there is no function"):
        Tools()


class Counter:
    """As TRL's documentation has its environments."""

    def __init__(self):
        self.count = 0

    def reset(self, **kwargs) -> str | None:
        self.count = kwargs["start"]
        return f" You begin at {self.count}."

    def increment(self, step: int) -> int:
        """
        Increments the counter.

        Args:
            step: By how much.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)

    def _hidden(self):
        """Is no tool."""


def test_trls_environment_classes_work_as_they_are():
    environment = as_environment(Counter())
    assert isinstance(environment, ToolEnvironment)
    assert [tool["function"]["name"] for tool in environment.tools] == ["increment"]
    said = asyncio.run(environment.reset({"prompt": "Count!", "start": 3}, seed=0))
    assert said == "Count! You begin at 3."
    assert step(environment, call("increment", step=4))[0][0]["content"] == "7"
    assert environment.get_reward() == 7.0
    again = [{"role": "system", "content": "s"}, {"role": "user", "content": "Count!"}]
    assert (
        asyncio.run(environment.reset({"prompt": again, "start": 1}, seed=0))[1]["content"] == "Count! You begin at 1."
    )
    assert again[1]["content"] == "Count!"


def test_an_object_that_is_none_is_refused():
    with pytest.raises(TypeError, match="object has neither step nor reset"):
        as_environment(object())


# Calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * -4", "-20"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("7 // 2 + 7 % 4", "6"),
        (" 2 ** 10 ", "1024"),
    ]
    + [("1e3", "1000"), ("0.1 + 0.2", str(0.1 + 0.2))],
)
def test_the_calculator_computes(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "2 +",
        "__import__('os')",
        "a",
        "'a' * 9",
        "9 ** 9 ** 9",
        "9 ** 99999",
        "(-8) ** 0.5",
        "1 / 0",
        "1e308 * 10",
        "1" * 2000,
    ]
    + ["True + 1", "[1][0]", "2.0 ** 9999", "(" * 500 + "1" + ")" * 500, "-" * 900 + "1e400"],
)
def test_the_calculator_refuses(expression):
    start = time.monotonic()
    with pytest.raises((ValueError, ZeroDivisionError)):
        calculator(expression)
    assert time.monotonic() - start < 5 and math.isfinite(start)


# Sandbox


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


PRINTS = {
    "a result": ("print(sum(range(10)))", "45\n"),
    "an error": ("1 / 0", "ZeroDivisionError: division by zero"),
    "no syntax": ("print(", "SyntaxError"),
    "threads": (
        "import threading as t; x = t.Thread(target=print, args=('in a thread',)); x.start(); x.join()",
        "in a thread",
    ),
    "an empty folder": ("import os; print(os.listdir('.'), 'SECRET' in os.environ)", "[] False"),
    "standard input": ("print(input())", "EOFError"),
}
REFUSED = {
    "the network": ("import socket; socket.socket()", "PermissionError"),
    "processes": ("import os; os.fork()", "PermissionError"),
    "programs": ("import subprocess; subprocess.run(['ls'])", "PermissionError"),
    "signals to the trainer": ("import os; os.kill(os.getppid(), 0)", "PermissionError"),
    "memory": ("x = bytearray(2**30)", "MemoryError"),
    "large files": ("open('f', 'wb').write(b'a' * 2**25)", "File too large"),
}


@pytest.mark.parametrize("name", PRINTS | REFUSED)
def test_the_sandbox_shows_what_is_printed(name, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    code, printed = (PRINTS | REFUSED)[name]
    assert printed in python(code)


def test_the_sandbox_kills_what_lasts_or_prints_too_long():
    before = children()
    start = time.monotonic()
    sandbox = PythonSandbox(seconds=1, output=100)
    assert sandbox.python("print('a', flush=True)\nwhile True: pass").endswith("(killed: it took longer than 1 s)")
    assert time.monotonic() - start < 20
    much = sandbox.python("while True: print('a' * 100)")
    assert much.startswith("a" * 100) and much.endswith("(killed: it printed too much)") and len(much) < 250
    assert sandbox.python("print('b' * 150)") == "b" * 100 + "\n(cut off after 100 characters)"
    assert children() == before


def test_sandboxes_run_side_by_side():
    sandbox, found = PythonSandbox(), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: sandbox.python(f"print({i})")})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(4)}


@pytest.mark.parametrize("limit", [{"seconds": 0}, {"memory": "1"}, {"output": True}])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(ValueError, match="expected a number > 0"):
        PythonSandbox(**limit)


def test_the_code_has_to_fit():
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        python("#" * 200_000)
