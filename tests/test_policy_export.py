"""`saerl export` of policies: the same logits and the same text in every form, and folders that load elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_fixtures import coefficients_on, randomise, sae_folder, tiny_llama, tiny_neox, tokens
from conftest import ROOT
from peft import PeftModel, get_peft_model
from rl_fixtures import adapter_settings, tiny_model, word_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from saerl_cli.adapter import deltas, load_adapter, save_adapter, sparse_coeffs
from saerl_cli.cli import app
from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.models import Loaded
from saerl_cli.rl.adapters import peft_config
from saerl_cli.rl.export import export_policy

IDS = torch.tensor([[2, 5, 9, 11, 3, 8], [4, 4, 7, 21, 30, 6]])
PLAIN = ["lora", "ia3", "steering_vector", "bias_only", "neuron_basis"]


def base_folder(folder: Path, model=None) -> Path:
    """A model on disk, which an adapter remembers as its base."""
    if model is None:
        tiny_model(folder / "model")
    else:
        model.save_pretrained(folder / "model")
        word_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def saved(folder: Path, kind: str, splice: str = "error_preserving", seed: int = 1) -> Path:
    """An adapter folder of random values on the tiny model."""
    model = tiny_model(base_folder(folder))
    policy = get_peft_model(model, peft_config(*adapter_settings(folder, model, kind, splice)))
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        if p.requires_grad:
            p.data.add_(
                0.3 * torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) < 0.4)
            )
    return save_adapter(policy, folder / "adapter")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def text(model) -> list[int]:
    return model.generate(IDS[:1], attention_mask=IDS[:1] * 0 + 1, max_new_tokens=8, do_sample=False)[0].tolist()


def policy_logits(folder: Path, adapter: Path):
    return logits(load_adapter(AutoModelForCausalLM.from_pretrained(folder / "model"), adapter))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PLAIN, "sparse_coeffs"])
def test_an_exported_model_is_the_policy(tmp_path, kind):
    adapter = saved(tmp_path, kind)
    want = load_adapter(tiny_model(tmp_path / "model"), adapter)
    lines = export_policy(adapter, "model", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(want) - logits(tiny_model(tmp_path / "model"))).abs().max() > 0.01
    # merged weights add and multiply in another order; a splice does the same
    tolerance = 1e-6 if kind == "sparse_coeffs" else 2e-5
    torch.testing.assert_close(logits(model), logits(want), atol=tolerance, rtol=tolerance)
    assert text(model) == text(want)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ours = kind == "sparse_coeffs"
    assert config["model_type"] == ("saerl_spliced" if ours else "gpt_neox")
    assert ("import saerl_cli.adapter" in lines) == ours
    assert not list((tmp_path / "out").glob("*.py")) and "auto_map" not in config


LOAD = """\
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def save_logits(folder, ids, file):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    with torch.no_grad():
        torch.save(model(torch.tensor(eval(ids))).logits, file)

