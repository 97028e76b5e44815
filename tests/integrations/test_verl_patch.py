"""What ours refuses of verl's calls, and the package patched: its modules, a trainer's step, its own tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastppo.integrations import verl as ours
from tests.integrations.verl_inputs import NOWHERE, POLICY_LOSSES, actor, tokens

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
functional = pytest.importorskip("verl.utils.torch_functional")
fused = pytest.importorskip("verl.utils.experimental.torch_functional")
losses = pytest.importorskip("verl.workers.utils.losses")
omegaconf = pytest.importorskip("omegaconf")

POLICY = tokens((2, 5), torch.float32, 0)
WEIGHTS = POLICY["rollout_is_weights"]
ONES, LEAF = torch.ones(2, 5), torch.ones(2, 5, requires_grad=True)


def vanilla(**changes):
    return ours.compute_policy_loss_vanilla(**{**POLICY, "config": actor(), **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: vanilla(response_mask=ONES / 2), "mask holds other numbers than 0 and 1"),
        (lambda: vanilla(old_log_prob=LEAF), "old_log_prob requires a gradient"),
        (lambda: vanilla(advantages=LEAF), "advantages requires a gradient"),
        (lambda: vanilla(rollout_is_weights=WEIGHTS - 3), "rollout_is_weights has 0, a negative number"),
        (lambda: vanilla(rollout_is_weights=WEIGHTS[0]), "rollout_is_weights has shape"),
        (lambda: vanilla(config=None), "config is NoneType, expected an actor's config"),
        (lambda: vanilla(config=actor(clip_ratio_c=1.0)), "dual_clip is 1.0"),
        (lambda: vanilla(config=actor(global_batch_info={"dp_size": 2})), "dp_size is 2, expected 1 without"),
        (lambda: vanilla(config=actor(global_batch_info={"horizon": 2})), "unexpected keyword argument 'horizon'"),
        (lambda: vanilla(loss_agg_mode="mean"), "loss_agg_mode is 'mean'"),
        (lambda: ours.compute_policy_loss_gspo(ONES - 12, ONES, -ONES, ONES, config=actor()), r"less than exp\(10\)"),
        (lambda: ours.compute_value_loss(ONES, LEAF, ONES, ONES, 0.2), "returns requires a gradient"),
        (lambda: ours.compute_value_loss(ONES, ONES, ONES, ONES, torch.tensor(0.2)), "value_clip is"),
        (lambda: ours.agg_loss(ONES.int(), ONES, "token-mean"), "dtype torch.int32"),
        (lambda: ours.agg_loss(ONES, ONES[0], "token-mean"), "mask has shape"),
        (lambda: ours.agg_loss(ONES, ONES, "token-mean-norm"), "token-mean-norm"),
        (lambda: ours.kl_penalty(ONES, ONES, "abs+"), "kind is 'abs\\+'"),
        (lambda: ours.kl_penalty(ONES, ONES, "full"), "kind is 'full'"),
        (lambda: ours.kl_penalty_forward(ONES, ONES, "k3+"), "expected a kind without"),
        (lambda: ours.masked_mean(ONES, ONES, axis=-1), "axis is -1"),
        (lambda: ours.masked_whiten(LEAF, ONES), "values requires a gradient"),
        (lambda: ours.masked_whiten(ONES, NOWHERE), "keeps 0 elements, expected at least 2"),
        (lambda: ours.compute_gae_advantage_return(ONES, ONES, ONES, torch.tensor(1.0), 1.0), "gamma is"),
        (lambda: ours.logprobs_from_logits(ONES, torch.tensor([1, -100])), "labels"),
        (lambda: ours.entropy_from_logits_with_chunking(ONES[None]), r"expected \[N, V\]"),
        (
            lambda: ours.linear_cross_entropy(ONES, ONES, torch.zeros(2).long(), 1.0, "none", object()),
            "dist_process_group",
        ),
        (lambda: ours.linear_cross_entropy(ONES, ONES, torch.zeros(2).long(), 1.0, "avg"), "reduction is 'avg'"),
        (lambda: ours.FusedLinearForPPO()(ONES, ONES, torch.zeros(2).long(), torch.ones(2)), "temperature is"),
        (
            lambda: ours.agg_loss(torch.nested.nested_tensor([ONES[0]], layout=torch.jagged), ONES, "token-mean"),
            "loss_mat is NestedTensor",
        ),
    ],
)
def test_what_is_left_to_verl(call, message):
    """A refusal is a TypeError or ValueError, which the patch catches."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_configs_of_every_kind():
    """An actor's dataclass, or what OmegaConf makes of YAML."""
    options = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "global_batch_info": {"dp_size": 1}}
    from_yaml = omegaconf.OmegaConf.create(options)
    expected = core.compute_policy_loss_vanilla(**POLICY, config=from_yaml)
    got = ours.compute_policy_loss_vanilla(**POLICY, config=from_yaml)
    assert got[0].item() == pytest.approx(expected[0].item()) and got[1] == pytest.approx(expected[1])


