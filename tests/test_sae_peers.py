"""SAELens, dictionary_learning and sparsify themselves: each reads what we write, and we read what each writes.

They are no dependency and live in a Python of their own, which SAERL_PEERS_PYTHON names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.export import export_saes
from saerl_cli.sae.files import FORMATS, open_sae, save_sae

D, M, K, N = 24, 96, 7, 200


@pytest.fixture(scope="module")
def peers():
    """Runs `sae_peers.py` in the other Python."""
    python = os.environ.get("SAERL_PEERS_PYTHON") or os.environ.get("SAERL_SAELENS_PYTHON")
    if not python or not Path(python).is_file():
        pytest.skip("needs the other libraries in a Python of their own: SAERL_PEERS_PYTHON=/path/to/python")

    def run(mode: str, folder: Path) -> None:
        save_file({"x": rows()}, folder / "x.safetensors")
        words = [python, str(Path(__file__).with_name("sae_peers.py")), mode, str(folder)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"WANDB_MODE": "disabled"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def rows() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(5))


def make(architecture: str, d_out: int | None = None, norms: bool = False) -> SAE:
    g = torch.Generator().manual_seed(4)
    sae = SAE(D, M, architecture, K if architecture == "topk" else None, d_out)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.4)
    if sae.threshold is not None:
        sae.threshold.copy_(torch.rand(M, generator=g))
    if not norms:
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    sae.site, sae.target = ("mlp_in.1", "mlp_out.1") if d_out else ("mlp_out.1", None)
    module = "gpt_neox.layers.1.post_attention_layernorm" if d_out else "gpt_neox.layers.1.mlp"
    sae.metadata = {"model_name": "tiny", "hf_hook_name": module, "saerl": {"module": module, "training": {"k": [1]}}}
    return sae


OURS = {
    "saelens": [("standard", None), ("topk", None), ("jumprelu", None), ("standard", 5), ("jumprelu", 5)],
    "dictionary_learning": [("standard", None), ("topk", None), ("jumprelu", None)],
    "sparsify": [("topk", None), ("topk", D)],
}
KINDS = {
    "saelens": ["StandardSAE", "TopKSAE", "JumpReLUSAE", "Transcoder", "JumpReLUTranscoder"],
    "dictionary_learning": ["AutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder"],
    "sparsify": ["SparseCoder", "SparseCoder"],
}


def test_they_compute_what_we_compute_from_what_we_write(peers, tmp_path):
    index, saes, kinds = {}, {}, {}
    for kind, forms in OURS.items():
        for number, (architecture, d_out) in enumerate(forms):
            for norms in (False, True):  # decoder rows of norm 1, and of any
                name = f"{kind}-{number}-{norms}"
                saes[name], kinds[name] = make(architecture, d_out, norms), KINDS[kind][number]
                FORMATS[kind].save_sae(saes[name], tmp_path / name)
                index[name] = [kind, name]
    save_sae(make("topk", 5), tmp_path / "topk_transcoder")
    index["topk_transcoder"] = ["saelens", "topk_transcoder"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    peers("read", tmp_path)
    known, x = json.loads((tmp_path / "known.json").read_text()), rows()
    assert known.pop("topk_transcoder") == ["KeyError"]  # when SAELens gains one, what we write can take its form
    for name, sae in saes.items():
        theirs, f = load_file(tmp_path / f"{name}.out"), sae.encode(x)
        assert known[name][0] == kinds[name]
        if name.startswith("saelens"):
            hooks = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
            hooks = hooks if sae.transcoder else [hooks[1], None]
            assert known[name][1:] == [*hooks, sae.metadata["hf_hook_name"], sae.site]
        assert torch.equal(theirs["f"] > 0, f > 0), name  # L0, token by token
        # its loader would bring these rows to norm 1, so we do
        scaled = name.startswith("dictionary_learning") and sae.architecture == "standard"
        norm = sae.W_dec.norm(dim=-1) if scaled else torch.ones(())
        assert torch.allclose(theirs["f"], f * norm, atol=1e-5, rtol=1e-5), name
        assert torch.allclose(theirs["out"], sae(x), atol=1e-5, rtol=1e-5), name


def test_we_compute_what_they_compute_from_what_they_write(peers, tmp_path):
    peers("write", tmp_path)
    index, x = json.loads((tmp_path / "index.json").read_text()), rows()
    assert len(index) == 18
    for name, (kind, folder) in index.items():
        sae, theirs = open_sae(tmp_path / folder), load_file(tmp_path / f"{name}.out")
        f = sae.encode(x)
        assert 0 < f.count_nonzero() < f.numel()
        assert torch.equal(f > 0, theirs["f"] > 0), name
        norm = theirs["norm"] if sae.architecture != "topk" else torch.ones(())
        assert torch.allclose(f, theirs["f"] * norm, atol=1e-5, rtol=1e-5), name
        assert torch.allclose(sae(x), theirs["out"], atol=1e-5, rtol=1e-5), name
        if kind == "saelens":
            assert (sae.site, sae.metadata["model_name"]) == ("attn_out.2", "some")


def test_what_the_command_exports_is_loaded_where_it_says(peers, tmp_path):
    for site in ("mlp_out.1", "resid_post.0"):
        sae = make("topk")
        sae.site, sae.metadata["saerl"]["module"] = (
            site,
            "gpt_neox.layers.1.mlp" if site[0] == "m" else "gpt_neox.layers.0",
        )
        save_sae(sae, tmp_path / "run" / "sae" / site)
    index = {}
    for kind in FORMATS:
        lines = export_saes(str(tmp_path / "run"), kind, tmp_path / kind)
        for number in (0, 1):
            index[f"{kind}-{number}"] = [kind, lines[number].split(" -> ")[-1]]
        assert f'("{index[f"{kind}-0"][1]}"' in lines[-1]
    (tmp_path / "index.json").write_text(json.dumps(index))
    peers("read", tmp_path)
    for name in index:
        theirs = load_file(tmp_path / f"{name}.out")
        assert torch.allclose(theirs["out"], make("topk")(rows()), atol=1e-5)
