"""Run by a Python that has sae-lens, dictionary-learning and eai-sparsify: they read SAEs of ours, and write their own.

    python sae_peers.py read FOLDER      loads the SAEs that FOLDER/index.json names, {name: [format, folder]}
    python sae_peers.py write FOLDER     writes one of each of its classes below FOLDER, and that index.json

`FOLDER/x.safetensors` holds activations x [n, d_in]; for every SAE, `FOLDER/name.out` gets what it makes of them.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402
from sae_lens import SAE  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sparsify import SparseCoder  # noqa: E402
from sparsify.config import SparseCoderConfig  # noqa: E402

FEATURES, K = 96, 7


def result(kind: str, sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features [n, d_sae], dense, and reconstruction [n, d_out]."""
    if kind == "sparsify":
        values, indices, _ = sae.encode(x)
        return {"f": torch.zeros(len(x), sae.num_latents).scatter_(1, indices, values), "out": sae(x, x).sae_out}
    f = sae.encode(x)
    return {"f": f, "out": sae.decode(f)}


def known(kind: str, sae: Any) -> list[Any]:
    """What the library took from the metadata."""
    if kind != "saelens":
        return [type(sae).__name__]
    meta = sae.cfg.metadata
    return [type(sae).__name__, meta.hook_name, meta.hook_name_out, meta.hf_hook_name, meta.saerl["site"]]


def load(kind: str, folder: Path) -> Any:
    """An SAE of ours, by the library's own loader."""
    if kind == "saelens":
        return SAE.load_from_disk(folder)
    if kind == "sparsify":
        return SparseCoder.load_from_disk(folder)
    return load_dictionary(str(folder), "cpu")[0]


def read(root: Path, x: torch.Tensor) -> None:
    """Load the SAEs of an index."""
    said = {}
    for name, (kind, folder) in json.loads((root / "index.json").read_text()).items():
        try:
            sae = load(kind, root / folder)
        except Exception as error:
            said[name] = [type(error).__name__]
            continue
        tensors = {key: value.detach().contiguous() for key, value in result(kind, sae, x).items()}
        save_file(tensors, root / f"{name}.out")
        said[name] = known(kind, sae)
    (root / "known.json").write_text(json.dumps(said))


def randomised(sae: Any, seed: int) -> Any:
    """Weights, biases and thresholds that no training start has; decoder rows of many lengths."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*sae.named_parameters(), *sae.named_buffers()]:
            if name in ("k", "group_sizes"):
                continue
            if name == "threshold":
                value.copy_(0.2 + 0.6 * torch.rand(value.shape, generator=g))
            else:
                value.copy_(torch.randn(value.shape, generator=g) * (0.4 if value.ndim == 2 else 0.3))
    return sae


def lens(d: int, architecture: str, **more: Any) -> Any:
    """One of SAELens's classes."""
    shared = {"d_in": d, "d_sae": FEATURES, "dtype": "float32", "device": "cpu", "architecture": architecture}
    shared |= {"metadata": {"hook_name": "blocks.2.hook_attn_out", "model_name": "some"}}
    return SAE.from_dict(shared | more)


def own(d: int) -> dict[str, tuple[str, Any]]:
    """Every class that saerl should read."""
    coder = {"num_latents": FEATURES, "k": K}
    return {
        "lens_standard": ("saelens", lens(d, "standard")),
        "lens_uncentred": ("saelens", lens(d, "standard", apply_b_dec_to_input=False)),
        "lens_topk": ("saelens", lens(d, "topk", k=K)),
        "lens_topk_rescaled": ("saelens", lens(d, "topk", k=K, rescale_acts_by_decoder_norm=True)),
        "lens_jumprelu": ("saelens", lens(d, "jumprelu")),
        "lens_gated": ("saelens", lens(d, "gated")),
        "lens_gated_uncentred": ("saelens", lens(d, "gated", apply_b_dec_to_input=False)),
        "lens_transcoder": ("saelens", lens(d, "transcoder", d_out=5, apply_b_dec_to_input=False)),
        "lens_jumprelu_transcoder": ("saelens", lens(d, "jumprelu_transcoder", d_out=5, apply_b_dec_to_input=False)),
        "dl_AutoEncoder": ("dictionary_learning", AutoEncoder(d, FEATURES)),
        "dl_AutoEncoderNew": ("dictionary_learning", AutoEncoderNew(d, FEATURES)),
        "dl_AutoEncoderTopK": ("dictionary_learning", AutoEncoderTopK(d, FEATURES, K)),
        "dl_BatchTopKSAE": ("dictionary_learning", BatchTopKSAE(d, FEATURES, K)),
        "dl_MatryoshkaBatchTopKSAE": ("dictionary_learning", MatryoshkaBatchTopKSAE(d, FEATURES, K, [32, 64])),
        "dl_JumpReluAutoEncoder": ("dictionary_learning", JumpReluAutoEncoder(d, FEATURES)),
        "dl_GatedAutoEncoder": ("dictionary_learning", GatedAutoEncoder(d, FEATURES)),
        "layers.2.attention": ("sparsify", SparseCoder(d, SparseCoderConfig(**coder))),
        "layers.2.mlp": ("sparsify", SparseCoder(d, SparseCoderConfig(transcode=True, **coder))),
    }


def write(root: Path, x: torch.Tensor) -> None:
    """Save one SAE of every class by the library's own means."""
    index = {}
    for seed, (name, (kind, sae)) in enumerate(own(x.shape[1]).items()):
        sae, folder = randomised(sae, seed), root / name
        index[name] = [kind, name]
        if kind == "saelens":
            sae.save_model(folder)
        elif kind == "sparsify":
            sae.save_to_disk(folder)
        else:
            folder.mkdir()
            torch.save(sae.state_dict(), folder / "ae.pt")
            trainer = {"dict_class": type(sae).__name__, "activation_dim": x.shape[1], "dict_size": FEATURES, "k": K}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        tensors = result(kind, sae, x)
        row = sae.decoder.weight.T if hasattr(sae, "decoder") else sae.W_dec
        if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
            row = torch.nn.functional.normalize(row, dim=-1)  # its features are in units of x already
        tensors["norm"] = row.norm(dim=-1)
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, root / f"{name}.out")
    (root / "index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.manual_seed(0)
    {"read": read, "write": write}[sys.argv[1]](folder, load_file(folder / "x.safetensors")["x"])
