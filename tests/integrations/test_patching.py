"""`Peer`: what a patch replaces and where, what it refuses, and that it leaves nothing behind. The package that is patched is written
to disk for each test, so that it can be of any version and shape."""

from __future__ import annotations

import logging
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastppo.integrations.patching import Peer, Replacement

FUNCTIONS = """
import torch
def double(x, scale=2.0):
    return x * scale
REGISTRY = {"double": double}
class Loss:
    def forward(self, x):
        return x
    @staticmethod
    def name(x):
        return "theirs"
class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, chunk):
        return x + chunk
"""
TRAINER = "from toypeer.functions import double\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes version 1.2.0 of the package `toypeer`; forgets it afterwards."""

    def write(version: str = "1.2.0", functions: str = FUNCTIONS, trainer: str = TRAINER) -> None:
        info = tmp_path / f"toypeer-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toypeer\nVersion: {version}\n")
        (tmp_path / "toypeer").mkdir()
        for name, text in (("__init__", ""), ("functions", functions), ("trainer", trainer)):
            (tmp_path / "toypeer" / f"{name}.py").write_text(text)
        import_module("importlib").invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "toypeer"]:
        del sys.modules[name]


def our_double(x, scale=2.0):
    if not isinstance(x, float):
        raise TypeError(f"x is {type(x).__name__}, expected float")
    return ("ours", x, scale)


def our_forward(self, x):
    return ("ours", x)


def our_name(x):
    return "ours"


def our_apply(x, chunk):
    return ("ours", x, chunk)


DOUBLE = Replacement("toypeer.functions:double", our_double)
EVERYTHING = (
    DOUBLE,
    Replacement("toypeer.functions:Loss.forward", our_forward),
    Replacement("toypeer.functions:Loss.name", our_name),
    Replacement("toypeer.functions:Function.apply", our_apply, signature="toypeer.functions:Function.forward"),
)


def peer(*replacements: Replacement, versions: tuple[str, ...] = ("1.2",)) -> Peer:
    return Peer("toypeer", "toypeer", dict.fromkeys(versions, replacements or (DOUBLE,)))


def test_every_holder_of_a_function_gets_ours_and_then_its_own_back(toy):
    """A trainer that imported the name before, one that does so while patched, and a registry: no half keeps another function."""
    toy()
    functions, trainer = import_module("toypeer.functions"), import_module("toypeer.trainer")
    theirs = functions.double
    user = ModuleType("a_user_of_toypeer")
    user.double = theirs
    sys.modules[user.__name__] = user
    try:
        ours = peer()
        patch = ours.patch()
        assert dict(patch) == {"toypeer.functions:double": theirs}
        late = ModuleType("imported_while_patched")
        sys.modules[late.__name__] = late
        late.double = functions.double
        for double in (functions.double, trainer.double, user.double, functions.REGISTRY["double"], late.double):
            assert double(1.0, scale=3.0) == ("ours", 1.0, 3.0)
        ours.unpatch()
        for double in (functions.double, trainer.double, user.double, functions.REGISTRY["double"], late.double):
            assert double is theirs
    finally:
        del sys.modules[user.__name__], sys.modules["imported_while_patched"]


def test_methods_static_methods_and_autograd_functions(toy):
    toy()
    functions = import_module("toypeer.functions")
    before = [vars(functions.Loss)["forward"], vars(functions.Loss)["name"]]
    loss = functions.Loss()
    with peer(*EVERYTHING).patch() as patch:
        assert len(patch) == 4
        assert loss.forward(1) == ("ours", 1)
        assert loss.name(1) == functions.Loss.name(1) == "ours"
        assert functions.Function.apply(1, 2) == ("ours", 1, 2)
    assert [vars(functions.Loss)["forward"], vars(functions.Loss)["name"]] == before
    assert "apply" not in vars(functions.Function)
    assert functions.Function.apply(1, 2) == 3


def test_one_holder_alone(toy):
    """A function that asks what a machine can do may be answered otherwise in one place, where that is meant."""
    toy()
    functions, trainer = import_module("toypeer.functions"), import_module("toypeer.trainer")
    theirs = functions.double
    with peer(Replacement("toypeer.trainer:double", our_double, everywhere=False)).patch():
        assert trainer.double(1.0) == ("ours", 1.0, 2.0)
        assert functions.double is functions.REGISTRY["double"] is theirs
    assert trainer.double is functions.double is theirs


def test_what_ours_refuses_is_passed_on_and_said_once(toy, caplog: pytest.LogCaptureFixture):
    toy()
    functions = import_module("toypeer.functions")
    with caplog.at_level(logging.WARNING), peer().patch():
        assert functions.double(2) == functions.double(2) == 4.0
        assert functions.double(2.0) == ("ours", 2.0, 2.0)
    assert len(caplog.records) == 1
    assert "toypeer.functions:double" in caplog.text and "x is int, expected float" in caplog.text


