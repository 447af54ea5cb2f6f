"""The SAELens folder: round trips, refusals, and what is found where."""

import json
import os
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import (
    check_sae,
    find_saes,
    is_transcoder,
    load_sae,
    read_sae_config,
    sae_sha256,
    save_sae,
)


def make(architecture="topk", k=3, site="mlp_out.1", d_in=6, d_sae=16, d_out=None) -> SAE:
    g = torch.Generator().manual_seed(0)
    sae = SAE(d_in, d_sae, architecture, k if architecture == "topk" else None, d_out)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g))
    if sae.threshold is not None:
        sae.threshold.copy_(torch.linspace(-0.2, 1.5, d_sae))
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    sae.site = site
    hook = {"hook_name": "blocks.1.hook_mlp_out", "hf_hook_name": "gpt_neox.layers.1.mlp", "prepend_bos": True}
    provenance = {"site": site, "module": "gpt_neox.layers.1.mlp", "model_sha256": "a" * 64, "model_name": "tiny"}
    sae.metadata = {"model_name": "tiny", "context_size": 64, **hook, "saerl": provenance}
    return sae


@pytest.fixture(params=["topk", "standard", "jumprelu"])
def folder(request, tmp_path):
    return save_sae(make(request.param), tmp_path / "mlp_out.1", torch.rand(16))


