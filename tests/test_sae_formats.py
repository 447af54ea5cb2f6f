"""SAEs of SAELens, dictionary_learning and sparsify: read and written by the formulas that those document."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.export import export_saes
from saerl_cli.sae.files import FORMATS, check_sae, check_source, find_saes, load_sae, open_sae, save_sae
from saerl_cli.sae.files.weights import SaeInfo, unit_rows

D, M, K = 6, 42, 5
UNITS = ("standard", "jumprelu")


def make(architecture, d_out=None, site="mlp_out.1", d_in=D, d_sae=M, k=K, unit=True) -> SAE:
    """An SAE with random weights; without `unit`, decoder rows of many lengths."""
    g = torch.Generator().manual_seed(1)
    sae = SAE(d_in, d_sae, architecture, k if architecture == "topk" else None, d_out)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    if sae.threshold is not None:
        sae.threshold.copy_(torch.linspace(0, 1.5, d_sae))
    if unit:
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    sae.site, sae.target = site, None if d_out is None else site.replace("mlp_in", "mlp_out")
    sae.metadata = {"model_name": "tiny", "context_size": 64}
    if site == "mlp_out.1":
        sae.metadata["saerl"] = {"site": site, "module": "gpt_neox.layers.1.mlp"}
    return sae


def rows(n=300, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(2))


def topk(z, k=K):
    values, indices = z.relu().topk(k)
    return torch.zeros_like(z).scatter(1, indices, values)


def same(a, b, tolerance=1e-5):
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


# --- SAELens ---------------------------------------------------------------------------------------------------------


def saelens_folder(folder, tensors, **config):
    """A folder as SAELens writes it."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    shared = {"d_in": D, "d_sae": M, "dtype": "float32", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    metadata = {"metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.4.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(shared | metadata | config))
    return folder


