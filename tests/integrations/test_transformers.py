"""`patch_model`: the loss and every gradient are the model's own, what was read of a model before is read as before, and the logits are not made."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fastppo.bench import memory
from fastppo.integrations.deferred_logits import DeferredLogits
from fastppo.integrations.transformers import patch_model, unpatch_model
from fastppo.model import prepare_model
from tests.integrations.same_training import IDS, LABELS, assert_same_training, exact_loss, loss_and_gradients, own_step
from tests.rollout.tiny import FAMILIES, VOCAB_SIZE, as_transformers_has_it, make_model
from tests.tolerance import assert_as_exact_as_model


def was_deferred(output: object) -> bool:
    """The logits are promised and nothing has read them."""
    logits = output.logits
    return type(logits) is DeferredLogits and logits.memory.value is None


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def patched(llama) -> PreTrainedModel:
    return patch_model(llama).model


class TestLoss:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_every_family(self, family):
        """Tied and untied heads, biases, soft-capping, logit scales."""
        assert was_deferred(assert_same_training(make_model(family), own_step()))

    @pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi", "gpt2"])
    def test_of_a_model_in_bfloat16(self, family):
        assert was_deferred(assert_same_training(make_model(family, dtype=torch.bfloat16), own_step()))

    @pytest.mark.parametrize("family", ["gemma2", "phi"])
    def test_under_autocast(self, family):
        def run(model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return own_step()(model)

        output = assert_same_training(make_model(family), run, own_step())
        assert was_deferred(output) and output.logits.dtype == torch.bfloat16

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_with_the_loss_of_a_router(self, family):
        model = make_model(family, router_aux_loss_coef=0.5, output_router_logits=True)
        output = assert_same_training(model, own_step())
        assert was_deferred(output) and output.aux_loss > 0 and len(output.router_logits) == 2

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_gradient_checkpointing(self, family, reentrant):
        model = make_model(family).train()
        model.config.attention_dropout = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        def run(one):
            one.enable_input_require_grads()
            return own_step(use_cache=False)(one)

        assert was_deferred(assert_same_training(model, run))

    @settings(derandomize=True, deadline=None, max_examples=40)
    @given(st.data())
    def test_in_every_option(self, data):
        """What Trainer and users pass besides labels, by name and by position."""
        batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
        ignore_index = data.draw(st.sampled_from([-100, -1, 0]))
        ids, kept = IDS[:batch, :length], torch.rand(batch, length) < data.draw(st.sampled_from([0.2, 0.7, 1.0]))
        kept[0, 1] = True
        keep = data.draw(st.sampled_from([0, length, 2]))
        labels = ids.masked_fill(~kept, ignore_index)[:, -keep:]
        kwargs = {"ignore_index": ignore_index} if ignore_index != -100 or data.draw(st.booleans()) else {}
        kwargs |= {"logits_to_keep": keep} if keep else {}
        kwargs |= data.draw(st.sampled_from([{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)}]))
        kwargs |= data.draw(st.sampled_from([{}, {"return_dict": False}, {"use_cache": False}]))
        if data.draw(st.booleans()):
            kwargs["shift_labels"] = labels.roll(-1, 1)
        family = data.draw(st.sampled_from(["llama", "gemma2", "phi"]))
        output = assert_same_training(make_model(family), lambda model: model(input_ids=ids, labels=labels, **kwargs))
        assert isinstance(output, tuple) == (kwargs.get("return_dict") is False)

    def test_with_labels_by_position(self, llama):
        place = [*LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames].index("labels") - 1
        assert was_deferred(assert_same_training(llama, lambda model: model(*(IDS, *[None] * (place - 1), LABELS))))

    def test_of_nothing_but_ignored_labels(self, llama):
        """NaN, and gradients of 0, as torch has it."""
        found, _ = (
            loss_and_gradients(x, own_step(labels=LABELS * 0 - 100))[1] for x in (patch_model(llama).model, llama)
        )
        unpatch_model(llama)
        own = loss_and_gradients(llama, own_step(labels=LABELS * 0 - 100))[1]
        assert found[0].isnan() and own[0].isnan() and all(map(torch.equal, found[1:], own[1:]))

    def test_of_frozen_parts(self, llama):
        """A frozen head, and a frozen trunk."""
        for frozen in (llama.lm_head, llama.model):
            llama.requires_grad_(True)
            frozen.requires_grad_(False)
            assert was_deferred(assert_same_training(llama, own_step()))

    def test_without_gradients(self, llama):
        expected = llama(IDS, labels=LABELS)
        for mode in (torch.no_grad, torch.inference_mode):
            with patch_model(llama), mode():
                output = llama(IDS, labels=LABELS)
                assert was_deferred(output) and not output.loss.requires_grad and not output.logits.requires_grad
                assert torch.equal(output.logits, expected.logits)

    def test_takes_a_fraction_of_the_memory(self):
        model = make_model("llama", vocab_size=16384)
        ids = torch.randint(1, 16384, (8, 64))

        def step(_) -> dict:
            return {"loss": loss_and_gradients(model, lambda x: x(ids, labels=ids, use_cache=False))[1][0]}

        def peak() -> int:
            model(ids[:1, :8], labels=ids[:1, :8]).loss.backward()
            return memory.cpu_peak(step, {})

        own = memory.in_a_child(peak)
        patch_model(model)
        ours = memory.in_a_child(peak)
        if isinstance(own, str) or isinstance(ours, str):
            pytest.skip(f"peak memory is not measured here: {own} {ours}")
        assert own > 3 * 4 * ids.numel() * 16384 > 2 * ours  # three times the logits, of which ours has none


class MaskingLlama(LlamaForCausalLM):
    """Writes into its logits before the loss, as Chameleon does with its image tokens."""

    def forward(self, input_ids, labels=None, through_a_view=False, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        rows = logits.view(-1, logits.shape[-1])
        (rows if through_a_view else logits)[..., :20] = -30.0
        return self.loss_function(rows if not through_a_view else logits, labels, logits.shape[-1]), logits


class TestOtherUsesOfTheLogits:
    """What is not the plain loss has the numbers, and their gradients."""

    def test_read_later_they_are_the_models_own(self):
        for family in ("llama", "gemma2", "cohere", "granite", "phi"):
            model = make_model(family)
            own = model(IDS, labels=LABELS)
            with patch_model(model):
                output = model(IDS, labels=LABELS)
                named, listed = dict(output.items()), output.to_tuple()
            assert list(named) == list(own.keys()) and isinstance(listed[1], Tensor)
            assert output.logits.shape == own.logits.shape and output.logits.dtype == own.logits.dtype
            assert output.logits.requires_grad and len(output.logits) == 3 and was_deferred(output)
            assert torch.equal(output.logits, own.logits) and torch.equal(listed[1], own.logits)

    def test_their_gradients_reach_the_model(self, llama):
        """A second loss of the logits beside the model's own, read in Python, in C++ alone, and through a hook."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.square().sum()

            @staticmethod
            def backward(ctx, upstream):
                return 2 * ctx.saved_tensors[0] * upstream

        for second in (lambda x: x.square().sum(), Square.apply, lambda x: torch.stack([x, x]).square().sum() / 2):

            def run(model, second=second):
                output = own_step()(model)
                return output.loss + second(output.logits)

            assert_same_training(llama, run)

    @pytest.mark.parametrize("through_a_view", [False, True])
    def test_written_into_before_the_loss(self, llama, through_a_view):
        model = MaskingLlama(llama.config)
        model.eval().load_state_dict(llama.state_dict())
        _, logits = assert_same_training(model, lambda x: x(IDS, labels=LABELS, through_a_view=through_a_view))
        assert (logits[..., :20] == -30).all()

    @pytest.mark.parametrize(
        "loss",
        [
            dict(label_smoothing=0.1),
            dict(weight=torch.linspace(0.5, 2, VOCAB_SIZE)),
            dict(reduction="sum"),
        ],
        ids=lambda x: next(iter(x)),
    )
    def test_a_loss_function_of_the_users(self, llama, loss):
        def loss_function(logits, labels, vocab_size, **_):
            options = {k: v.to(logits.dtype) if isinstance(v, Tensor) else v for k, v in loss.items()}
            return F.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), **options)

        def run(model):
            model.loss_function = loss_function
            return own_step()(model)

        assert_same_training(llama, run)

    def test_errors_of_labels_are_torchs_own(self, patched):
        for labels in (LABELS.int(), LABELS.clamp_min(0) + VOCAB_SIZE, LABELS.clamp_max(-7)):
            with pytest.raises((RuntimeError, IndexError), match="expected target dtype to be Long|out of bounds"):
                patched(IDS, labels=labels)

    def test_read_after_the_weights_have_changed(self, patched):
        output = patched(IDS, labels=LABELS)
        output.loss.backward()
        torch.optim.SGD(patched.parameters(), lr=0.1).step()
        with pytest.raises(RuntimeError, match="expected output.logits to be read before optimizer.step"):
            output.logits.argmax(-1)

    def test_what_would_be_silently_nothing_is_refused(self, patched):
        output = patched(IDS, labels=LABELS)
        with pytest.raises(RuntimeError, match="keep no gradient"):
            output.logits.retain_grad()
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(output.loss, output.logits)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(patched(IDS, labels=LABELS).loss, patched.lm_head.weight, create_graph=True)
        with pytest.raises(RuntimeError, match=r"expected a copy of them, logits.clone\(\)"):
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                patched(IDS, labels=LABELS).logits.zero_()


