"""`patch_layers`: losses and gradients are the model's own, and so is every call that our kernels do not take."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaForCausalLM,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from fastppo.integrations import transformers_layers
from fastppo.integrations.deferred_logits import DeferredLogits
from fastppo.integrations.transformers import patch_layers, patch_model, unpatch_layers, unpatch_model
from fastppo.model import prepare_model
from fastppo.model.parts_trunk import PartsTrunk
from tests.integrations.same_training import IDS, LABELS, assert_same_training, exact_loss, loss_and_gradients, own_step
from tests.rollout.tiny import VOCAB_SIZE, as_transformers_has_it, make_model
from tests.tolerance import assert_as_exact_as_model

LIKE_LLAMA = ("llama", "qwen2", "qwen3", "mistral-window")
LENGTHS = torch.tensor([[12], [3], [10]])
COLUMNS = torch.arange(12)
RIGHT = (LENGTHS > COLUMNS).long()  # padding is on the right
LEFT = (COLUMNS >= 12 - LENGTHS).long()
BOTH = LEFT * (COLUMNS < 11)
COUNTED = (LEFT.cumsum(1) - 1).masked_fill(LEFT == 0, 1)  # as `generate` counts positions
PADDINGS = {
    "none": {},
    "ones": dict(attention_mask=torch.ones_like(IDS)),
    "right": dict(attention_mask=RIGHT),
    "right, bool": dict(attention_mask=RIGHT.bool(), position_ids=COLUMNS[None]),
    "left": dict(attention_mask=LEFT),
    "left, float": dict(attention_mask=LEFT.float()),
    "left with positions": dict(attention_mask=LEFT, position_ids=COUNTED),
    "both": dict(attention_mask=BOTH),
    "positions": dict(position_ids=COLUMNS.expand(3, -1)),
}


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Calls of our layers."""
    calls, hidden = [], PartsTrunk.hidden
    monkeypatch.setattr(PartsTrunk, "hidden", lambda *args, **kwargs: (calls.append(1), hidden(*args, **kwargs))[1])
    return calls


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def patched(llama) -> PreTrainedModel:
    return patch_layers(llama).model


def labels_of(padding: dict) -> Tensor:
    """None that a row of padding has to predict."""
    mask = padding.get("attention_mask", torch.ones_like(IDS)).bool()
    return IDS.masked_fill(~mask | (mask.cumsum(1) == 1), -100)


def assert_ours_then(ran: list[int], run: Callable[[], object]) -> object:
    """Our layers run, once."""
    ran.clear()
    output = run()
    assert ran == [1]
    return output


