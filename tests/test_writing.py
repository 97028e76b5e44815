"""A run that has trained can be written: what Transformers would refuse is found before the first step, or written as it came."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fastppo import PPOTrainer
from fastppo.console import Reporter
from fastppo.model import load_model
from fastppo.model.writing import require_writable, write_model
from tests.rollout.tiny import FAMILIES
from tests.rollout.tiny import make_model as make_family
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import count_a, tiny_config

# What hub models have in generation_config.json, which Transformers reads with a warning and refuses to write.
ODD = {
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "top-k without do_sample": {"do_sample": False, "top_k": 20},
    "min-p without do_sample": {"min_p": 0.1},
    "beams without beams": {"length_penalty": 2.0, "early_stopping": True},
    "negative padding": {"pad_token_id": -1},
    "scores without a dict": {"output_scores": True},
    "a cache without use_cache": {"use_cache": False, "cache_implementation": "static"},
}


def _folder(path, generation_config: dict | None = None, config: dict | None = None) -> str:
    """A model's folder as the hub has it."""
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    if generation_config is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | generation_config))
    if config is not None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return str(path)


class Lines(Reporter):
    def __init__(self) -> None:
        super().__init__(1, quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def _trainer(path, model, tokenizer=None) -> PPOTrainer:
    if not isinstance(model, str):
        tokenizer = tokenizer or make_tokenizer()
    config = tiny_config(path / "run", total_steps=1, rollout__prompts_per_step=2)
    return PPOTrainer(model, reward=count_a, prompts=["ab", "c"], config=config, tokenizer=tokenizer, reporter=Lines())


class TestGenerationConfigs:
    @pytest.mark.parametrize("case", ODD)
    def test_odd_ones_are_trained_with_and_written_as_they_came(self, case, tmp_path):
        trainer = _trainer(tmp_path, _folder(tmp_path / "hub", ODD[case]))
        trainer.train()
        written = tmp_path / "run" / "model"
        came, went = (GenerationConfig.from_pretrained(p).to_dict() for p in (tmp_path / "hub", written))
        assert went == came and {k: went[k] for k in ODD[case]} == ODD[case]
        assert ODD[case].items() <= json.loads((written / "generation_config.json").read_text()).items()
        assert trainer.model.generation_config.to_dict() == came
        notes = [line for line in trainer.reporter.lines if "will be written as it came" in line]
        assert len(notes) == 1 and all(name in notes[0] for name in list(ODD[case])[-1:])
        trained = AutoModelForCausalLM.from_pretrained(written)
        assert torch.equal(trained.lm_head.weight, trainer.model.lm_head.weight)
        assert trained.generation_config.eos_token_id == 1

    def test_ordinary_ones_are_said_nothing_of(self, tmp_path):
        trainer = _trainer(tmp_path, _folder(tmp_path / "hub", {"do_sample": True, "temperature": 0.6, "top_k": 20}))
        trainer.train()
        assert not [line for line in trainer.reporter.lines if "generation config" in line]
        assert GenerationConfig.from_pretrained(tmp_path / "run" / "model").top_k == 20

    @pytest.mark.parametrize(
        "change", [{"max_new_tokens": 0}, {"num_return_sequences": 3}, {"cache_implementation": "odd"}]
    )
    def test_those_that_nobody_could_read_are_refused_at_construction(self, change, tmp_path):
        model = make_model()
        for name, value in change.items():
            setattr(model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"LlamaForCausalLM could not be written.*{next(iter(change))}"):
            _trainer(tmp_path, model)
        assert not (tmp_path / "run").exists()

    def test_generation_settings_in_the_models_config(self, tmp_path):
        """Transformers moves those of a file away; of a config in memory it refuses them."""
        _trainer(tmp_path, _folder(tmp_path / "hub", config={"temperature": 0.7})).train()
        model = make_model()
        model.config.temperature = 0.7
        with pytest.raises(ValueError, match=r"could not be written.*model\.generation_config.*temperature"):
            _trainer(tmp_path, model)


class TestWeights:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_said_is_what_comes(self, family, tied, tmp_path):
        model = make_family(family, tie_word_embeddings=tied)
        require_writable(model, make_tokenizer())
        write_model(model, make_tokenizer(), tmp_path)
        loaded = load_model(tmp_path, dtype="float32", device="cpu").state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())

    def _shared_layers(model):
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    def _overlapping(model):
        rows = torch.randn(80, 32)
        model.model.layers[0].mlp.up_proj.weight.data = rows[:64]
        model.model.layers[1].mlp.up_proj.weight.data = rows[16:]

    @pytest.mark.parametrize("share", [_shared_layers, _overlapping])
    def test_shared_memory_that_transformers_refuses(self, share, tmp_path):
        model = make_model()
        share(model)
        with pytest.raises(RuntimeError):
            model.save_pretrained(tmp_path / "really")
        with pytest.raises(ValueError, match=r"could not be written.*shared tensors.*layers\.1\.mlp\.up_proj"):
            _trainer(tmp_path, model)

    def test_shared_memory_that_it_takes(self, tmp_path):
        """Neighbours in one block of memory, as fused or flattened parameters are."""
        model, rows = make_model(), torch.randn(128, 32)
        model.model.layers[0].mlp.up_proj.weight.data = rows[:64]
        model.model.layers[1].mlp.up_proj.weight.data = rows[64:]
        require_writable(model, make_tokenizer())
        write_model(model, make_tokenizer(), tmp_path)

    def test_no_weight_is_written_to_find_out(self, tmp_path, monkeypatch):
        model, sizes = make_model(), []
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda tensors, *_, **__: sizes.extend(
            x.numel() * x.element_size() for x in tensors.values()
        ))  # fmt: skip
        require_writable(model, make_tokenizer())
        assert len(sizes) == len(model.state_dict()) and sum(sizes) <= 2 * len(sizes)

    @pytest.mark.parametrize("serializable", [False, True])
    def test_quantised_weights(self, serializable, tmp_path):
        """A model from a GGUF file or a quantised one cannot train all of its weights, whether or not it could be written."""
        model = make_model()
        model.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(quant_method="gguf"), is_serializable=lambda: serializable
        )
        with pytest.raises(ValueError, match=r"LlamaForCausalLM are quantised \(gguf\), expected plain ones"):
            _trainer(tmp_path, model)


class TestTheRest:
    def test_a_tokenizer_that_cannot_be_written(self, tmp_path):
        tokenizer = make_tokenizer()
        tokenizer.init_kwargs["made_at"] = object()
        with pytest.raises(ValueError, match="could not be written.*not JSON serializable"):
            _trainer(tmp_path, make_model(), tokenizer)

    def test_a_config_that_cannot_be_written(self, tmp_path):
        model = make_model()
        model.config.made_at = object()
        with pytest.raises(ValueError, match="could not be written.*not JSON serializable"):
            _trainer(tmp_path, model)

    def test_all_that_was_there_is_there_again(self, tmp_path):
        trainer = _trainer(tmp_path, _folder(tmp_path / "hub"))
        trainer.save_pretrained(tmp_path / "out")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "hub").iterdir()}
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()
        came, went = ((tmp_path / name / "config.json").read_text() for name in ("hub", "out"))
        assert came == went