class TestModel:
    """A patched model is a model of Transformers in everything else."""

    def test_there_and_back(self, llama):
        for model in (llama, make_model("gpt2")):
            original = type(model)
            with patch_model(model) as given:
                assert given is model and isinstance(model, original) and type(model) is not original
                with patch_model(model):  # does nothing, so leaving it undoes nothing
                    pass
                assert was_deferred(model(IDS, labels=LABELS))
            assert type(model) is original and type(model(IDS, labels=LABELS).logits) is Tensor
            unpatch_model(model)
            assert type(model) is original and not hasattr(model, "_fastppo_head")

    def test_without_labels_it_is_untouched(self, llama):
        expected, generated = llama(IDS).logits, llama.generate(IDS, max_new_tokens=4, do_sample=False)
        patch_model(llama)
        assert torch.equal(llama(IDS).logits, expected) and type(llama(IDS, labels=None).logits) is Tensor
        assert type(llama(IDS, logits_to_keep=2).logits) is Tensor
        assert torch.equal(llama.generate(IDS, max_new_tokens=4, do_sample=False), generated)

    @pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_are_patched_too(self, patched, copied):
        other = copied(patched)
        assert was_deferred(other(IDS, labels=LABELS)) and type(other) is type(patched)
        unpatch_model(other)
        assert type(other) is LlamaForCausalLM and was_deferred(patched(IDS, labels=LABELS))

    def test_files_say_nothing_of_it(self, patched, tmp_path):
        patched.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is LlamaForCausalLM and loaded.config.architectures == ["LlamaForCausalLM"]
        assert torch.equal(loaded(IDS).logits, patched(IDS).logits)
        state = patched.state_dict()
        assert list(state) == list(loaded.state_dict())
        assert was_deferred(type(patched).from_pretrained(tmp_path)(IDS, labels=LABELS))

    def test_its_parts_may_be_replaced(self, llama):
        """A vocabulary that grows, another head, another type."""
        own = copy.deepcopy(llama)
        patch_model(llama)
        for model in (own, llama):
            torch.manual_seed(0)
            model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
            model.lm_head = nn.Linear(32, VOCAB_SIZE + 4)
            model.bfloat16()
        output = llama(IDS, labels=LABELS)
        assert was_deferred(output) and torch.equal(output.logits, own(IDS).logits)

    def test_compiled_it_is_as_before(self):
        model = make_model("gemma2")
        expected = model(IDS, labels=LABELS)
        patch_model(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        output = compiled(IDS, labels=LABELS, use_cache=False)
        assert type(output.logits) is Tensor and torch.equal(output.loss, expected.loss)
        assert torch.equal(output.logits, expected.logits)
        torch.compiler.reset()

    def test_a_compiled_trunk_has_the_fused_head(self, patched):
        patched.model.compile(backend="eager")
        assert was_deferred(patched(IDS, labels=LABELS))
        torch.compiler.reset()

    def test_compiled_code_reads_the_logits(self, patched):
        total = torch.compile(lambda x: x.sum(), backend="eager")(patched(IDS, labels=LABELS).logits)
        exact = as_transformers_has_it(patched, torch.float64)(IDS).logits.sum()
        assert_as_exact_as_model(total, patched(IDS).logits.sum(), exact)
        torch.compiler.reset()

    def test_under_torch_func_it_is_as_before(self, patched):
        def loss(parameters):
            return torch.func.functional_call(patched, parameters, (IDS,), {"labels": LABELS, "use_cache": False}).loss

        parameters = {name: x.detach() for name, x in patched.named_parameters()}
        found = torch.func.grad(loss)(parameters)
        native, exact = (as_transformers_has_it(patched, x) for x in (torch.float32, torch.float64))
        unpatch_model(native)
        exact.loss_function = exact_loss
        expected = (loss_and_gradients(x, own_step(use_cache=False))[1][1:] for x in (native, exact))
        for values in zip(found.values(), *expected, strict=True):
            assert_as_exact_as_model(*values)

    def test_in_fp64_it_is_as_before(self):
        model = make_model("llama", dtype=torch.float64)
        expected = loss_and_gradients(model, own_step())[1]
        patch_model(model)
        assert all(map(torch.equal, loss_and_gradients(model, own_step())[1], expected))

    def test_threads_do_not_meet(self, llama):
        """One with labels and one without, in the same model at the same time."""
        logits = llama(IDS).logits
        loss = patch_model(llama).model(IDS, labels=LABELS).loss
        barrier, failures = threading.Barrier(4), []

        def work(with_labels: bool) -> None:
            barrier.wait()
            for _ in range(20):
                output = llama(IDS, labels=LABELS) if with_labels else llama(IDS)
                right = (
                    was_deferred(output) and torch.equal(output.loss, loss)
                    if with_labels
                    else torch.equal(output.logits, logits)
                )
                if not right:
                    failures.append(with_labels)

        threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_serves_ppo_too(self, patched):
        assert prepare_model(patched) is patched


class TestRefusals:
    def test_of_what_is_no_language_model(self, llama):
        for model in (nn.Linear(2, 2), "llama"):
            with pytest.raises(TypeError, match=r"expected a transformers.PreTrainedModel"):
                patch_model(model)
        with pytest.raises(ValueError, match="its forward takes no labels"):
            patch_model(LlamaModel(llama.config))

    def test_of_an_output_layer_that_is_more_than_linear(self, llama):
        handle = llama.lm_head.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is torch.nn.*Linear, expected a plain"):
            patch_model(llama)
        handle.remove()
        llama.lm_head = nn.Sequential(llama.lm_head)
        with pytest.raises(ValueError, match="torch.nn.modules.container.Sequential, expected a plain"):
            patch_model(llama)
        assert type(llama) is LlamaForCausalLM

    def test_of_a_forward_of_the_instances(self, llama):
        llama.forward = llama.forward
        with pytest.raises(ValueError, match="has a forward of its own"):
            patch_model(llama)

    def test_of_undoing_below_another_class(self, patched):
        inner = type(patched)
        patched.__class__ = type("Over", (inner,), {})
        patch_model(patched)
        with pytest.raises(RuntimeError, match="Over was given another class after patch_model"):
            unpatch_model(patched)

    def test_a_head_that_becomes_more_later_runs_as_it_is(self, llama, caplog):
        def run(model):
            model.lm_head.register_forward_hook(lambda _, args, output: output * 0.5)
            return own_step()(model)

        with caplog.at_level(logging.WARNING, logger="fastppo.integrations"):
            assert type(assert_same_training(llama, run).logits) is Tensor
        assert len(caplog.records) <= 1 and all("runs as Transformers has it" in x.message for x in caplog.records)


class TestOtherModels:
    def test_with_pictures(self):
        """Llava takes the loss as a language model does; Gemma 3 picks rows of its logits itself."""
        vision = dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
        )  # fmt: skip
        for model_class, config_class, family, more in (
            (LlavaForConditionalGeneration, LlavaConfig, "llama", {}),
            (Gemma3ForConditionalGeneration, Gemma3Config, "gemma3", dict(mm_tokens_per_image=4)),
        ):
            kind, settings = FAMILIES[family]
            text = dict(model_type=kind) | settings
            model = model_class(
                config_class(text_config=text, vision_config=dict(model_type="siglip_vision_model") | vision, **more)
            )
            kwargs = dict(token_type_ids=IDS * 0) if family == "gemma3" else {}
            assert_same_training(model.eval(), own_step(attention_mask=IDS * 0 + 1, **kwargs))

    def test_with_an_encoder(self):
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
            )
        )
        native, ours = model.eval(), copy.deepcopy(model)  # it calls torch's cross-entropy itself, on unshifted labels
        expected = loss_and_gradients(native, own_step())[1]
        exact = loss_and_gradients(copy.deepcopy(native).double(), own_step())[1]
        with patch_model(ours):
            output, found = loss_and_gradients(ours, own_step())
        assert was_deferred(output)
        for values in zip(found, expected, exact, strict=True):
            assert_as_exact_as_model(*values)