class TestNumbers:
    @pytest.mark.parametrize("family", LIKE_LLAMA)
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_loss_and_gradients(self, ran, family, padding):
        kwargs = PADDINGS[padding]
        step = own_step(labels=labels_of(kwargs), use_cache=False, **kwargs)
        assert_same_training(make_model(family), step, patch=patch_layers, attention="sdpa")
        assert len(ran) == 2  # the comparison with the modules, and the step

    @pytest.mark.parametrize("family", LIKE_LLAMA)
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_logits(self, ran, family, padding):
        kwargs = PADDINGS[padding]
        model = make_model(family)
        native, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        patch_layers(model)
        with torch.no_grad():
            output = assert_ours_then(ran, lambda: model(IDS, use_cache=False, **kwargs))
            hidden = model.model(IDS, use_cache=False, **kwargs)
            native, exact = (x(IDS, use_cache=False, **kwargs).logits for x in (native, exact))
        kept = kwargs.get("attention_mask", torch.ones_like(IDS)).bool()
        assert_as_exact_as_model(output.logits[kept], native[kept], exact[kept])
        assert output.past_key_values is None and not output.logits[~kept].any()
        assert hidden.last_hidden_state.shape == (3, 12, 32) and not hidden.last_hidden_state[~kept].any()

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("with_loss", [False, True])
    def test_gradient_checkpointing(self, ran, reentrant, with_loss):
        """As Trainer calls it, in training mode; with the fused head too."""
        model = make_model("qwen3", attention_dropout=0.0).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        def run(one):
            one.enable_input_require_grads()
            return own_step(attention_mask=RIGHT, labels=labels_of(dict(attention_mask=RIGHT)))(one)

        def patch(one):
            return patch_layers(patch_model(one).model if with_loss else one)

        output = assert_same_training(model, run, patch=patch, attention="sdpa")
        assert len(ran) == 2 and (type(output.logits) is DeferredLogits) == with_loss

    def test_frozen_parts(self, ran, llama):
        for frozen in (llama.lm_head, llama.model.embed_tokens, llama.model.layers[0], llama.model):
            llama.requires_grad_(True)
            frozen.requires_grad_(False)
            assert_same_training(llama, own_step(use_cache=False), patch=patch_layers, attention="sdpa")

    def test_the_padding_token_in_a_sequence_does_not_learn(self, ran):
        """Its row of the embedding has no gradient, as torch has it."""
        model = make_model("llama", pad_token_id=int(IDS[0, 3]), tie_word_embeddings=False)
        assert_same_training(model, own_step(use_cache=False), patch=patch_layers, attention="sdpa")
        assert len(ran) == 2

    def test_a_row_of_nothing_but_padding(self, ran, patched):
        mask = RIGHT.clone()
        mask[1] = 0
        hidden = assert_ours_then(ran, lambda: patched.model(IDS, mask, use_cache=False)).last_hidden_state
        own = patched.model(IDS[[0, 2]], RIGHT[[0, 2]], use_cache=False).last_hidden_state
        assert torch.equal(hidden[[0, 2]], own) and not hidden[1].any()

    def test_other_heads(self, ran):
        """A model without a language-model head, and a trunk alone."""
        config = make_model("llama").config
        for kind in (LlamaForTokenClassification, LlamaModel):
            torch.manual_seed(0)
            model = kind(config).eval()
            assert_same_training(
                model, lambda one: one(IDS, use_cache=False)[0][..., 0].sum(), patch=patch_layers, attention="sdpa"
            )
        assert len(ran) == 4

    def test_no_second_derivative(self, patched):
        loss = patched(IDS, labels=LABELS, use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, patched.model.embed_tokens.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def with_hooks(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output * 0.5)


def with_backward_hooks(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_full_backward_hook(lambda _, given, __: tuple(x * 0.5 for x in given))


def with_a_forward_of_its_own(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.forward = lambda x: x


def with_fewer_layers(model: PreTrainedModel) -> None:
    model.config.num_hidden_layers = 1


def with_dropout(model: PreTrainedModel) -> None:
    model.train()


def with_bidirectional_attention(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def with_lora(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)


ROWS = torch.arange(12) % 4  # packed sequences of four tokens
HOLES = RIGHT * (COLUMNS != 1)
CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].expand(3, -1, -1, -1)
CALLS = {
    "a cache": (dict(use_cache=True), "a cache is asked for"),
    "a cache by default": (dict(use_cache=None), "a cache is asked for"),
    "attentions": (dict(output_attentions=True), "output_attentions is asked for"),
    "hidden states": (dict(output_hidden_states=True), "output_hidden_states is asked for"),
    "a mask of queries and keys": (dict(attention_mask=CAUSAL), "expected attention_mask"),
    "a mask with holes": (dict(attention_mask=HOLES), "expected attention_mask"),
    "packed sequences": (dict(position_ids=ROWS.expand(3, -1)), "expected position_ids"),
    "packed positions in one row": (dict(position_ids=ROWS[None]), "expected position_ids"),
    "shifted positions": (dict(position_ids=COLUMNS[None] + 3), "expected position_ids"),
    "no causality": (dict(is_causal=False), "it is given is_causal"),
    "embeddings": (dict(ids=None, inputs_embeds=torch.ones(3, 12, 32)), "it is given inputs_embeds"),
}
CHANGES = {
    "a hook": (with_hooks, "expected plain modules"),
    "a hook of the backward pass": (with_backward_hooks, "expected plain modules"),
    "a forward of its own": (with_a_forward_of_its_own, "expected plain modules"),
    "fewer layers": (with_fewer_layers, "expected plain modules"),
    "LoRA": (with_lora, "expected plain modules"),
    "bfloat16": (lambda model: model.bfloat16(), "expected plain modules"),
    "float64": (lambda model: model.double(), "expected plain modules"),
    "dropout": (with_dropout, "attention_dropout is not 0"),
    "attention in both directions": (with_bidirectional_attention, "its attention is not causal"),
}


class TestItsOwn:
    """What ours does not take has the bits of the model's own forward, and the log tells why."""

    @staticmethod
    def _assert_own(model: PreTrainedModel, run, reason: str, caplog) -> None:
        transformers_layers._tell.cache_clear()
        torch.manual_seed(1)
        output, found = loss_and_gradients(model, run)
        unpatch_layers(model)
        torch.manual_seed(1)
        own_output, own = loss_and_gradients(model, run)
        assert type(output) is type(own_output) and list(output) == list(own_output)
        for one, two in zip(found, own, strict=True):
            assert one is two is None or torch.equal(one, two)
        said = [x.getMessage() for x in caplog.records if x.name == "fastppo.integrations"]
        assert len(said) == 1 and said[0].startswith(f"LlamaModel runs its own layers: {reason}")

    @pytest.mark.parametrize("call", CALLS)
    def test_calls(self, patched, caplog, call):
        kwargs, reason = CALLS[call]
        if "output_attentions" in kwargs:
            patched.set_attn_implementation("eager")
        kwargs = {"labels": LABELS, "use_cache": False, **kwargs}
        ids = kwargs.pop("ids", IDS)
        self._assert_own(patched, lambda model: model(ids, **kwargs), reason, caplog)

    @pytest.mark.parametrize("change", CHANGES)
    def test_changes_after_the_patch(self, patched, caplog, change):
        make, reason = CHANGES[change]
        make(patched)
        self._assert_own(patched, own_step(use_cache=False), reason, caplog)

    def test_autocast(self, patched, caplog):
        def run(model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return own_step(use_cache=False)(model)

        self._assert_own(patched, run, "expected plain modules", caplog)

    def test_hooks_that_hidden_states_leave_behind(self, ran, patched):
        patched(IDS, output_hidden_states=True, use_cache=False)
        assert_ours_then(ran, lambda: patched(IDS, use_cache=False))

    def test_changes_are_seen(self, ran, caplog):
        """Of the window, the layers and the numbers; ours goes on with what is there now."""
        model = patch_layers(make_model("mistral-window")).model
        layers = model.model.layers

        def shorter():
            model.model.layers, model.config.num_hidden_layers = layers[:1], 1

        for change in (
            lambda: setattr(model.config, "sliding_window", 3),
            shorter,
            lambda: model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False),
            lambda: model.model.norm.weight.data.mul_(2.0),
        ):
            change()
            native, exact = (as_transformers_has_it(model, x) for x in (torch.float32, torch.float64))
            ran.clear()
            found = model(IDS, use_cache=False).logits
            assert ran
            native, exact = (unpatched(x)(IDS, use_cache=False).logits for x in (native, exact))
            assert_as_exact_as_model(found, native, exact)
        assert not caplog.records

    def test_generate(self, llama):
        own = llama.generate(IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False)
        patch_layers(llama)
        for use_cache in (True, False):
            found = llama.generate(IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False, use_cache=use_cache)
            assert torch.equal(found, own)

    def test_a_compiled_model(self, llama, patched):
        compiled = torch.compile(patched, backend="eager", fullgraph=True)
        found = compiled(IDS, labels=LABELS, use_cache=False)
        unpatch_layers(patched)
        assert torch.equal(found.loss, patched(IDS, labels=LABELS, use_cache=False).loss)
        torch.compiler.reset()

    def test_under_torch_func_and_modes(self, patched):
        parameters = {name: x.detach() for name, x in patched.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(patched, parameters, (IDS,), {"labels": LABELS, "use_cache": False}).loss

        found = torch.func.grad(loss)(parameters)
        with FlopCounterMode(display=False) as counted:
            patched(IDS, use_cache=False)
        unpatch_layers(patched)
        with FlopCounterMode(display=False) as own:
            patched(IDS, use_cache=False)
        assert counted.get_total_flops() == own.get_total_flops()
        expected = torch.func.grad(loss)(parameters)
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_errors_are_its_own(self, patched):
        with pytest.raises(TypeError, match="multiple values"):
            patched.model(IDS, input_ids=IDS)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            patched.model()
        with pytest.raises(IndexError):
            patched(IDS + VOCAB_SIZE, use_cache=False)


def unpatched(model: PreTrainedModel) -> PreTrainedModel:
    unpatch_layers(model)
    return model


class TestModel:
    def test_there_and_back(self, llama, ran):
        original = type(llama.model)
        own = llama(IDS, use_cache=False).logits
        with patch_layers(llama) as given:
            assert given is llama and isinstance(llama.model, original) and type(llama.model) is not original
            with patch_layers(llama):  # does nothing, so leaving it undoes nothing
                pass
            assert_ours_then(ran, lambda: llama(IDS, use_cache=False))
        assert type(llama.model) is original and torch.equal(llama(IDS, use_cache=False).logits, own)
        unpatch_layers(llama)
        assert type(llama.model) is original

    def test_a_failed_step_undoes_it(self, llama):
        with pytest.raises(IndexError), patch_layers(llama):
            llama(IDS + VOCAB_SIZE, use_cache=False)
        assert type(llama.model) is LlamaModel

    @pytest.mark.parametrize("loss_first", [False, True])
    def test_with_patch_model(self, ran, llama, loss_first):
        """Either first, and undone in either order."""
        patches = [patch_model, patch_layers] if loss_first else [patch_layers, patch_model]
        for patch in patches:
            patch(llama)
        output = assert_ours_then(ran, lambda: llama(IDS, labels=LABELS, use_cache=False))
        assert type(output.logits) is DeferredLogits
        unpatch_model(llama)
        output = assert_ours_then(ran, lambda: llama(IDS, labels=LABELS, use_cache=False))
        assert type(output.logits) is Tensor
        unpatch_layers(llama)
        assert type(llama) is LlamaForCausalLM and type(llama.model) is LlamaModel

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_are_patched_too(self, ran, patched, copied):
        expected = patched(IDS, use_cache=False).logits
        other = copied(patched)
        unpatch_layers(patched)
        ran.clear()
        assert torch.equal(other(IDS, use_cache=False).logits, expected) and len(ran) == 2
        unpatch_layers(other)
        assert type(other.model) is LlamaModel

    def test_files_say_nothing_of_it(self, patched, tmp_path):
        patched.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert type(loaded.model) is LlamaModel and list(loaded.state_dict()) == list(patched.state_dict())

    def test_modes_of_autograd(self, ran, patched):
        logits = assert_ours_then(ran, lambda: patched(IDS, use_cache=False)).logits
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = assert_ours_then(ran, lambda: patched(IDS, use_cache=False)).logits
                assert torch.equal(found, logits) and not found.requires_grad

    def test_no_cache_in_a_training_step(self, ran):
        model = patch_layers(make_model("llama", attention_dropout=0.0)).model.train()
        output = assert_ours_then(ran, lambda: model(IDS, labels=LABELS, num_items_in_batch=torch.tensor(7)))
        assert output.past_key_values is None
        model.config.use_cache = False
        model.eval()
        ran.clear()
        model(IDS)
        assert ran

    def test_prepared_models_stay_fastppos(self, patched):
        """Patched or not, a prepared model runs under fastppo alone."""
        prepare_model(patched)
        with pytest.raises(ValueError, match="was not called by fastppo"):
            patched(IDS, use_cache=False)

    def test_adapters_that_are_merged(self, ran, llama):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(
            llama, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        with pytest.raises(ValueError, match="LlamaModel is not built as Llama is: .*Linear is no plain linear layer"):
            patch_layers(adapted)
        merged = adapted.merge_and_unload().requires_grad_(True)
        ran.clear()
        assert_same_training(merged, own_step(use_cache=False), patch=patch_layers, attention="sdpa")
        assert len(ran) == 2

    def test_trainer(self, ran, tmp_path):
        """Three steps and an evaluation, with gradient checkpointing and the fused head."""

        def train(model: PreTrainedModel) -> tuple[Tensor, ...]:
            arguments = TrainingArguments(
                tmp_path, per_device_train_batch_size=3, max_steps=3, learning_rate=1e-3, use_cpu=True, report_to=[],
                save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0, gradient_checkpointing=True,
            )  # fmt: skip
            columns = zip(IDS, RIGHT, labels_of(dict(attention_mask=RIGHT)), strict=True)
            rows = [dict(input_ids=i, attention_mask=m, labels=x) for i, m, x in columns]
            trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return torch.tensor(losses), torch.tensor(trainer.evaluate()["eval_loss"])

        model = make_model("llama", attention_dropout=0.0)
        native, exact, ours = (as_transformers_has_it(model, x) for x in (torch.float32, torch.float64, torch.float32))
        exact.loss_function = exact_loss
        patch_layers(patch_model(ours).model)
        ran.clear()
        for values in zip(train(ours), train(native), train(exact), strict=True):
            assert_as_exact_as_model(*values[:2], values[2].double())
        assert len(ran) >= 3


class TestRefusals:
    def test_of_what_is_no_model(self):
        for model in (nn.Linear(2, 2), "llama"):
            with pytest.raises(TypeError, match=r"expected a transformers.PreTrainedModel"):
                patch_layers(model)

    @pytest.mark.parametrize(
        "family, reason",
        [
            ("gpt2", "GPT2Model is not built as Llama is: GPT2Model consists of wte"),
            ("mixtral", "is not built as Llama is: MixtralSparseMoeBlock consists of gate, experts"),
            ("gemma2", "is not built as Llama is: its embedding is not plain"),
        ],
    )
    def test_of_other_models(self, family, reason):
        model = make_model(family)
        with pytest.raises(ValueError, match=reason):
            patch_layers(model)
        assert not hasattr(type(model.base_model), "_fastppo_layers")

    def test_of_other_numbers(self):
        """Built like Llama to the eye: Granite scales what its layers add."""
        with pytest.raises(ValueError, match="its layers give other numbers, or attend in another way"):
            patch_layers(make_model("granite", residual_multiplier=0.5))

    def test_of_other_types(self):
        with pytest.raises(ValueError, match="its parameters are not contiguous tensors of one type"):
            patch_layers(make_model("llama", dtype=torch.bfloat16))

    def test_of_other_devices(self):
        with torch.device("meta"):
            model = LlamaForCausalLM(make_model("llama").config)
        with pytest.raises(ValueError, match="LlamaModel is on meta, expected the CPU"):
            patch_layers(model)

    def test_of_what_hangs_on_it(self, llama):
        with_backward_hooks(llama)
        with pytest.raises(ValueError, match="it has hooks of the backward pass"):
            patch_layers(llama)
        with_hooks(llama)
        with pytest.raises(ValueError, match="it has hooks or forwards of its own"):
            patch_layers(llama)
        assert type(llama.model) is LlamaModel

    def test_of_undoing_below_another_class(self, patched):
        patched.model.__class__ = type("Over", (type(patched.model),), {})
        patch_layers(patched)
        with pytest.raises(RuntimeError, match="Over was given another class after patch_layers"):
            unpatch_layers(patched)


def test_each_reason_is_told_once(patched, caplog):
    transformers_layers._tell.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fastppo.integrations"), torch.no_grad():
        for _ in range(3):
            patched(IDS)
            patched(IDS, attention_mask=HOLES, use_cache=False)
    assert len(caplog.records) == 2