save_logits(*sys.argv[1:4])
assert not {"peft", "saerl_cli"} & sys.modules.keys()
import saerl_cli.adapter
save_logits(*sys.argv[4:7])
"""


def test_exported_models_load_in_a_process_of_their_own(tmp_path):
    """Merged weights without this package, spliced ones with it, far from the files that they were made of."""
    wanted, words = [], []
    for kind in ("lora", "sparse_coeffs"):
        adapter = saved(tmp_path / kind, kind)
        wanted.append(policy_logits(tmp_path / kind, adapter))
        export_policy(adapter, "model", tmp_path / kind / "out")
        (tmp_path / kind / "out").rename(tmp_path / f"{kind}-elsewhere")
        shutil.rmtree(tmp_path / kind)
        words += [str(tmp_path / f"{kind}-elsewhere"), str(IDS.tolist()), str(tmp_path / f"{kind}.pt")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LOAD, *words], check=True, env=env, cwd=tmp_path, timeout=240)
    for file, want in zip(words[2::3], wanted, strict=True):
        torch.testing.assert_close(torch.load(file, weights_only=True), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("splice", ["error_preserving", "reconstruct", "pre_activation"])
@pytest.mark.parametrize("k", [None, 5])
def test_every_splice_and_nested_sites_survive(tmp_path, splice, k):
    base_folder(tmp_path, tiny_neox())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    sites = ("mlp_out.1", "resid_post.1", "mlp_hidden.2")
    policy = coefficients_on(model, tmp_path / "saes", sites, splice, k, seed=3)
    adapter = save_adapter(policy, tmp_path / "adapter")
    want = logits(policy, tokens())
    export_policy(adapter, "model", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported, tokens()), want, atol=2e-5, rtol=2e-5)
    exported.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens()), logits(exported, tokens())), "what was loaded saves and loads"


def test_a_half_precision_base_keeps_its_coefficients_in_full(tmp_path):
    base_folder(tmp_path, tiny_neox(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    policy = coefficients_on(model, tmp_path / "saes", ("mlp_out.1",), seed=3)
    adapter = save_adapter(policy, tmp_path / "adapter")
    from saerl_cli.adapter.spliced import save_spliced

    merged = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16), adapter)
    want = logits(merged, tokens())
    (tmp_path / "out").mkdir()
    assert save_spliced(merged.merge_and_unload(), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    assert exported.gpt_neox.layers[1].mlp.delta.dtype == torch.float32
    assert exported.gpt_neox.layers[1].mlp.sae.W_dec.dtype == torch.float32
    torch.testing.assert_close(logits(exported, tokens()), want)


def test_a_vector_without_a_bias_to_go_into_stays_a_vector(tmp_path):
    base_folder(tmp_path, tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = Loaded(model, word_tokenizer(), "tiny", None, None, 32, tmp_path)  # pyright: ignore[reportArgumentType]
    policy = get_peft_model(model, peft_config(AdapterConfig(kind="steering_vector"), loaded))
    for p in policy.parameters():
        if p.requires_grad:
            p.data.copy_(torch.linspace(-1, 1, len(p)))
    want = logits(policy, tokens())
    lines = export_policy(save_adapter(policy, tmp_path / "adapter"), "model", tmp_path / "out")
    assert "needs saerl" in lines[0]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported, tokens()), want, atol=1e-6, rtol=1e-6)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splice", ["error_preserving", "pre_activation"])
def test_compact_keeps_only_what_changed(tmp_path, splice):
    adapter = saved(tmp_path, "sparse_coeffs", splice)
    want = policy_logits(tmp_path, adapter)
    lines = export_policy(adapter, "compact", tmp_path / "out")
    shutil.rmtree(tmp_path / "sae")
    (tmp_path / "out").rename(tmp_path / "moved")
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = sum(value != 0 for value in tensors.values()).bool()
    assert 0 < moved.sum() < 50
    assert lines[0].startswith(f"mlp_out.1: {int(moved.sum())} of 64 features")
    small = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert all(torch.equal(small[key], value[moved]) for key, value in tensors.items())
    policy = PeftModel.from_pretrained(tiny_model(tmp_path / "model"), tmp_path / "moved")
    torch.testing.assert_close(logits(policy), want, atol=1e-5, rtol=1e-5)  # sums over fewer features
    assert text(policy) == text(load_adapter(tiny_model(tmp_path / "model"), tmp_path / "moved"))


@pytest.mark.parametrize("to", ["compact", "peft"])
def test_the_first_features_of_an_audit_alone(tmp_path, to):
    adapter = saved(tmp_path, "sparse_coeffs")
    (tensor,) = load_file(adapter / "adapter_model.safetensors").values()
    first = tensor.nonzero().flatten()[[3, 1, 7]]
    attributions = torch.zeros(len(tensor)).scatter(0, first, torch.tensor([0.5, 0.3, 0.2]))
    with pytest.raises(ValueError, match="has no audit.json, .*: saerl audit policy="):
        export_policy(adapter, to, tmp_path / "out", first=2)
    (adapter / "audit.json").write_text(json.dumps({"attributions": {"mlp_out.1": attributions.tolist()}}))
    with pytest.raises(ValueError, match="a number from 1 to 64"):
        export_policy(adapter, to, tmp_path / "out", first=65)
    export_policy(adapter, to, tmp_path / "out", first=2)
    policy = PeftModel.from_pretrained(tiny_model(tmp_path / "model"), tmp_path / "out")
    (found,) = deltas(policy).values()
    assert sorted(found[found != 0].tolist()) == sorted(tensor[first[:2]].tolist())
    want = load_adapter(tiny_model(tmp_path / "model"), adapter)
    for p in want.parameters():
        if p.shape == tensor.shape and p.dtype == torch.float32 and torch.equal(p.data, tensor):
            p.data[[i for i in range(len(tensor)) if i not in first[:2].tolist()]] = 0.0
    torch.testing.assert_close(logits(policy), logits(want), atol=1e-5, rtol=1e-5)
    assert not list(adapter.parent.glob(".pruned-*"))


def test_compact_of_a_jumprelu_keeps_thresholds(tmp_path):
    from saerl_cli.sae.autoencoder import SAE
    from saerl_cli.sae.files import save_sae

    base_folder(tmp_path, tiny_neox())
    sae, generator = SAE(16, 40, "jumprelu"), torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    sae.threshold.abs_()
    sae.site = "mlp_out.1"
    save_sae(sae, tmp_path / "saes" / "mlp_out.1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    policy = get_peft_model(model, sparse_coeffs(model, tmp_path / "saes")).eval()
    randomise(policy)
    want = logits(policy, tokens())
    export_policy(save_adapter(policy, tmp_path / "adapter"), "compact", tmp_path / "out")
    small = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert len(deltas(small)["mlp_out.1"]) == 26
    torch.testing.assert_close(logits(small, tokens()), want, atol=1e-5, rtol=1e-5)


def test_compact_of_a_topk_says_that_it_keeps_the_encoder(tmp_path):
    base_folder(tmp_path, tiny_neox())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    policy = coefficients_on(model, tmp_path / "saes", ("mlp_out.1", "mlp_out.2"), k=5, seed=3)
    for name, p in policy.named_parameters():
        if "layers.2" in name and "sparse_coeffs_delta" in name:
            p.data.zero_()
    want = logits(policy, tokens())
    lines = export_policy(save_adapter(policy, tmp_path / "adapter"), "compact", tmp_path / "out")
    assert lines[0].startswith("mlp_out.1: 40 features, kept whole (topk needs all of them)")
    assert lines[1].startswith("mlp_out.2: no feature changed, left out")
    small = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    assert list(deltas(small)) == ["mlp_out.1"] and torch.equal(logits(small, tokens()), want)


@pytest.mark.parametrize("kind", ["sparse_coeffs", "lora", "steering_vector"])
def test_a_peft_folder_carries_all_it_needs(tmp_path, kind):
    adapter = saved(tmp_path, kind)
    want = policy_logits(tmp_path, adapter)
    export_policy(adapter, "peft", tmp_path / "out")
    shutil.rmtree(tmp_path / "sae", ignore_errors=True)
    shutil.rmtree(adapter)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(tmp_path / "model"), tmp_path / "moved")), want)
    export_policy(tmp_path / "moved", "peft", tmp_path / "once more")


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.output
    return result.stderr


def test_what_has_no_such_form_is_refused(tmp_path):
    adapter = saved(tmp_path, "lora")
    assert "has no coefficients of features; write --to peft or --to model" in refused(adapter, "--to", "compact")
    assert "is not a run directory" in refused(tmp_path, "--to", "model")
    assert "--site chooses SAEs" in refused(adapter, "--to", "peft", "--site", "mlp_out.1")
    assert "holds what is to be exported" in refused(adapter, "--to", "peft", "--out", adapter)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    assert "holds files that no export made (mine.txt)" in refused(adapter, "--to", "peft", "--out", tmp_path / "other")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    assert "names no folder of its base model (gone)" in refused(adapter, "--to", "model", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untouched_coefficients_leave_nothing_to_export(tmp_path):
    model = tiny_model(base_folder(tmp_path))
    sae_folder(tmp_path / "unused", "mlp_out.1")
    policy = get_peft_model(model, peft_config(*adapter_settings(tmp_path, model, "sparse_coeffs", "error_preserving")))
    adapter = save_adapter(policy, tmp_path / "adapter")
    assert "no coefficient in" in refused(adapter, "--to", "compact")


def test_the_command_says_how_to_load_what_it_wrote(tmp_path):
    adapter = saved(tmp_path, "sparse_coeffs")
    result = CliRunner().invoke(app, ["export", str(adapter), "--to", "compact"])
    assert result.exit_code == 0, result.output
    assert f'PeftModel.from_pretrained(base_model, "{tmp_path / "adapter-compact"}")' in result.stdout