@pytest.fixture
def patched():
    with ours.patch():
        yield


HOLDERS = {
    "verl.workers.utils.losses": ("agg_loss", "kl_penalty", "compute_value_loss", "masked_mean"),
    "verl.trainer.distillation.losses": ("agg_loss", "kl_penalty"),
    "verl.workers.engine.fsdp.transformer_impl": ("logprobs_from_logits",),
}


def holders() -> dict[tuple[str, str], Callable]:
    """Who holds a function that is replaced: losses, engines, verl's tables, the modules where they stand."""
    held = {
        (name, function): getattr(import_module(name), function)
        for name, functions in HOLDERS.items()
        for function in functions
    }
    held |= {("policy losses", kind): core.POLICY_LOSS_REGISTRY[kind] for kind in POLICY_LOSSES}
    held["estimators", "gae"] = core.ADV_ESTIMATOR_REGISTRY["gae"]
    return held | {
        tuple(one.target.split(":")): getattr(import_module(one.target.split(":")[0]), one.target.split(":")[1])
        for one in ours.REPLACEMENTS
        if "." not in one.target.split(":")[1]
    }


def test_verls_own_modules_see_ours_and_get_theirs_back():
    before, table, forward = holders(), dict(core.POLICY_LOSS_REGISTRY), fused.FusedLinearForPPO.forward
    with ours.patch() as patch:
        assert len(patch) == len(ours.REPLACEMENTS)
        for place, function in holders().items():
            assert function.__wrapped__ is before[place], place
        assert fused.FusedLinearForPPO.forward.__wrapped__ is forward
        assert core.get_policy_loss_fn("fastppo") is core.compute_policy_loss_vanilla
    assert holders() == before and core.POLICY_LOSS_REGISTRY == table and fused.FusedLinearForPPO.forward is forward


def test_a_trainers_step_with_ours(patched, caplog):
    """verl's own loss of an actor: our terms, added to in place as it does, their gradients, and no call left to verl."""
    td = pytest.importorskip("tensordict").TensorDict
    lengths, prompts = [3, 5], [2, 1]
    total = sum(lengths) + sum(prompts)
    log_probs, entropy = torch.randn(total) - 2, torch.rand(total)
    data = {
        "prompts": torch.nested.nested_tensor([torch.zeros(n).long() for n in prompts], layout=torch.jagged),
        "responses": torch.nested.nested_tensor([torch.zeros(n).long() for n in lengths], layout=torch.jagged),
    }
    for name in ("response_mask", "old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights"):
        rows = [torch.ones(n).long() if name == "response_mask" else torch.rand(n) + 0.1 for n in lengths]
        data[name] = torch.nested.nested_tensor(rows, layout=torch.jagged)
    batch = td(data, batch_size=[2])
    from verl.utils import tensordict_utils

    tensordict_utils.assign_non_tensor(batch, dp_size=2, batch_num_tokens=16, global_batch_size=4)
    config = actor(use_kl_loss=True, entropy_coeff=0.01)

    def step():
        leaf, bonus = log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()
        loss, metrics = losses.ppo_loss(config, {"log_probs": leaf, "entropy": bonus}, batch)
        loss.backward()
        return loss.detach(), leaf.grad, bonus.grad, sorted(metrics)

    with caplog.at_level(logging.WARNING, "fastppo.integrations"):
        got = step()
    assert not caplog.records
    ours.unpatch()
    for a, b in zip(got[:3], step()[:3], strict=True):
        assert a.flatten().tolist() == pytest.approx(b.flatten().tolist(), nan_ok=False)
    assert got[3] == step()[3]


