"""Every adapter in the same trainer: exact at the start, nothing else moves, resumed to the bit, saved and loaded."""

import json

import pytest
import torch
from rl_fixtures import adapter_settings, build_trainer, tiny_model, trained, word_tokenizer

from saerl_cli.adapter import load_adapter, save_adapter
from saerl_cli.config.adapter import AdapterConfig, SparsityConfig
from saerl_cli.models import Loaded
from saerl_cli.rl.adapters import peft_config
from saerl_cli.rl.proof import all_tensors, frozen_hashes
from saerl_cli.rl.rollouts.scoring import is_value_parameter

BASELINES = ["lora", "ia3", "steering_vector", "bias_only", "random_dictionary", "neuron_basis"]
MOVES = {
    "lora": "lora_",
    "ia3": "ia3_",
    "random_dictionary": "sparse_coeffs_delta",
    "sparse_coeffs": "sparse_coeffs_",
}
"""Part of the names of what an adapter trains; `activation_vector_v` for the others."""
COUNTS = {  # width 32, hidden 64, 2 layers, d_sae 64
    "lora": 2 * ((32 + 96) + (32 + 32) + (32 + 64) + (64 + 32)),  # rank 1
    "ia3": 2 * (96 + 64),  # query_key_value's outputs, dense_4h_to_h's inputs
    "steering_vector": 2 * 32,
    "bias_only": 2 * (32 + 32 + 96 + 32 + 64 + 32) + 32,  # two norms and four linear layers a block, the last norm
    "random_dictionary": 2 * 64,
    "neuron_basis": 2 * 64,
}
GATED = SparsityConfig(hard_concrete=1e-3, l1=0.05, top_k=40, max_delta=0.5)
IDS = torch.tensor([[2, 5, 9, 11, 3, 8], [4, 4, 7, 21, 30, 6]])


def strip(rows):
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.parametrize("adapter", BASELINES)
def test_only_the_adapter_moves_and_it_starts_at_the_base_model(tmp_path, adapter):
    rows = []
    base = tiny_model(tmp_path / "model")(IDS).logits
    trainer = build_trainer(tmp_path, adapter, on_phase=rows.append, phases=2)
    assert torch.equal(trainer.model(IDS).logits, base), "untouched it is the base model to the bit"
    moving = {name: p.numel() for name, p in trainer.trainable() if not is_value_parameter(name)}
    assert sum(moving.values()) == COUNTS[adapter]
    assert all(MOVES.get(adapter, "activation_vector_v") in name for name in moving)
    assert all(p.dtype == torch.float32 for _, p in trainer.trainable())
    before = {name: tensor.detach().clone() for name, tensor in all_tensors(trainer)}
    hashes = frozen_hashes(trainer)
    trainer.train()
    changed = {name for name, tensor in all_tensors(trainer) if not torch.equal(tensor, before[name])}
    assert hashes == frozen_hashes(trainer)
    assert changed <= {name for name, _ in trainer.trainable()} and changed & moving.keys()
    assert rows[0]["kl"] == 0 == rows[0]["kl_k3"] and rows[-1]["kl_k3"] > 0
    with trainer.model.disable_adapter():
        assert torch.equal(trainer.model(IDS).logits, base), "switched off it is the base model to the bit"
    assert not torch.equal(trainer.model(IDS).logits, base)


