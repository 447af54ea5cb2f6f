import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saerl_cli.config.groups import Dtype, ModelConfig, ModelKind
from saerl_cli.models import (
    describe,
    eos_token_ids,
    folder_sha256,
    light_tokenizer,
    load_model,
    locate,
    resolve_sites,
    separator_id,
    tensors_sha256,
)

NEOX = GPTNeoXConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=32,
)
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def local(folder) -> ModelConfig:
    return ModelConfig(kind=ModelKind.local, path=str(folder))


@pytest.fixture
def copied(tiny_planted_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_planted_model, tmp_path / "model")


# --- sites -----------------------------------------------------------------------------------------------------------


def test_aliases_name_modules_and_widths():
    mlp, hidden, attention, residual = resolve_sites(["mlp_out.2", "mlp_hidden.2", "attn_out.0", "resid_post.1"], NEOX)
    assert (mlp.module, mlp.width, mlp.layer) == ("gpt_neox.layers.2.mlp", 16, 2)
    assert (hidden.module, hidden.width) == ("gpt_neox.layers.2.mlp.act", 24)
    assert (attention.module, attention.width) == ("gpt_neox.layers.0.attention", 16)
    assert (residual.module, residual.width) == ("gpt_neox.layers.1", 16)
    assert resolve_sites(["mlp_out.1"], LLAMA)[0].module == "model.layers.1.mlp"


def test_every_alias_is_a_module_whose_output_has_the_width():
    for config, kind in ((NEOX, GPTNeoXForCausalLM), (LLAMA, LlamaForCausalLM)):
        model = kind(config)
        for site in resolve_sites(["*"], config):
            by_path = resolve_sites([site.module], model)
            assert by_path == [site]
            shapes = []
            hook = model.get_submodule(site.module).register_forward_hook(lambda m, a, o, s=shapes: s.append(o))
            model(torch.zeros(1, 4, dtype=torch.long))
            hook.remove()
            output = shapes[0][0] if isinstance(shapes[0], tuple) else shapes[0]
            assert output.shape == (1, 4, site.width)


def test_globs_expand_in_layer_order_and_names_are_not_repeated():
    names = [site.name for site in resolve_sites(["mlp_out.[1-9]*", "mlp_out.1", "gpt_neox.layers.2.mlp"], NEOX)]
    assert names == ["mlp_out.1", "mlp_out.2"]


def test_a_module_without_alias_is_measured_from_a_config_or_a_model():
    path = "gpt_neox.layers.1.mlp.dense_h_to_4h"
    assert resolve_sites([path], NEOX) == resolve_sites([path], GPTNeoXForCausalLM(NEOX))
    site = resolve_sites([path], NEOX)[0]
    assert (site.name, site.position, site.width) == (path, "module", 24)
    assert resolve_sites([path], SimpleNamespace(**NEOX.to_dict())) == [site]


def test_first_mlp_of_a_parallel_residual_model_is_trivial():
    def trivial(config):
        return [s.name for s in resolve_sites(["*"], config) if s.trivial]

    assert trivial(NEOX) == ["mlp_out.0", "mlp_hidden.0", "mlp_in.0"]
    assert trivial(SimpleNamespace(**{**NEOX.to_dict(), "use_parallel_residual": False})) == []
    assert trivial(LLAMA) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp_out.3", "layer 3 is out of range, this model has mlp_out.0 … mlp_out.2"),
        ("mlp_out.7*", "no site matches 'mlp_out.7*'; this model has mlp_out.0 … mlp_out.2"),
        ("mlp.1", "no module 'mlp.1'"),
        ("mlpout", "unknown site 'mlpout'"),
        ("mlp_out", "unknown site 'mlp_out'"),
        ("gpt_neox.layers.9.mlp", "no module 'gpt_neox.layers.9.mlp'; there is gpt_neox.layers.0.mlp"),
        ("gpt_neox.layers", "does not put out one vector a token"),
    ],
)
def test_unknown_sites_are_refused_in_one_line(name, message):
    with pytest.raises(ValueError) as error:
        resolve_sites([name], NEOX)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_llama_has_no_mlp_hidden_alias():
    with pytest.raises(ValueError, match="unknown site 'mlp_hidden.0'"):
        resolve_sites(["mlp_hidden.0"], LLAMA)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_pads_on_the_left(tiny_planted_model):
    loaded = load_model(local(tiny_planted_model))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.context_size == loaded.model.config.max_position_embeddings
    assert loaded.sha256 == hashlib.sha256((tiny_planted_model / "model.safetensors").read_bytes()).hexdigest()
    assert set(eos_token_ids(loaded)) == {loaded.tokenizer.eos_token_id}
    assert separator_id(loaded.tokenizer) == loaded.tokenizer.eos_token_id
    assert describe(local(tiny_planted_model)).hidden_size == loaded.model.config.hidden_size


