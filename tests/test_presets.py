"""Presets are what their sources say, convert to one loss, compose, and train."""

import dataclasses
import json
from enum import Enum
from math import sqrt

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from sae_fixtures import ask_peers
from sae_oracles import Settings, gradients

from saerl_cli.config import typed
from saerl_cli.config.activations import ActivationsConfig
from saerl_cli.config.sae import (
    L1_FAMILY,
    Architecture,
    AuxkUnit,
    DecoderNorm,
    InputScale,
    L1Unit,
    SaeConfig,
)
from saerl_cli.run.configs import conf_dir, register_schema
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.sae.architectures.common import Batch
from saerl_cli.sae.dead import due
from saerl_cli.sae.presets import auxk_weight, canonical_l1, conversion_line
from saerl_cli.sae.train import SaeTrainer

FOLDER = ROOT / "conf" / "sae"
OWN = {*(a.value for a in Architecture), "relu_unit"}  # options that are no recipe of others

# --- what the sources say --------------------------------------------------------------------------------------------

ADAM = {"optimizer": "adam", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SPARSE_GRADIENT = ADAM | {"beta1": 0.0}  # Rajamanoharan et al. 2024
RAW = {"scale": "none"}
FLAT = {"lr_warmup": 0, "lr_decay": 0}
NO_REVIVAL = {"resample": "none", "auxk": 0, "preact": 0}
CLASSIC = {"architecture": "relu"} | ADAM | RAW | FLAT | {"l1_warmup": 0, "max_grad_norm": None, "auxk": 0}
TEN_MILLION = {"dead_after_tokens": 10_000_000}

DL = ADAM | RAW | {"batch_size": 8192, "lr_warmup": 1000, "lr_decay": 0, "decoder_norm": "unit", "resample": "none"}
DL_TOPK = (
    DL
    | TEN_MILLION
    | {"architecture": "topk", "auxk": 1 / 32, "auxk_relu": True, "auxk_unit": "residual", "auxk_latents": None}
)
DL_TOPK |= {"centre": "median", "max_grad_norm": 1.0, "lr": 2e-4, "lr_at_width": 2**14}
DL_MATRYOSHKA = DL_TOPK | {"architecture": "matryoshka", "auxk": 5**2 / 32, "max_grad_norm": 5**2}
DL_MATRYOSHKA |= {"prefixes": [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0]}
DL_JUMPRELU = DL | SPARSE_GRADIENT | {"architecture": "jumprelu", "lr": 7e-5, "l0": 1.0, "l1_warmup": 2000}
DL_JUMPRELU |= {"penalty": "target", "target_l0": 20, "theta": 0.001, "bandwidth": 0.001, "ste_to_input": False}
DL_JUMPRELU |= {"centre": "zeros", "max_grad_norm": 1.0}
DL_GATED = DL | SPARSE_GRADIENT | {"architecture": "gated", "lr": 5e-5, "l1": 0.1, "l1_unit": "canonical"}
DL_GATED |= {"l1_warmup": 2000, "centre": "zeros", "max_grad_norm": None}
DL_STANDARD = DL | {"architecture": "relu", "lr": 1e-3, "l1": 0.1, "l1_unit": "canonical", "l1_warmup": 2000}
DL_STANDARD |= {"centre": "zeros", "max_grad_norm": None}
DEMO = {"scale": "rms", "batch_size": 2048, "lr": 3e-4, "lr_warmup": 1000, "lr_decay": 0.2, "lr_at_width": None}

SAELENS = ADAM | RAW | FLAT | {"lr": 3e-4, "batch_size": 4096, "decoder_norm": "free", "decoder_start": 0.1}
SAELENS |= {"centre": "zeros", "max_grad_norm": 1.0, "dead_after_tokens": 1000 * 4096, "resample": "none"}
SPARSIFY = RAW | TEN_MILLION | NO_REVIVAL | {"architecture": "topk", "k": 32, "expansion": 32, "centre": "mean"}
SPARSIFY |= {"decoder_norm": "unit", "batch_size": 32 * 2048, "max_grad_norm": None, "lr_at_width": 2**14}
ANTHROPIC = ADAM | {"scale": "norm", "centre": "zeros", "decoder_norm": "free", "lr_decay": 0.2, "max_grad_norm": 1.0}
GEMMA = (
    SPARSE_GRADIENT
    | NO_REVIVAL
    | {"architecture": "jumprelu", "lr": 7e-5, "lr_warmup": 1000, "lr_shape": "cosine", "scale": "rms"}
)
GEMMA |= {"theta": 0.001, "bandwidth": 0.001, "ste_to_input": False, "decoder_norm": "unit", "batch_size": 4096}
GEMMA |= {"l1_warmup": 10_000, "max_grad_norm": None, "lr_decay": 0}
CONTROLLED = {"controller": "auto", "control_after_tokens": 5_000_000, "control_every": 200, "control_band": 5}
CONTROLLED |= {"control_factor": 1.1}

SOURCES = {
    "newhouse2023": CLASSIC
    | CONTROLLED
    | {"lr": 1e-4, "batch_size": 8 * 128, "expansion": 4, "decoder_norm": "renormalised", "tied": False}
    | {"l1_unit": "canonical", "target_l0": 0.01 * 4 * 4096, "centre": "zeros", "resample": "random"}
    | {"dead_after_tokens": 5000 * 1024, "resample_every_tokens": 10_000 * 1024},
    "bricken2023": CLASSIC
    | {"batch_size": 8192, "decoder_norm": "unit", "tied": False, "resample": "loss", "resample_norm": 0.2}
    | {"dead_after_tokens": 12_500 * 8192, "resample_every_tokens": 25_000 * 8192, "resample_until": 100_000},
    "cunningham2023": CLASSIC
    | NO_REVIVAL
    | {"lr": 1e-3, "batch_size": 1024, "tied": True, "centre": "off", "decoder_norm": "unit"}
    | {"l1": 8.6e-4, "l1_unit": "mean_over_dims"},
    "nanda2023": CLASSIC
    | {"lr": 1e-4, "beta2": 0.99, "batch_size": 4096, "expansion": 32, "tied": False, "centre": "zeros"}
    | {"l1": 3e-4, "l1_unit": "batch_sum", "decoder_norm": "unit", "resample": "random"}
    | {"dead_below_rate": 10**-5.5, "resample_every_tokens": 30_000 * 4096},
    "riggs2023": CLASSIC
    | NO_REVIVAL
    | CONTROLLED
    | {"lr": 1e-3, "batch_size": 4 * 256, "expansion": 4, "tied": True, "centre": "off", "decoder_norm": "unit"}
    | {"l1": 1e-3, "l1_unit": "mean_over_dims", "target_l0": 0.1 * 4096},
    "anthropic-apr24": ANTHROPIC
    | NO_REVIVAL
    | {"architecture": "relu", "lr": 5e-5, "l1": 5.0, "l1_unit": "canonical", "l1_warmup": 0.05, "decoder_start": 0.1},
    "anthropic-jan25": ANTHROPIC
    | {"architecture": "jumprelu", "penalty": "tanh", "tanh_scale": 4, "theta": 0.1, "bandwidth": 2.0, "preact": 3e-6}
    | {"ste_to_input": True, "l0": 10, "l1_warmup": 1.0, "resample": "none", "decoder_start": round(1 / sqrt(3), 3)},
    "gemma-scope": GEMMA | {"penalty": "step"},
    "gemma-scope-2": GEMMA | {"penalty": "quadratic", "target_l0": (30 + 60) / 2},
    "openai-topk": ADAM
    | TEN_MILLION
    | FLAT
    | {"architecture": "topk", "lr": 1e-4, "eps": 6.25e-10, "k": 32, "d_sae": 32768, "expansion": None}
    | {
        "auxk": 1 / 32,
        "auxk_relu": True,
        "auxk_unit": "relative",
        "auxk_latents": 256,
        "resample": "none",
        "batch_size": 131072,
    }
    | {"decoder_norm": "unit", "centre": "median", "max_grad_norm": None, "scale": "norm"},
    "dl-topk": DL_TOPK,
    "dl-batchtopk": DL_TOPK | {"architecture": "batchtopk"},
    "dl-matryoshka": DL_MATRYOSHKA,
    "dl-jumprelu": DL_JUMPRELU,
    "dl-gated": DL_GATED,
    "dl-standard": DL_STANDARD,
    "dl-demo-topk": DL_TOPK | DEMO | {"k": 80},
    "dl-demo-batchtopk": DL_TOPK | DEMO | {"architecture": "batchtopk", "k": 80},
    "dl-demo-matryoshka": DL_MATRYOSHKA | DEMO | {"k": 80},
    "dl-demo-jumprelu": DL_JUMPRELU | DEMO | {"l1_warmup": 5000, "target_l0": 80},
    "dl-demo-gated": DL_GATED | DEMO | {"l1_warmup": 5000, "l1": 0.04},
    "dl-demo-standard": DL_STANDARD | DEMO | {"l1_warmup": 5000, "l1": 0.03},
    "sparsify-topk": SPARSIFY | ADAM | {"lr": 2e-4, "lr_warmup": 1000, "lr_decay": 1.0},
    "sparsify-signum": SPARSIFY | FLAT | {"optimizer": "signum", "lr": 5e-3, "beta1": 0.95},
    "saelens-topk": SAELENS | {"architecture": "topk", "k": 100, "auxk": 1.0, "auxk_unit": "plain"},
    "saelens-standard": SAELENS | {"architecture": "relu", "l1": 1.0, "l1_unit": "canonical", "l1_warmup": 0},
    "saelens-jumprelu": SAELENS
    | {"architecture": "jumprelu", "l0": 1.0, "l1_warmup": 0, "penalty": "step", "theta": 0.01, "bandwidth": 0.05}
    | {"ste_to_input": False, "preact": 0},
}
WIDE = {"openai-topk": ["activations.buffer_tokens=131072"]}  # a batch larger than the default buffer


@pytest.fixture(scope="module")
def presets():
    """Every preset as the command line composes it."""
    register_schema("train_sae")
    found = {}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name in SOURCES:
            words = [f"sae={name}", *WIDE.get(name, [])]
            found[name] = typed(compose("train_sae", words), resolve(JOBS["train_sae"].schema)).sae
    return found


def plain(value):
    return value.value if isinstance(value, Enum) else list(value) if isinstance(value, (list, tuple)) else value


def differences(config, wanted):
    """Settings of `wanted` that `config` does not have, with both values."""
    have = {name: plain(getattr(config, name)) for name in wanted}
    return {name: (have[name], value) for name, value in wanted.items() if have[name] != pytest.approx(value)}


def test_every_option_is_a_preset_with_a_source_or_our_own():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SOURCES.keys() | OWN


@pytest.mark.parametrize("name", SOURCES)
def test_settings_are_those_of_the_source(name, presets):
    assert isinstance(presets[name], SaeConfig)
    assert differences(presets[name], SOURCES[name]) == {}
    assert presets[name].tokens == SaeConfig().tokens  # the user's


@pytest.fixture(scope="module")
def library_defaults():
    return json.loads(ask_peers("defaults").splitlines()[-1])


LIBRARIES = [name for name in SOURCES if name.startswith(("dl-", "saelens-", "sparsify-")) and "-demo-" not in name]


@pytest.mark.parametrize("name", LIBRARIES)
def test_settings_are_the_library_s_defaults(name, presets, library_defaults):
    wanted = library_defaults[name]
    lr = wanted.pop("lr_at_64_features", None)
    assert differences(presets[name], wanted) == {}
    if lr is not None:
        assert dataclasses.replace(presets[name], d_sae=64, expansion=None).peak_lr(8) == pytest.approx(lr)


@pytest.mark.parametrize("name", SOURCES)
def test_header_says_where_it_comes_from(name):
    header = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(word in header[0] for word in ("20", "0.1.0", "1.3.3", "6.54.12", "1436674"))  # a year or a version


@pytest.mark.parametrize("name", SOURCES)
def test_the_default_buffer_holds_a_batch(name, presets):
    batch = presets[name].batch_size
    assert ActivationsConfig().buffer(batch) >= batch


# --- conversion ------------------------------------------------------------------------------------------------------


def test_conversion_by_hand():
    config = lambda unit, **more: SaeConfig(architecture=Architecture.relu, l1=8.6e-4, l1_unit=unit, **more)
    assert canonical_l1(config(L1Unit.canonical), 512) == 8.6e-4
    assert canonical_l1(config(L1Unit.mean_over_dims), 512) == pytest.approx(0.44032)
    assert canonical_l1(config(L1Unit.batch_sum, batch_size=4096), 512) == pytest.approx(3.52256)
    assert canonical_l1(config(L1Unit.fvu), 512, 250.0) == pytest.approx(0.215)
    with pytest.raises(ValueError, match="l1_unit=fvu needs the variance"):
        canonical_l1(config(L1Unit.fvu), 512)
    line = conversion_line(config(L1Unit.mean_over_dims), 512)
    assert line == "l1 = 0.00086 with the error averaged over dimensions is 0.44 in the canonical form (x d_in = 512)"
    line = conversion_line(config(L1Unit.batch_sum, batch_size=4096), 512)
    assert line == "l1 = 0.00086 with the L1 summed over the batch is 3.52 in the canonical form (x batch_size = 4096)"
    assert "is 0.215 in the canonical form (x variance = 250)" in (conversion_line(config(L1Unit.fvu), 9, 250.0) or "")
    assert "0.00086 x that variance" in (conversion_line(config(L1Unit.fvu), 9) or "")
    assert conversion_line(config(L1Unit.canonical), 512) is None
    assert conversion_line(SaeConfig(), 512) is None  # topk has no l1


def test_auxk_weight_by_hand():
    weigh = lambda unit: auxk_weight(SaeConfig(auxk=0.5, auxk_unit=unit), 12.0, 3.0)
    assert (weigh(AuxkUnit.relative), weigh(AuxkUnit.plain)) == (2.0, 0.5)
    assert weigh(AuxkUnit.residual) == pytest.approx(0.5 / 3)


def test_learning_rate_follows_the_width():
    config = SaeConfig(lr=2e-4, lr_at_width=16384, expansion=None, d_sae=65536)
    assert config.peak_lr(64) == pytest.approx(1e-4)
    assert dataclasses.replace(config, lr_at_width=None).peak_lr(64) == 2e-4


N, D, M = 32, 12, 40


@pytest.fixture(scope="module")
def drawn():
    """Parameters with unit decoder rows, and a batch: `params`, `x`, in float64."""
    g = torch.Generator().manual_seed(11)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    params = {"encoder": draw(M, D), "b_enc": draw(M), "decoder": draw(M, D), "b_dec": draw(D)}
    params |= {"threshold": draw(M).abs(), "r_mag": draw(M) * 0.3, "b_mag": draw(M)}
    params["decoder"] /= params["decoder"].norm(dim=1, keepdim=True)
    return params, draw(N, D) * 2


def mean_squared(x, x_hat):
    return ((x - x_hat) ** 2).mean()


def summed(x, x_hat):
    return ((x - x_hat) ** 2).sum(-1).mean()


def untied(p, x):
    f = torch.relu((x - p["b_dec"]) @ p["encoder"].T + p["b_enc"])
    return f, f @ p["decoder"] + p["b_dec"]


def tied(p, x):
    """Rows divided by their norm in the forward pass, no b_dec."""
    rows = p["decoder"] / p["decoder"].norm(dim=1, keepdim=True)
    f = torch.relu(x @ rows.T + p["b_enc"])
    return f, f @ rows


def averaged_over_dimensions(p, x, l1):
    f, x_hat = tied(p, x)
    return mean_squared(x, x_hat) + l1 * f.norm(p=1, dim=-1).mean()


def summed_over_the_batch(p, x, l1):
    f, x_hat = untied(p, x)
    return summed(x, x_hat) + l1 * f.abs().sum()


def usual(p, x, l1):
    f, x_hat = untied(p, x)
    return summed(x, x_hat) + l1 * f.sum(-1).mean()


def weighted_by_norms(p, x, l1):
    f, x_hat = untied(p, x)
    return summed(x, x_hat) + l1 * (f @ p["decoder"].norm(dim=1)).mean()


def unexplained(p, x, l1):
    f, x_hat = untied(p, x)
    return ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum() + l1 * f.sum(-1).mean()


def two_paths(p, x, l1):
    """Rajamanoharan et al. 2024a, as in GatedSAETrainer."""
    before = (x - p["b_dec"]) @ p["encoder"].T
    gate = before + p["b_enc"]
    f = (gate > 0) * torch.relu(before * p["r_mag"].exp() + p["b_mag"])
    frozen = torch.relu(gate) @ p["decoder"].detach() + p["b_dec"].detach()
    sparsity = torch.relu(gate).norm(p=1, dim=-1).mean()
    return summed(x, f @ p["decoder"] + p["b_dec"]) + l1 * sparsity + summed(x, frozen)


FORMULAS = {
    "newhouse2023": usual,
    "bricken2023": usual,
    "cunningham2023": averaged_over_dimensions,
    "nanda2023": summed_over_the_batch,
    "riggs2023": averaged_over_dimensions,
    "anthropic-apr24": weighted_by_norms,
    "dl-gated": two_paths,
    "dl-standard": usual,
    "dl-demo-gated": two_paths,
    "dl-demo-standard": usual,
    "saelens-standard": weighted_by_norms,
    "fvu": unexplained,
}


def test_every_preset_with_an_l1_has_its_formula():
    assert {name for name, wanted in SOURCES.items() if wanted["architecture"] in ("relu", "gated")} | {
        "fvu"
    } == FORMULAS.keys()
    assert {a.value for a in L1_FAMILY} == {"relu", "gated"}


def cosine(one, other):
    """Of all gradients laid end to end."""
    a, b = (torch.cat([grads[name].flatten() for name in sorted(one)]) for grads in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_of_the_recipe_is_proportional_to_that_of_the_canonical_form(name, presets, drawn):
    params, x = drawn
    config = presets.get(name, SaeConfig(architecture=Architecture.relu, l1=0.03, l1_unit=L1Unit.fvu))
    config = dataclasses.replace(config, batch_size=N)
    used = {"b_enc", "decoder"} if config.tied else {"encoder", "b_enc", "decoder", "b_dec"}
    used |= {"r_mag", "b_mag"} if config.architecture is Architecture.gated else set()
    leaves = {key: params[key].clone().requires_grad_(True) for key in used}
    loss = FORMULAS[name](leaves, x, config.l1)
    theirs = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    norm = config.decoder_norm if name != "fvu" else DecoderNorm.renormalised
    if norm is DecoderNorm.unit and not config.tied:  # each of them removes what is parallel to the rows
        rows = params["decoder"]
        theirs["decoder"] -= (theirs["decoder"] * rows).sum(1, keepdim=True) * rows
    variance = float((x - x.mean(0)).square().sum(1).mean())

    def ours(l1):
        s = Settings(decoder_norm=norm.value, l1=l1, centre=torch.zeros_like(x[0]) if config.tied else None)
        start = {key: params[key] for key in used} | ({"b_dec": torch.zeros_like(x[0])} if config.tied else {})
        found = gradients(config.architecture.value, start, x, x, s)[1]
        return {key: found[key] for key in used}

    converted = canonical_l1(config, D, variance)
    assert cosine(theirs, ours(converted)) > 1 - 1e-6
    # the test can fail: at twice or half the weight the direction is another one
    strong = max(converted, 1.0)
    assert cosine(ours(strong), ours(2 * strong)) < 1 - 1e-6


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_default_settings_train_a_step(name, presets):
    """One step of the preset's own batch size, with few dimensions and features."""
    config = dataclasses.replace(presets[name], d_sae=128, expansion=None, tokens=presets[name].batch_size)
    x = torch.randn(config.batch_size, 16, generator=torch.Generator().manual_seed(0)) + 1
    trainer = SaeTrainer(16, config)
    start = {key: value.detach().clone() for key, value in trainer.p.items()}
    metrics = trainer.step(x, measure=True)
    assert metrics is not None
    assert 0 < metrics["fvu"] < float("inf")
    assert not torch.equal(start["decoder"], trainer.p["decoder"])
    assert all(value.isfinite().all() for value in trainer.p.values())


# --- what the trainer makes of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", AuxkUnit)
def test_trainer_weighs_auxk_by_its_unit(unit, drawn):
    params, x = (drawn[0], drawn[1].float())
    base = {"expansion": None, "d_sae": M, "k": 4, "tokens": N, "batch_size": N, "scale": InputScale.none}
    config = SaeConfig(**base, auxk=0.3, auxk_unit=unit, dead_after_tokens=1)
    trainer = SaeTrainer(D, config)
    start = {name: params[name].float() for name in trainer.p}
    dead = torch.arange(M) >= M - 9
    for name, value in start.items():
        trainer.p[name].data.copy_(value)
    trainer.firing.silent[dead] = 10
    trainer.backward(Batch(x - start["b_dec"], x, N, dead, trainer.group), 0.0)
    wanted = gradients("topk", start, x, x, Settings(k=4, auxk=0.3, auxk_unit=unit.value, dead=dead))[1]
    for name, parameter in trainer.p.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_trainer_scales_its_learning_rate_by_the_width():
    config = SaeConfig(lr=2e-4, lr_at_width=64, expansion=None, d_sae=256, tokens=2048 * 10, lr_warmup=0, lr_decay=0)
    assert SaeTrainer(8, config).learning_rate() == pytest.approx(1e-4)


def test_resampling_ends_at_its_share_or_step():
    base = {"tokens": 1000, "batch_size": 10, "resample_every_tokens": 100, "lr_decay": 0.0}  # every 10 of 100 steps
    steps = lambda until: [n + 1 for n in range(100) if due(SaeConfig(**base, resample_until=until), n)]
    assert steps(1.0) == list(range(10, 101, 10))
    assert steps(0.35) == steps(35) == [10, 20, 30]