@pytest.mark.parametrize("adapter", [*BASELINES, "gated"])
def test_resume_is_exact(tmp_path, adapter):
    given = {"sparsity": GATED} if adapter == "gated" else {}
    kind = "sparse_coeffs" if adapter == "gated" else adapter
    saving = {"save_strategy": "steps", "save_steps": 8, "phases": 3, **given}
    rows, tail = [], []
    whole = build_trainer(tmp_path, kind, on_phase=rows.append, **saving)
    whole.train()
    again = build_trainer(tmp_path, kind, on_phase=tail.append, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    want, got = trained(whole), trained(again)
    assert want.keys() == got.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert strip(tail) == strip(rows[1:])


@pytest.mark.parametrize("adapter", [*BASELINES, "gated"])
def test_a_saved_policy_loads_as_the_same_policy(tmp_path, adapter):
    given = {"sparsity": GATED} if adapter == "gated" else {}
    trainer = build_trainer(tmp_path, "sparse_coeffs" if adapter == "gated" else adapter, phases=1, **given)
    trainer.train()
    policy = trainer.model.eval()
    folder = save_adapter(policy, tmp_path / "adapter")
    before = {name: p.detach().clone() for name, p in trainer.trainable()}
    save_adapter(policy, tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in trainer.trainable()), "saving changes nothing"
    loaded = load_adapter(tiny_model(tmp_path / "model"), folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, policy(IDS).logits)
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and not config.get("gates")


# --- how the baselines are cut ---------------------------------------------------------------------------------------


def choose(tmp_path, model=None, **given):
    model = model or tiny_model(tmp_path / "model")
    loaded = Loaded(model, word_tokenizer(), "tiny", None, None, 32, tmp_path)  # pyright: ignore[reportArgumentType]
    return peft_config(AdapterConfig(**given), loaded)


def test_full_needs_no_peft(tmp_path):
    model = tiny_model(tmp_path / "model")
    assert peft_config(*adapter_settings(tmp_path, model, "full", "error_preserving")) is None


@pytest.mark.parametrize(
    ("match", "parameters"),
    [  # one rank is 768 of everything, 256 of query_key_value, 128 of dense, 192 of the others
        (64, 128),  # the least there is
        (129, 128),
        (2000, 8 * 256),  # nearer than 3 * 768 and 10 * 192, and before 16 * 128
        (7680, 10 * 768),  # before 30 * 256, as near
    ],
)
def test_lora_matches_a_number_of_parameters(tmp_path, match, parameters):
    from peft import get_peft_model

    config = choose(tmp_path, kind="lora", match=match)
    policy = get_peft_model(tiny_model(tmp_path / "model"), config)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == parameters
    assert len(config.target_modules) == (4 if match == 7680 else 1)


def test_lora_targets_and_rank(tmp_path):
    config = choose(tmp_path, kind="lora", rank=3, alpha=6.0, targets=["dense"])
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6.0, {"dense"})
    with pytest.raises(ValueError, match="no linear layer of this model is called q_proj; there are query_key_value"):
        choose(tmp_path, kind="lora", targets=["q_proj"])
    with pytest.raises(ValueError, match="no linear layer of this model is called lm_head"):
        choose(tmp_path, kind="lora", targets=["lm_head"])


def test_ia3_on_chosen_layers(tmp_path):
    config = choose(tmp_path, kind="ia3", targets=["dense", "dense_4h_to_h"])
    assert config.target_modules == {"dense", "dense_4h_to_h"} and config.feedforward_modules == {"dense_4h_to_h"}


def test_a_model_without_biases_has_none_to_train(tmp_path):
    from adapter_fixtures import tiny_llama

    with pytest.raises(ValueError, match="has no biases, so adapter=bias_only has nothing to train"):
        choose(tmp_path, tiny_llama(), kind="bias_only")


def test_vectors_on_a_llama_and_at_chosen_sites(tmp_path):
    from adapter_fixtures import tiny_llama

    config = choose(tmp_path, tiny_llama(), kind="steering_vector")
    assert config.widths == {f"model.layers.{i}": 16 for i in range(3)}
    config = choose(tmp_path, kind="steering_vector", sites=["mlp_out.1", "resid_post.0"])
    assert config.widths == {"gpt_neox.layers.1.mlp": 32, "gpt_neox.layers.0": 32}
    with pytest.raises(ValueError, match="no site matches 'mlp_hidden"):
        choose(tmp_path, tiny_llama(), kind="neuron_basis")


def test_a_shift_at_a_bias_is_that_bias_and_a_scale_is_a_column(tmp_path):
    from peft import get_peft_model

    base, ids = tiny_model(tmp_path / "model"), IDS
    policy = get_peft_model(tiny_model(tmp_path / "model"), choose(tmp_path, kind="bias_only"))
    name, vector = "gpt_neox.layers.0.attention.query_key_value", torch.linspace(-1, 1, 96)
    policy.base_model.model.get_submodule(name).activation_vector_v["default"].weight.data.copy_(vector)
    base.get_submodule(name).bias.data.add_(vector)
    torch.testing.assert_close(policy(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)

    base = tiny_model(tmp_path / "model")
    policy = get_peft_model(tiny_model(tmp_path / "model"), choose(tmp_path, kind="neuron_basis"))
    vector = torch.linspace(-1, 1, 64)
    policy.base_model.model.gpt_neox.layers[1].mlp.act.activation_vector_v["default"].weight.data.copy_(vector)
    base.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data.mul_(1 + vector)
    torch.testing.assert_close(policy(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_sites_inside_sites_take_vectors_too(tmp_path):
    from peft import get_peft_model

    config = choose(tmp_path, kind="steering_vector", sites=["mlp_out.1", "resid_post.1"])
    policy = get_peft_model(tiny_model(tmp_path / "model"), config)
    base = tiny_model(tmp_path / "model")(IDS).logits
    assert torch.equal(policy(IDS).logits, base)
    for name, p in policy.named_parameters():
        if p.requires_grad:
            p.data.fill_(0.5)
            assert not torch.equal(policy(IDS).logits, base), name
            p.data.zero_()
    assert torch.equal(policy.unload()(IDS).logits, base)
