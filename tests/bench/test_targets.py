"""Targets: one file of them, each about a case that exists, and each held against our own row."""

from __future__ import annotations

import pytest

from fastppo.bench import targets
from fastppo.bench.catalog import load_cases
from fastppo.bench.harness import Target
from fastppo.bench.setting import Setting


def test_the_projects_targets_are_about_cases_that_exist():
    """Loading checks every section, the other device's too."""
    on_cpu, on_gpu = (targets.load(targets.DEFAULT, device).of_cases for device in targets.DEVICES)
    assert on_cpu["ppo_loss", "262144 tokens, policy + value + KL, forward + backward"] == Target(speedup=4.0)
    assert on_gpu["gae", "[512, 1024], mask with holes"] == Target(seconds=10e-6)
    assert on_cpu.keys().isdisjoint(on_gpu)


def test_a_case_without_a_line_has_no_target():
    found = targets.load(targets.DEFAULT, "cpu")
    assert found.of("approx_kl", load_cases("approx_kl", Setting())[0].name) == Target()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cpu.gae", "is not TOML"),
        ("[gpu.gae]", "unknown device: 'gpu', did you mean 'cpu'?"),
        ("cpu = 3", "cpu is 3, expected a table"),
        ("[cpu.gea]", "unknown op of cpu: 'gea', did you mean 'gae'?"),
        ("[cuda.ppo_update]", "unknown op of cuda: 'ppo_update'"),
        ('[cpu.gae]\n"[256, 1023]" = {}', r"unknown case of cpu.gae: '\[256, 1023\]', did you mean '\[256, 1024\]'?"),
        ('[cpu.gae]\n"[256, 1024]" = { speed = 2 }', "unknown field of cpu.gae.*: 'speed', did you mean 'speedup'?"),
        ('[cpu.gae]\n"[256, 1024]" = { speedup = "2" }', "speedup is '2', expected a number above 0"),
        ('[cpu.gae]\n"[256, 1024]" = { speedup = true }', "speedup is True, expected a number"),
        ('[cpu.gae]\n"[256, 1024]" = { speedup = 0 }', "speedup is 0, expected a number above 0"),
        ('[cpu.gae]\n"[256, 1024]" = 2', "expected a table"),
        (
            '[cpu.gae]\n"[256, 1024]" = { speedup = { avx3 = 2 } }',
            "unknown instruction set of .*: 'avx3', did you mean 'avx2'?",
        ),
        ('[cpu.gae]\n"[256, 1024]" = { speedup = { avx2 = 0 } }', "speedup is 0, expected a number above 0"),
    ],
)
def test_a_target_about_nothing_is_named(tmp_path, text, message):
    file = tmp_path / "targets.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        targets.load(file, "cpu")
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(("isa", "speedup"), [("avx512", 80.0), ("avx2", 50.0), ("plain", None)])
def test_an_instruction_set_has_its_own_number(monkeypatch, tmp_path, isa, speedup):
    file = tmp_path / "targets.toml"
    file.write_text('[cpu.gae]\n"[256, 1024]" = { speedup = { avx512 = 80.0, avx2 = 50.0 }, copy_share = 0.1 }')
    monkeypatch.setattr(targets.native, "cpu_isa", lambda: isa)
    assert targets.load(file, "cpu").of("gae", "[256, 1024]") == Target(speedup=speedup, copy_share=0.1)
