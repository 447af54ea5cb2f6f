"""Tiny models and SAEs with random weights, for the tests of the adapter."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saerl_cli.adapter import sparse_coeffs
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import save_sae

VOCABULARY, WIDTH, HIDDEN, LAYERS, FEATURES = 61, 16, 24, 3, 40


def tiny_neox(dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=HIDDEN,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return GPTNeoXForCausalLM(config).to(dtype).eval()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=HIDDEN,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def random_sae(d_in: int = WIDTH, d_sae: int = FEATURES, k: int | None = None, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, "topk" if k else "standard", k)
    for parameter in sae.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return sae


def sae_folder(folder: Path, site: str, k: int | None = None, seed: int = 0, model_sha256: str | None = None) -> Path:
    """A saved random SAE of a site, in a folder named after it."""
    sae = random_sae(HIDDEN if site.startswith("mlp_hidden") else WIDTH, k=k, seed=seed)
    provenance = {"site": site} | ({"model_sha256": model_sha256} if model_sha256 else {})
    sae.site, sae.metadata = site, {"saerl": provenance}
    return save_sae(sae, folder / site)


def tokens() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


def randomise(model: torch.nn.Module, seed: int = 3, adapter: str = "default") -> None:
    """Random coefficients; a third of them stay untouched."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "sparse_coeffs_" in name and f".{adapter}." in name:
            values = torch.randn(parameter.shape, generator=generator)
            values[::3] = 0
            parameter.data.copy_(values)


def coefficients_on(model, folder: Path, sites=("mlp_out.1",), splice="error_preserving", k=None, seed=None, **fields):
    """The model with coefficients on freshly made SAEs; random ones when a seed is given."""
    saes = {site: sae_folder(folder, site, k) for site in sites}
    policy = get_peft_model(model, sparse_coeffs(model, saes, splice, **fields)).eval()
    if seed is not None:
        randomise(policy, seed)
    return policy