def test_what_ours_refuses_runs_as_verl_has_it(caplog):
    """The same bits as without a patch, said once; its own errors stay its own."""
    weighing = {**POLICY, "response_mask": ONES / 2, "config": actor()}
    expected = core.compute_policy_loss_vanilla(**weighing)
    with caplog.at_level(logging.WARNING, "fastppo.integrations"), ours.patch():
        for _ in range(2):
            loss, metrics = core.compute_policy_loss_vanilla(**weighing)
            assert torch.equal(loss, expected[0]) and metrics == expected[1]
        with pytest.raises(AssertionError):
            core.compute_policy_loss_vanilla(**{**weighing, "config": None})
        with pytest.raises(NotImplementedError):
            core.kl_penalty(ONES, ONES, "full")
        assert torch.equal(core.kl_penalty(ONES, ONES, "abs+"), torch.zeros(2, 5))
    vanilla = [x for x in caplog.records if "compute_policy_loss_vanilla" in x.getMessage()]
    assert len(vanilla) == 1 and "mask holds other numbers than 0 and 1" in vanilla[0].getMessage()


def test_a_patched_head(patched):
    """verl makes an instance of its own class for each forward pass."""
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.randint(0, 20, (3,))
    expected = ours.FusedLinearForPPO()(hidden, weight, labels)
    for backend in ("torch", "liger"):
        got = fused.FusedLinearForPPO(impl_backend=backend).forward(hidden, weight, labels, temperature=1.0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strict_gives_verls_own_nan():
    with ours.patch():
        assert core.agg_loss(ONES, NOWHERE, "token-mean") == 0
    with ours.patch(strict=True):
        assert core.agg_loss(ONES, NOWHERE, "token-mean").isnan()
        barred = torch.tensor([[0.0, -torch.inf]])
        assert functional.entropy_from_logits(barred).isnan()
        assert core.agg_loss(ONES, ONES, "token-mean") == 1


def test_register_alone_adds_a_loss_and_changes_nothing_else():
    """For `policy_loss.loss_mode=fastppo` without a patch; it outlives a patch that comes and goes."""
    before = holders()
    ours.register()
    try:
        function = core.get_policy_loss_fn("fastppo")
        assert holders() == before
        got, expected = (f(**POLICY, config=actor()) for f in (function, core.compute_policy_loss_vanilla))
        assert got[0].item() == pytest.approx(expected[0].item()) and got[1] == pytest.approx(expected[1])
        weighing = {**POLICY, "response_mask": ONES / 2, "config": actor()}
        assert torch.equal(function(**weighing)[0], core.compute_policy_loss_vanilla(**weighing)[0])
        with ours.patch():
            assert core.get_policy_loss_fn("fastppo") is function
        assert core.get_policy_loss_fn("fastppo") is function
    finally:
        del core.POLICY_LOSS_REGISTRY["fastppo"]


def test_entropy_compiles_as_verls_engines_compile_it(patched):
    compiled = torch.compile(functional.entropy_from_logits, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        logits = torch.randn(rows, 20, requires_grad=True)
        entropy = compiled(logits)
        assert torch.equal(entropy, ours.entropy_from_logits(logits))
        entropy.sum().backward()


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_functions_need_no_verl():
    """Who has not installed it can call them all the same."""
    run(
        "-c",
        "import sys; sys.modules['verl'] = None\n"
        "import torch; from fastppo.integrations import verl\n"
        "x = torch.ones(2, 5); assert verl.agg_loss(x, x > -9, 'token-mean') == 1\n"
        "verl.logprobs_from_logits(x, torch.zeros(2).long())",
    )


@pytest.mark.slow
def test_every_process_of_a_run_can_patch(tmp_path):
    """verl imports the modules that VERL_USE_EXTERNAL_MODULES names, in its workers too."""
    (tmp_path / "with_fastppo.py").write_text("from fastppo.integrations import verl\n\nverl.patch()\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = "import verl.workers.utils.losses as losses; print(losses.agg_loss.__wrapped__.__module__)"
    out = run("-c", command, PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="with_fastppo")
    assert out.split()[-1] == "verl.trainer.ppo.core_algos"


VERL_TESTS = ["core_algos", "loss_aggregation", "value_loss_normalization", "dynamic_policy_losses"]


@pytest.mark.slow
def test_verls_own_tests_pass_with_ours():
    """Those of its losses and estimators, from a checkout of its repository at v0.9: VERL_TESTS names its folder `tests`."""
    folder = Path(os.environ.get("VERL_TESTS", Path(__file__).parents[3] / "verl" / "tests"))
    files = [folder / "trainer" / "ppo" / f"test_{name}_on_cpu.py" for name in VERL_TESTS]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        pytest.skip(f"no {missing[0]}: VERL_TESTS names no folder of verl's tests")
    command = (
        "import sys, pytest; from fastppo.integrations import verl; verl.patch(); sys.exit(pytest.main(sys.argv[1:]))"
    )
    run("-c", command, "-q", "-p", "no:cacheprovider", "--rootdir", str(folder.parent), *map(str, files))
