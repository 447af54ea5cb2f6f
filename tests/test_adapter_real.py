"""Coefficients in real models, loaded from folders by name."""

from pathlib import Path

import pytest
import torch
from adapter_fixtures import random_sae, randomise
from peft import get_peft_model

from saerl_cli.adapter import load_adapter, save_adapter, sparse_coeffs
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.models import Loaded, load_model, resolve_sites
from saerl_cli.sae.files import save_sae

pytestmark = pytest.mark.real_data

SITES = {
    "neox_stories_nano": ["mlp_out.1", "mlp_hidden.2", "attn_out.2", "resid_post.2"],
    "stories260k": ["mlp_out.1", "attn_out.2", "resid_post.2", "model.layers.3.mlp.down_proj"],
}


def loaded(folder: Path) -> Loaded:
    return load_model(ModelConfig(kind=ModelKind.local, path=str(folder)))


def saes_for(base: Loaded, sites: list[str], folder: Path, k: int | None, sha256: str | None = None) -> dict[str, Path]:
    folders = {}
    for site in resolve_sites(sites, base.model):
        sae = random_sae(site.width, 4 * site.width, k)
        sae.metadata = {"saerl": {"site": site.name, "model_sha256": sha256 or base.sha256}}
        folders[site.name] = save_sae(sae, folder / site.name)
    return folders


@pytest.mark.parametrize("k", [None, 8], ids=["standard", "topk"])
@pytest.mark.parametrize("name", SITES)
def test_a_real_model_with_coefficients_at_every_kind_of_site(shared_data, tmp_path, name, k):
    base = loaded(shared_data / name)
    ids = base.tokenizer("Once upon a time, there was a little girl", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = base.model(ids).logits
    policy = get_peft_model(base.model, sparse_coeffs(base, saes_for(base, SITES[name], tmp_path / "sae", k))).eval()
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, want)
    randomise(policy)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.1
    given = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    cached, plain = (policy.generate(**given, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    with torch.no_grad():
        changed = policy(ids).logits
    assert not torch.equal(changed, want)
    save_adapter(policy, tmp_path / "adapter")
    back = load_adapter(loaded(shared_data / name).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(back(ids).logits, changed)
        assert torch.allclose(back.merge_and_unload()(ids).logits, changed, rtol=1e-4, atol=1e-3)


def test_models_are_told_apart_by_their_weights(shared_data, tmp_path):
    nano, llama = (loaded(shared_data / name) for name in SITES)
    with pytest.raises(ValueError, match="was trained on other weights"):
        sparse_coeffs(nano, saes_for(nano, ["mlp_out.1"], tmp_path / "a", None, sha256=llama.sha256))
    policy = get_peft_model(nano.model, sparse_coeffs(nano, saes_for(nano, ["mlp_out.1"], tmp_path / "b", None)))
    save_adapter(policy, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the model has no module 'gpt_neox.layers.1.mlp'"):
        load_adapter(llama.model, tmp_path / "adapter")