def test_what_ours_refuses_is_in_a_compiled_graph_as_theirs(toy):
    """A log line would break the graph, and raise with fullgraph=True."""

    def refuses(x, scale=2.0):
        raise ValueError("x is what ours does not take")

    toy()
    functions = import_module("toypeer.functions")
    with peer(Replacement("toypeer.functions:double", refuses)).patch():
        compiled = torch.compile(lambda x: functions.double(x) + 1, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))


def test_patching_twice_changes_nothing_more(toy):
    toy()
    functions = import_module("toypeer.functions")
    theirs, ours = functions.double, peer()
    with ours.patch() as outer:
        installed = functions.double
        with ours.patch() as inner:
            assert functions.double is installed
            assert dict(inner) == dict(outer)
        assert functions.double is installed  # the inner one patched nothing and so undoes nothing
        with pytest.raises(RuntimeError, match=r"patched with strict=False: call unpatch\(\) first"):
            ours.patch(strict=True)
    assert functions.double is theirs
    ours.unpatch()
    assert functions.double is theirs


def test_strict_reaches_the_functions_that_know_it(toy):
    def with_strict(x, scale=2.0, *, strict=False):
        return strict

    toy()
    functions = import_module("toypeer.functions")
    known = peer(Replacement("toypeer.functions:double", with_strict))
    with known.patch():
        assert functions.double(1.0) is False
    with known.patch(strict=True):
        assert functions.double(1.0) is True


def test_many_threads_patch_once(toy):
    toy()
    functions = import_module("toypeer.functions")
    theirs, ours, made = functions.double, peer(), []
    threads = [threading.Thread(target=lambda: made.append(ours.patch())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(dict(patch) == {"toypeer.functions:double": theirs} for patch in made) and len(made) == 8
    ours.unpatch()
    assert functions.double is theirs


@pytest.mark.parametrize("version", ["1.1.9", "1.3.0", "2.0"])
def test_another_version_is_refused(toy, version: str):
    toy(version)
    with pytest.raises(
        RuntimeError, match=f"toypeer is {version}, expected 1.0 or 1.2, which .* pip install 'toypeer==1.2.*'"
    ):
        peer(versions=("1.0", "1.2")).patch()


def test_a_package_that_is_absent():
    with pytest.raises(ImportError, match=r"no-such-peer is not installed: pip install 'no-such-peer==1.2.\*'"):
        Peer("nosuchpeer", "no-such-peer", {"1.2": ()}).patch()


def test_a_folder_of_that_name_is_no_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "toypeer").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="toypeer is not installed as toypeer, so its version cannot be told"):
        peer().patch()


@pytest.mark.parametrize(
    "changed, message",
    [
        ("def double(x, scale=3.0):", r"has positional or keyword scale=3.0 and lacks positional or keyword scale=2.0"),
        ("def double(x, scale=2.0, *, mask=None):", "has keyword-only mask=None, unlike"),
        ("def double(x):", "lacks positional or keyword scale=2.0"),
        ("def twice(x, scale=2.0):", "toypeer.functions of toypeer 1.2.0 has no double"),
    ],
)
def test_another_signature_is_refused_and_nothing_is_replaced(toy, changed: str, message: str):
    text = FUNCTIONS.replace("def double(x, scale=2.0):", changed)
    toy(functions=text.replace('{"double": double}', "{}"), trainer="")
    functions = import_module("toypeer.functions")
    before = dict(vars(functions))
    with pytest.raises(RuntimeError, match=message):
        peer(*EVERYTHING[::-1]).patch()
    assert dict(vars(functions)) == before
    assert "apply" not in vars(functions.Function)


def test_a_package_in_the_middle_of_its_import(toy):
    """Its names are there already, but what it will do with them is not."""
    toy(trainer="from toypeer.functions import double\nimport toypeer\ntoypeer.hook()\n")
    package, ours = import_module("toypeer"), peer(Replacement("toypeer.trainer:double", our_double))
    package.hook = ours.patch
    with pytest.raises(
        RuntimeError, match=r"toypeer.trainer is still being imported: call patch\(\) when toypeer is imported"
    ):
        import_module("toypeer.trainer")
    package.hook = lambda: None
    with ours.patch():
        assert import_module("toypeer.trainer").double(1.0)[0] == "ours"


def test_a_module_whose_own_imports_fail(toy):
    toy(trainer="import a_package_that_is_not_there\n")
    with pytest.raises(
        ImportError, match="toypeer.trainer cannot be imported: No module named 'a_package_that_is_not_there'"
    ):
        peer(Replacement("toypeer.trainer:double", our_double)).patch()