def test_what_is_saved_is_loaded(folder):
    architecture = read_sae_config(folder)["architecture"]
    loaded, original, x = load_sae(folder), make(architecture), torch.randn(20, 6)
    assert loaded.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(loaded(x), original(x))
    assert (loaded.site, loaded.k, loaded.metadata["saerl"]) == ("mlp_out.1", original.k, original.metadata["saerl"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    check_sae(folder, model_sha256="a" * 64, width=6)


NAMES = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder", "topk": "topk_transcoder"}


@pytest.mark.parametrize("architecture", NAMES)
def test_transcoders_keep_their_two_widths_and_sites(architecture, tmp_path):
    sae = make(architecture, d_out=4)
    sae.metadata["saerl"] |= {"site": "mlp_in.1"}
    sae.site, sae.target = "mlp_in.1", "mlp_out.1"
    folder = save_sae(sae, tmp_path / "x")
    config = check_sae(folder, width=6)
    assert config["architecture"] == NAMES[architecture]
    assert is_transcoder(config)
    assert (config["d_out"], config["apply_b_dec_to_input"]) == (4, False)
    assert config["metadata"]["saerl"]["target"] == "mlp_out.1"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    loaded, x = load_sae(folder), torch.randn(20, 6)
    assert (loaded.site, loaded.target, loaded.transcoder) == ("mlp_in.1", "mlp_out.1", True)
    assert torch.equal(loaded(x), sae(x))
    assert loaded(x).shape == (20, 4)
    assert find_saes(folder) == {"mlp_in.1": folder}


def test_a_site_is_enough_for_saelens_to_find_its_hooks(tmp_path):
    sae = make(d_out=6)
    sae.site, sae.target, sae.metadata = "mlp_in.3", "mlp_out.3", {"hook_name": "mine"}
    metadata = read_sae_config(save_sae(sae, tmp_path / "x"))["metadata"]
    assert metadata["hook_name"] == "mine"  # what is given is not overwritten
    assert metadata["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert metadata["saerl"] == {"site": "mlp_in.3", "target": "mlp_out.3"}


class Choice(Enum):
    one = "first"


def test_training_settings_are_kept_whatever_they_are(tmp_path):
    sae = make()
    settings = {"architecture": Choice.one, 3: (1, 2), "k": None, "path": Path("a"), "deep": {Choice.one: [True, 0.5]}}
    sae.metadata["saerl"] |= {"training": settings}
    kept = load_sae(save_sae(sae, tmp_path / "x")).metadata["saerl"]["training"]
    plain = {"architecture": "first", "3": [1, 2], "k": None, "path": "a", "deep": {"first": [True, 0.5]}}
    assert kept == plain
    assert sae.metadata["saerl"]["training"] is settings


def test_activations_by_hand():
    sae = SAE(2, 3, "topk", 1)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 0.5, -9.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    x = torch.tensor([[2.0, 4.0]])  # centred (1, 3): pre (1, 3.5, -7)
    assert sae.pre_activations(x).tolist() == [[1.0, 3.5, -7.0]]
    assert sae.encode(x).tolist() == [[0.0, 3.5, 0.0]]
    assert sae(x).tolist() == [[1.0, 4.5]]
    values, indices = sae.encode_sparse(x)
    assert (values.tolist(), indices.tolist()) == ([[3.5]], [[1]])
    assert SAE(2, 3).activate(torch.tensor([-1.0, 2.0, 0.0])).tolist() == [0.0, 2.0, 0.0]


def test_topk_never_keeps_a_negative_value():
    sae = make(k=16)
    f = sae.encode(torch.randn(50, 6))
    assert (f >= 0).all() and ((f > 0).sum(-1) < 16).any()


def test_saelens_options_are_folded_in(tmp_path):
    """Features without b_dec subtraction, and TopK selection on activations times decoder norm."""
    sae = make("topk")
    folder = save_sae(sae, tmp_path / "x")
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"] = tensors["W_dec"] * torch.linspace(0.2, 3, 16)[:, None]
    save_file(tensors, path)
    config = json.loads((folder / "cfg.json").read_text())
    config |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    x = torch.randn(30, 6)
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    norm = tensors["W_dec"].norm(dim=-1)
    values, indices = (pre * norm).topk(3)
    f = torch.zeros_like(pre).scatter(1, indices, values.relu())
    expected = (f / norm) @ tensors["W_dec"] + tensors["b_dec"]
    loaded = load_sae(folder)
    assert torch.allclose(loaded.encode(x), f, atol=1e-5)
    assert torch.allclose(loaded(x), expected, atol=1e-5)


def test_the_hash_is_that_of_the_weights(folder):
    before = sae_sha256(folder)
    (folder / "cfg.json").write_text((folder / "cfg.json").read_text() + "\n")
    assert sae_sha256(folder) == before
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"][0] += 1e-6
    save_file(tensors, folder / "sae_weights.safetensors")
    assert sae_sha256(folder) != before


def spoil(name, value):
    def damage(folder):
        path = folder / "sae_weights.safetensors"
        tensors = load_file(path)
        tensors[name] = value(tensors[name])
        save_file(tensors, path)

    return damage


def add(name):
    def damage(folder):
        path = folder / "sae_weights.safetensors"
        save_file(load_file(path) | {name: torch.zeros(6, 6)}, path)

    return damage


def drop(name):
    def damage(folder):
        path = folder / "sae_weights.safetensors"
        save_file({key: value for key, value in load_file(path).items() if key != name}, path)

    return damage


def edit(**keys):
    def damage(folder):
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return damage


def nan(tensor):
    tensor[0] = float("nan")
    return tensor


REFUSALS = {
    "truncated": (lambda f: os.truncate(f / "sae_weights.safetensors", 40), {}, "corrupted"),
    "no weights": (lambda f: (f / "sae_weights.safetensors").unlink(), {}, "has no sae_weights.safetensors"),
    "no config": (lambda f: (f / "cfg.json").unlink(), {}, "is not an SAE folder"),
    "bad config": (lambda f: (f / "cfg.json").write_text("{"), {}, "malformed"),
    "no sizes": (lambda f: (f / "cfg.json").write_text('{"architecture": "topk"}'), {}, "malformed"),
    "nan": (spoil("W_dec", nan), {}, "W_dec contains NaN or infinite"),
    "shape": (spoil("b_enc", lambda t: t[:-1].clone()), {}, r"b_enc has shape \[15\]"),
    "unknown kind": (edit(architecture="temporal"), {}, "'temporal' is not supported"),
    "not an object": (lambda f: (f / "cfg.json").write_text("[1]"), {}, "malformed"),
    "no threshold": (edit(architecture="jumprelu"), {}, "lacks threshold"),
    "no k": (edit(architecture="topk", k=None), {}, "needs an integer k"),
    "large k": (edit(architecture="topk", k=17), {}, "k must be between 1 and d_sae=16, got 17"),
    "no d_out": (edit(architecture="transcoder"), {}, "malformed: KeyError"),
    "metadata": (edit(metadata=[1]), {}, "malformed"),
    "provenance": (edit(metadata={"saerl": 3}), {}, "malformed"),
    "site": (edit(metadata={"saerl": {"site": 3}}), {}, "malformed: ValueError.*3 is no site"),
    "site elsewhere": (edit(metadata={"saerl": {"site": "../x"}}), {}, "'../x' is no site"),
    "size of nothing": (edit(d_sae=0), {}, "d_sae and d_out are numbers >= 1"),
    "skip connection": (add("W_skip"), {}, "holds W_skip"),
    "lacking": (drop("b_dec"), {}, "lacks b_dec"),
    "unfolded": (edit(normalize_activations="layer_norm"), {}, "normalize_activations='layer_norm' is not supported"),
    "other width": (lambda f: None, {"width": 512}, "d_in=6, but the site has width 512"),
    "other model": (lambda f: None, {"model_sha256": "b" * 64}, "was trained on other weights"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unusable_saes_are_refused_in_one_line(tmp_path, name):
    folder = save_sae(make("standard"), tmp_path / "mlp_out.1")
    damage, arguments, message = REFUSALS[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        check_sae(folder, **arguments)
    assert "\n" not in str(error.value)
    if not arguments:
        with pytest.raises(ValueError, match=message):
            load_sae(folder)


def test_nan_weights_are_not_saved(tmp_path):
    sae = make()
    sae.b_dec[0] = float("nan")
    with pytest.raises(ValueError, match="b_dec of the SAE at mlp_out.1 is NaN"):
        save_sae(sae, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_point_of_a_sweep_is_named_behind_its_run(tmp_path):
    run, names = (
        tmp_path / "run",
        [f"mlp_out.{site}-{point}" for site in (1, 2) for point in ("l1_2", "k_8-l1_2", "k_8")],
    )
    folders = {name: save_sae(make(site=name.partition("-")[0]), run / "sae" / name) for name in names}
    assert find_saes(run / "k_8") == {f"mlp_out.{site}": folders[f"mlp_out.{site}-k_8"] for site in (1, 2)}
    assert find_saes(run / "k_8-l1_2") == {f"mlp_out.{site}": folders[f"mlp_out.{site}-k_8-l1_2"] for site in (1, 2)}
    assert find_saes(run / "l1_2") == {f"mlp_out.{site}": folders[f"mlp_out.{site}-l1_2"] for site in (1, 2)}
    with pytest.raises(ValueError, match=r"no such folder, as .*run/POINT: k_8, k_8-l1_2, l1_2$"):
        find_saes(run / "l1_3")
    with pytest.raises(ValueError, match=r"both SAEs of mlp_out\.1; name one of them, as .*run/POINT: k_8, "):
        find_saes(run)


def test_saes_are_found_at_every_level(tmp_path):
    folders = {site: save_sae(make(site=site), tmp_path / "run" / "sae" / site) for site in ("mlp_out.1", "mlp_out.2")}
    assert find_saes(tmp_path / "run") == find_saes(tmp_path / "run" / "sae") == folders
    assert find_saes(folders["mlp_out.2"]) == {"mlp_out.2": folders["mlp_out.2"]}
    save_sae(make(site="mlp_out.1"), tmp_path / "run" / "sae" / "again")
    with pytest.raises(ValueError, match="both SAEs of mlp_out.1"):
        find_saes(tmp_path / "run")
    with pytest.raises(ValueError, match="no such folder"):
        find_saes(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a run directory"):
        find_saes(tmp_path / "empty")
