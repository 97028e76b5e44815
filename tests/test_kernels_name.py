"""`kernels/` beside Hugging Face's package of that name: in the checkout both packages, and Transformers, work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Whatever name Transformers asks of the package: a class, or a decorator that changes nothing.
INIT = """
from kernels import layer  # as the real one, it imports itself while it is being imported

def _keep(*arguments, **options):
    return lambda decorated: decorated

def __getattr__(name):
    return type(name, (), {}) if name[:1].isupper() else _keep
"""
TRANSFORMERS = """
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes))
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder of installed packages that holds `kernels` 0.16.1."""
    metadata = tmp_path / "kernels-0.16.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.1\n")
    (tmp_path / "kernels" / "layer").mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").write_text(INIT)
    (tmp_path / "kernels" / "layer" / "__init__.py").write_text("Layer = 'the installed one'\n")
    return tmp_path


def run(code: str, site: Path | None = None) -> str:
    """Output of Python in the checkout, whose root comes first on sys.path."""
    path = os.pathsep.join(filter(None, (str(ROOT), site and str(site), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_is_what_is_imported(site):
    code = "import kernels, kernels.layer; from kernels.layer import Layer; from kernels import get_kernel\n"
    code += "import sys; assert sys.modules['kernels'] is kernels; print(kernels.__file__, Layer, sep='\\n')"
    assert run(code, site).splitlines() == [str(site / "kernels" / "__init__.py"), "the installed one"]


def test_ours_keeps_its_own_name(site):
    code = "import kernels, fastppo.kernels.token_logprobs as ours; print(ours.__file__); print(kernels.__file__)"
    assert run(code, site).splitlines() == [
        str(ROOT / "kernels" / "token_logprobs.py"),
        str(site / "kernels" / "__init__.py"),
    ]


def test_transformers_uses_the_installed_package(site):
    assert run("import fastppo.bench.__main__" + TRANSFORMERS, site).endswith("True\n")


def test_transformers_without_the_package():
    assert run("import fastppo.bench.__main__" + TRANSFORMERS).endswith("False\n")


def test_without_the_package_nothing_can_be_imported_from_it():
    code = """
for statement in ("from kernels import get_kernel", "import kernels.token_logprobs", "import kernels.layer"):
    try:
        exec(statement)
    except ImportError:
        continue
    raise SystemExit(statement + " works")
"""
    run(code)


def test_an_empty_folder_of_that_name_is_no_package(tmp_path):
    (tmp_path / "kernels").mkdir()
    assert run("import kernels; print(kernels.__version__)", tmp_path) == "0\n"


def test_a_package_that_fails_to_import_says_so(site):
    (site / "kernels" / "__init__.py").write_text("raise ImportError('needs another torch')")
    code = "try:\n    import kernels\nexcept ImportError as error:\n    print(error)\nimport sys; print('kernels' in sys.modules)"
    assert run(code, site) == "needs another torch\nFalse\n"