def test_the_precision_is_the_one_asked_for(tiny_planted_model):
    config = ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model), dtype=Dtype.bfloat16)
    assert {parameter.dtype for parameter in load_model(config).model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are never loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), "missing or malformed"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused_before_loading(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message) as error:
        describe(local(copied))
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_refused():
    with pytest.raises(ValueError, match="no such folder"):
        locate(local("/nowhere/at/all"))


def test_corrupted_weights_are_refused(copied):
    (copied / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="cannot load the model"):
        load_model(local(copied))


def test_weights_of_another_model_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fill the model"):
        load_model(local(copied))


def test_a_tokenizer_larger_than_the_model_is_refused(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra{index}": len(vocabulary) + index for index in range(5)}
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="they disagree"):
        describe(local(copied))


def test_a_hub_name_without_a_network_offers_what_works():
    config = ModelConfig(kind=ModelKind.hub, name="nobody/no-such-model-123")
    with pytest.raises(ValueError, match=r"cannot reach the Hub.*model=planted and model=local model.path=DIR"):
        describe(config)


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_change_with_every_part():
    base = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    reference = tensors_sha256(base.items())
    assert tensors_sha256(reversed(base.items())) == reference
    assert tensors_sha256({**base, "b": torch.ones(4)}.items()) != reference
    assert tensors_sha256({**base, "a": torch.arange(4.0).nextafter(torch.tensor(9.0))}.items()) != reference
    assert tensors_sha256({"a": base["a"], "c": base["b"]}.items()) != reference
    assert tensors_sha256({**base, "a": base["a"].bfloat16()}.items()) != reference


def test_a_folder_hash_covers_all_weight_files(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"one")
    single = folder_sha256(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"two")
    both = folder_sha256(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"too")
    assert len({single, both, folder_sha256(tmp_path)}) == 3


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_story_models_end_a_text_with_their_separator(shared_data):
    for name in ("neox_stories_nano", "stories260k"):
        loaded = load_model(local(shared_data / name))
        assert 1 in eos_token_ids(loaded)
        assert separator_id(loaded.tokenizer) == 1
        assert loaded.model.generation_config.eos_token_id == eos_token_ids(loaded)


@pytest.mark.real_data
def test_pythia_configs_have_sites_and_its_tokenizer_fits_no_story_model(shared_data, tmp_path):
    config = json.loads((shared_data / "pythia_configs" / "pythia-70m" / "config.json").read_text())
    sites = resolve_sites(["mlp_out.*"], SimpleNamespace(**config))
    assert [site.width for site in sites] == [512] * 6
    folder = shutil.copytree(shared_data / "neox_stories_nano", tmp_path / "nano")
    shutil.copy(shared_data / "pythia_tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(ValueError, match="50277 entries but the model embeds 512"):
        describe(local(folder))
    assert light_tokenizer(shared_data / "pythia_tokenizer") is not None


def test_a_raw_module_path_works_without_weights_on_an_architecture_without_aliases():
    """GPT-2 compares token ids with its pad token, which the meta device refuses."""
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    (site,) = resolve_sites(["transformer.h.1.mlp"], config)
    assert (site.name, site.module, site.width) == ("transformer.h.1.mlp", "transformer.h.1.mlp", 16)