def random_tensors(*extra, seed=3):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_dec": (D,), "b_enc": (M,)} | dict.fromkeys(extra, (M,))
    return {name: torch.randn(shape, generator=g) * 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("centred", [True, False])
def test_gated_is_the_jumprelu_that_it_equals(tmp_path, centred):
    t = random_tensors("b_gate", "b_mag", "r_mag")
    del t["b_enc"]
    loaded = load_sae(saelens_folder(tmp_path / "x", t, architecture="gated", apply_b_dec_to_input=centred))
    x = rows()
    u = (x - t["b_dec"] * centred) @ t["W_enc"]
    f = (u + t["b_gate"] > 0) * (u * t["r_mag"].exp() + t["b_mag"]).relu()
    assert ((f > 0) == (u + t["b_gate"] > 0)).float().mean() < 0.99  # both conditions take part
    assert loaded.architecture == "jumprelu"
    assert (loaded.threshold >= 0).all()
    assert torch.equal(loaded.encode(x) > 0, f > 0)
    assert same(loaded.encode(x), f * t["W_dec"].norm(dim=-1))
    assert same(loaded(x), f @ t["W_dec"] + t["b_dec"])
    assert (loaded.site, loaded.metadata["sae_lens_version"]) == ("resid_post.4", "6.5.0")


def test_older_jumprelu_files_hold_the_logarithm(tmp_path):
    t = random_tensors("log_threshold")
    loaded = load_sae(saelens_folder(tmp_path / "x", t, architecture="jumprelu"))
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = pre * (pre > t["log_threshold"].exp())
    assert torch.equal(loaded.encode(rows()) > 0, f > 0)
    assert same(loaded(rows()), f @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("architecture", UNITS)
@pytest.mark.parametrize("d_out", [None, 4])
def test_rows_get_norm_1_and_nothing_else_changes(tmp_path, architecture, d_out):
    sae = make(architecture, d_out, "mlp_in.1", unit=False)
    sae.W_dec[3] = 0  # a feature without a direction
    loaded = load_sae(save_sae(sae, tmp_path / "x"))
    norm = loaded.W_dec.norm(dim=-1)
    assert norm[3] == 0
    assert ((norm - 1).abs() < 1e-6).sum() == M - 1
    assert torch.equal(loaded.encode(rows()) > 0, sae.encode(rows()) > 0)  # the same L0, token by token
    assert same(loaded(rows()), sae(rows()))


def test_rows_of_norm_1_are_not_touched():
    weights = make("jumprelu").state_dict()
    assert all(torch.equal(unit_rows(weights)[name], value) for name, value in weights.items())
    weights["W_dec"] = weights["W_dec"] * (1 + 2e-6)
    assert not torch.equal(unit_rows(weights)["W_enc"], weights["W_enc"])


def test_topk_rows_keep_their_norms_because_they_would_change_the_choice(tmp_path):
    sae = make("topk", unit=False)
    assert torch.equal(load_sae(save_sae(sae, tmp_path / "x")).W_dec, sae.W_dec)


def test_folders_of_before_saelens_6(tmp_path):
    t, flat = random_tensors(), {"metadata": None, "model_name": "m", "normalize_activations": None}
    folder = saelens_folder(tmp_path / "x", t | {"scaling_factor": torch.ones(M)})

    def write(**keys):
        config = {key: value for key, value in {"d_in": D, "d_sae": M, **flat, **keys}.items() if key != "metadata"}
        (folder / "cfg.json").write_text(json.dumps(config))

    write(hook_point="blocks.2.hook_mlp_out", activation_fn_str="relu")
    assert load_sae(folder).architecture == "standard"
    assert load_sae(folder).site == "mlp_out.2"
    assert find_saes(folder) == {"mlp_out.2": folder}
    write(activation_fn="topk", activation_fn_kwargs={"k": 4}, hook_name="elsewhere")
    pre = (rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    assert same(load_sae(folder)(rows()), topk(pre, 4) @ t["W_dec"] + t["b_dec"])
    assert (load_sae(folder).site, load_sae(folder).metadata["model_name"]) == ("x", "m")
    write(activation_fn="tanh-relu")
    with pytest.raises(ValueError, match="'tanh-relu' is not supported"):
        check_sae(folder)
    write()
    save_file(t | {"scaling_factor": torch.full((M,), 1.5)}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="scaling_factor is not supported"):
        load_sae(folder)


# --- dictionary_learning ---------------------------------------------------------------------------------------------


def dl_folder(folder, kind, state, **trainer):
    """A folder as dictionary_learning writes it."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    sizes = {"dict_class": kind, "activation_dim": D, "dict_size": M}
    (folder / "config.json").write_text(json.dumps({"trainer": sizes | trainer, "buffer": {"ctx_len": 64}}))
    return folder


def linear(t):
    return {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}


def dl_cases():
    """Class -> (state dict, settings, features of x)."""
    t = random_tensors("threshold", "r_mag", "gate_bias", "mag_bias")
    named = {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    bias, theta = t["b_dec"], torch.tensor(0.6)
    count = {"k": torch.tensor(K, dtype=torch.int), "threshold": theta}
    pre = lambda x: (x - bias) @ t["W_enc"] + t["b_enc"]
    plain = lambda x: x @ t["W_enc"] + t["b_enc"]

    def gated(x):
        u = (x - bias) @ t["W_enc"]
        return (u + t["gate_bias"] > 0) * (t["r_mag"].exp() * u + t["mag_bias"]).relu()

    gates = {name: t[name] for name in ("r_mag", "gate_bias", "mag_bias")}
    weights = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T, "decoder_bias": bias}
    above = lambda x: pre(x).relu() * (pre(x).relu() > theta)
    groups = {"group_sizes": torch.tensor([10, 32])}
    return t, {
        "AutoEncoder": (linear(t) | {"bias": bias}, {}, lambda x: pre(x).relu()),
        "AutoEncoderNew": (linear(t) | {"decoder.bias": bias}, {}, lambda x: plain(x).relu()),
        "AutoEncoderTopK": (linear(t) | count | {"b_dec": bias}, {"k": K}, lambda x: topk(pre(x))),
        "BatchTopKSAE": (linear(t) | count | {"b_dec": bias}, {"k": K}, above),
        "MatryoshkaBatchTopKSAE": (named | count | groups, {"k": K}, above),
        "JumpReluAutoEncoder": (
            named | {"threshold": t["threshold"]},
            {},
            lambda x: (plain(x) * (plain(x) > t["threshold"])).relu(),
        ),
        "GatedAutoEncoder": (weights | gates, {}, gated),
    }


@pytest.mark.parametrize("kind", dl_cases()[1])
def test_classes_of_dictionary_learning_are_read(tmp_path, kind):
    t, cases = dl_cases()
    state, settings, features = cases[kind]
    folder = dl_folder(tmp_path / "trainer_0", kind, state, lm_name="m", submodule_name="mlp_out_layer_3", **settings)
    info = check_source(folder, D, M)
    sae, x, f = open_sae(folder), rows(), features(rows())
    norm = t["W_dec"].norm(dim=-1) if sae.architecture != "topk" else 1
    assert info == SaeInfo("mlp_out.3", sae.architecture, D, M)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    assert same(sae.encode(x), f * norm)
    assert same(sae(x), f @ t["W_dec"] + t["b_dec"])
    assert (sae.site, sae.metadata["model_name"], sae.k) == (
        "mlp_out.3",
        "m",
        K if sae.architecture == "topk" else None,
    )


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("unit", [True, False])
def test_dictionary_learning_computes_the_same_from_what_is_written(tmp_path, architecture, unit):
    sae = make(architecture, unit=unit)
    FORMATS["dictionary_learning"].save_sae(sae, tmp_path / "trainer_0")
    s = torch.load(tmp_path / "trainer_0" / "ae.pt", weights_only=True)
    config, x = json.loads((tmp_path / "trainer_0" / "config.json").read_text()), rows()
    if architecture == "jumprelu":
        pre = x @ s["W_enc"] + s["b_enc"]
        f, out = (pre * (pre > s["threshold"])).relu(), s["W_dec"]
    else:
        bias = s["bias" if architecture == "standard" else "b_dec"]
        f, out = ((x - bias) @ s["encoder.weight"].T + s["encoder.bias"]).relu(), s["decoder.weight"].T
        f = f if architecture == "standard" else topk(f, int(s["k"]))
    bias = s["bias"] if architecture == "standard" else s["b_dec"]
    assert same(f @ out + bias, sae(x))
    assert torch.equal(f > 0, sae.encode(x) > 0)
    if architecture == "standard":  # so that its loader has nothing to scale
        assert same(out.norm(dim=-1), torch.ones(M), 1e-6)
    classes = {"standard": "AutoEncoder", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
    assert config["trainer"]["dict_class"] == classes[architecture]
    assert (config["trainer"]["layer"], config["buffer"]["ctx_len"], config["trainer"].get("k")) == (1, 64, sae.k)
    back = open_sae(tmp_path / "trainer_0")
    assert same(back(x), sae(x))
    assert (back.site, back.metadata["saerl"]) == ("mlp_out.1", sae.metadata["saerl"])


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def resaved(folder, **tensors):
    path = folder / "ae.pt"
    torch.save(torch.load(path, weights_only=True) | tensors, path)


def settings(folder, **keys):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"trainer": config["trainer"] | keys}))


DL_REFUSALS = {
    "cut short": (lambda f: os.truncate(f / "ae.pt", 700), "is corrupted or was not written by torch.save"),
    "pickled code": (lambda f: torch.save({"a": Harmful()}, f / "ae.pt"), "holds more than tensors"),
    "no dictionary": (lambda f: torch.save(torch.zeros(2), f / "ae.pt"), "is no state dict"),
    "no config": (lambda f: (f / "config.json").unlink(), "has ae.pt but no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "malformed"),
    "empty config": (lambda f: (f / "config.json").write_text("[]"), "malformed"),
    "unknown class": (lambda f: settings(f, dict_class="CrossCoder"), "dict_class 'CrossCoder' is not supported"),
    "sizes": (lambda f: settings(f, dict_size="many"), "are numbers >= 1"),
    "other sizes": (lambda f: settings(f, dict_size=M + 1), "which contradicts activation_dim=6, dict_size=43"),
    "nan": (lambda f: resaved(f, b_dec=torch.full((D,), float("nan"))), "b_dec contains NaN or infinite"),
    "threshold unset": (
        lambda f: resaved(f, threshold=torch.tensor(-1.0)),
        r"has threshold \[-1.0\]: it was never set",
    ),
    "no threshold": (lambda f: torch.save({"a": torch.ones(1)}, f / "ae.pt"), "has no threshold"),
    "lacking": (lambda f: torch.save({"threshold": torch.tensor(1.0)}, f / "ae.pt"), "lacks W_enc, W_dec"),
    "more": (lambda f: resaved(f, W_skip=torch.zeros(D, D)), "holds W_skip"),
    "topk without k": (lambda f: settings(f, dict_class="AutoEncoderTopK", k=None), "needs k between 1 and dict_size"),
    "another k": (lambda f: settings(f, dict_class="AutoEncoderTopK", k=2), "says k=2, but ae.pt says k=5"),
}


@pytest.mark.parametrize("name", DL_REFUSALS)
def test_unreadable_folders_of_dictionary_learning_are_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    state, keys, _ = dl_cases()[1]["BatchTopKSAE"]
    folder = dl_folder(tmp_path / "trainer_0", "BatchTopKSAE", state, **keys)
    damage, message = DL_REFUSALS[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_sae(folder)
    assert "\n" not in str(error.value)
    assert not Path("unpickled").exists()


# --- sparsify --------------------------------------------------------------------------------------------------------


def coder_folder(folder, **config):
    """A folder as sparsify writes it, and its tensors."""
    t = random_tensors()
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    save_file(tensors | {"W_dec": t["W_dec"], "b_dec": t["b_dec"]}, folder / "sae.safetensors")
    shared = {"activation": "topk", "expansion_factor": 32, "num_latents": M, "k": K, "d_in": D, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(shared | config))
    return folder, t


@pytest.mark.parametrize("transcode", [False, True])
def test_folders_of_sparsify_are_read(tmp_path, transcode):
    folder, t = coder_folder(tmp_path / "layers.3.mlp", transcode=transcode)
    x = rows()
    f = topk((x - t["b_dec"] * (not transcode)) @ t["W_enc"] + t["b_enc"])
    sae = open_sae(folder)
    assert same(sae.encode(x), f)
    assert same(sae(x), f @ t["W_dec"] + t["b_dec"])
    assert sae.transcoder == transcode
    assert (sae.site, sae.target) == (("mlp_in.3", "mlp_out.3") if transcode else ("mlp_out.3", None))
    assert check_source(folder, D) == SaeInfo(sae.site, "topk", D, M, D if transcode else None, sae.target)


@pytest.mark.parametrize(
    "name, site",
    {
        "layers.11": "resid_post.11",
        "layers.0.attention": "attn_out.0",
        "layers.2.self_attn": "attn_out.2",
        "layers.2.mlp.act": "mlp_hidden.2",
        "h.3.attn": "h.3.attn",
        "layers.1.mlp/seed0": "mlp_out.1",
    }.items(),
)
def test_hookpoints_are_sites(tmp_path, name, site):
    folder, _ = coder_folder(tmp_path / name, num_latents=0, expansion_factor=7)
    assert open_sae(folder).site == site


@pytest.mark.parametrize("d_out", [None, D])
@pytest.mark.parametrize("unit", [True, False])
def test_sparsify_computes_the_same_from_what_is_written(tmp_path, d_out, unit):
    sae = make("topk", d_out, "mlp_in.1" if d_out else "mlp_out.1", unit=unit)
    FORMATS["sparsify"].save_sae(sae, tmp_path / "x")
    t, config, x = (
        load_file(tmp_path / "x" / "sae.safetensors"),
        json.loads((tmp_path / "x/cfg.json").read_text()),
        rows(),
    )
    assert (config["k"], config["d_in"], config["num_latents"], config["transcode"]) == (K, D, M, d_out is not None)
    centred = x if config["transcode"] else x - t["b_dec"]
    f = topk(centred @ t["encoder.weight"].T + t["encoder.bias"], config["k"])
    assert same(f @ t["W_dec"] + t["b_dec"], sae(x))
    back = open_sae(tmp_path / "x")
    assert same(back(x), sae(x))
    assert (back.site, back.target, back.metadata["model_name"]) == (sae.site, sae.target, "tiny")


CODER_REFUSALS = {
    "cut short": (lambda f: os.truncate(f / "sae.safetensors", 50), "is corrupted or no safetensors file"),
    "bad config": (lambda f: (f / "cfg.json").write_text("{"), "malformed"),
    "module": (lambda f: edit(f, metadata={"saerl": {"module": "/etc/x"}}), "'/etc/x' is no module"),
    "skip": (lambda f: edit(f, skip_connection=True), "skip_connection=True is not supported"),
    "signed": (lambda f: edit(f, signed=True), "signed=True is not supported"),
    "groupmax": (lambda f: edit(f, activation="groupmax"), "activation='groupmax' is not supported"),
    "no k": (lambda f: edit(f, k=None), "k are numbers >= 1"),
    "large k": (lambda f: edit(f, k=M + 1), "k <= num_latents"),
    "shape": (
        lambda f: edit(f, num_latents=M - 1),
        "which contradicts d_in=6, num_latents=41",
    ),
    "nan": (lambda f: spoil(f), "W_dec contains NaN or infinite"),
}


def edit(folder, **keys):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def spoil(folder):
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_dec"][0, 0] = float("inf")
    save_file(tensors, folder / "sae.safetensors")


@pytest.mark.parametrize("name", CODER_REFUSALS)
def test_unreadable_folders_of_sparsify_are_refused_in_one_line(tmp_path, name):
    folder, _ = coder_folder(tmp_path / "layers.3.mlp")
    damage, message = CODER_REFUSALS[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        check_source(folder)
    assert "\n" not in str(error.value)


# --- what can be written where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "to, sae, message",
    [
        ("sparsify", make("standard"), "is standard, and sparsify has topk alone"),
        ("sparsify", make("jumprelu"), "is jumprelu, and sparsify has topk alone"),
        ("sparsify", make("topk", 4, "mlp_in.1"), "its widths are 6 and 4"),
        ("sparsify", make("topk", D, "resid_post.0"), "predict a module's output from its input"),
        ("dictionary_learning", make("standard", D, "mlp_in.1"), "has autoencoders only"),
    ],
)
def test_what_a_library_lacks_is_refused_before_and_when_writing(tmp_path, to, sae, message):
    save_sae(sae, tmp_path / "in")
    for write in (
        lambda: export_saes(str(tmp_path / "in"), to),
        lambda: FORMATS[to].save_sae(sae, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            write()
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_feature_without_direction_is_refused_where_the_loader_would_divide_by_it(tmp_path):
    sae = make("standard")
    sae.W_dec[2] = 0
    with pytest.raises(ValueError, match="has a decoder row of zeros"):
        FORMATS["dictionary_learning"].save_sae(sae, tmp_path / "x")
    assert not list(tmp_path.iterdir())