class TestUsers:
    """Whoever trains with Transformers."""

    @staticmethod
    def _train(model: PreTrainedModel, folder, **settings) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the steps, loss of the evaluation, and its logits."""
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-3, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, seed=0, **settings,
        )  # fmt: skip
        rows = [dict(input_ids=i, labels=x) for i, x in zip(IDS, LABELS, strict=True)]
        trainer = Trainer(model, arguments, train_dataset=rows * 2, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        predicted = trainer.predict(rows)
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        return tuple(torch.tensor(x) for x in (losses, [predicted.metrics["test_loss"]], logits))

    @pytest.mark.parametrize("bf16", [False, True])
    def test_trainer(self, tmp_path, bf16, monkeypatch):
        model = make_model("llama", attention_dropout=0.0)
        native, exact = (as_transformers_has_it(model, x) for x in (torch.float32, torch.float64))
        native_values = self._train(native, tmp_path, bf16=bf16)
        exact.loss_function = exact_loss
        exact_values = self._train(exact, tmp_path)
        ours, reads, read = as_transformers_has_it(model, torch.float32), [], DeferredLogits.read
        monkeypatch.setattr(DeferredLogits, "read", lambda logits: (reads.append(ours.training), read(logits))[1])
        patch_model(ours)
        for values in zip(self._train(ours, tmp_path, bf16=bf16), native_values, exact_values, strict=True):
            assert_as_exact_as_model(*values[:2], values[2].double())
        assert reads and not any(reads)  # the evaluation reads the logits, training does not
        unpatch_model(ours)  # Trainer has left a forward on the model that goes through the patched one
        assert type(ours(IDS, labels=LABELS).logits) is Tensor

    @pytest.mark.parametrize("patched_first", [False, True])
    def test_adapters(self, patched_first):
        """Adapters beside the head train; one on the head is left to Transformers."""
        peft = pytest.importorskip("peft")

        def wrapped(model, *layers):
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=[*layers], init_lora_weights=False, task_type="CAUSAL_LM")
            return peft.get_peft_model(model, config)

        for layers in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
            native = wrapped(make_model("llama"), *layers)
            exact = wrapped(make_model("llama"), *layers).double()
            exact.get_base_model().loss_function = exact_loss
            if not patched_first and "lm_head" in layers:
                with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is peft"):
                    patch_model(native)
                continue
            ours = make_model("llama")
            ours = (
                wrapped(patch_model(ours).model, *layers)
                if patched_first
                else patch_model(wrapped(ours, *layers)).model
            )
            output, found = loss_and_gradients(ours, own_step())
            assert was_deferred(output) == ("lm_head" not in layers)
            rest = (loss_and_gradients(x, own_step())[1] for x in (native, exact))
            for values in zip(found, *rest, strict=True):
                if values[0] is not None:
                    assert_as_exact_as_model(*values)

    @pytest.mark.parametrize("wrapper", ["ddp", "ddp-unused", "fsdp"])
    def test_wrappers_of_several_processes(self, tmp_path, wrapper):
        """In one process; gradients through the loss and, beside it, through the logits."""
        if torch.distributed.is_initialized():
            pytest.skip("another test's process group is open")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:

            def wrapped(model):
                if wrapper != "fsdp":
                    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp-unused")
                mesh = torch.distributed.init_device_mesh("cpu", (1,))
                return torch.distributed.fsdp.fully_shard(model, mesh=mesh)

            def values(model):
                output = own_step(use_cache=False)(model)
                deferred.append(was_deferred(output))
                (output.loss + output.logits.square().mean()).backward()
                gradients = [p.grad.full_tensor() if wrapper == "fsdp" else p.grad for p in model.parameters()]
                return [output.loss.detach(), *gradients]

            deferred: list[bool] = []
            model = make_model("llama")
            exact = copy.deepcopy(model).double()
            exact.loss_function = exact_loss
            found, own, exact = map(values, map(wrapped, (patch_model(copy.deepcopy(model)).model, model, exact)))
            for triple in zip(found, own, exact, strict=True):
                assert_as_exact_as_model(*triple)
            # DDP's search for unused parameters takes copies of all outputs.
            assert deferred == [wrapper != "ddp-unused", False, False]
        finally:
            torch.distributed.destroy_process_group()
