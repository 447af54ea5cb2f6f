"""What `saerl train-sae` can be asked for beyond one SAE a site: sweeps, transcoders, starting points, streams."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_PLANTED, TINY_WORDS
from safetensors.torch import load_file

from saerl_cli.config.activations import ActivationsConfig
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind, PlantedConfig, SiteConfig
from saerl_cli.config.sae import Architecture, Centre, DecoderNorm, EncoderDtype, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.jobs import train_sae as job
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl
from saerl_cli.sae import loop
from saerl_cli.sae.files import load_sae, read_sae_config
from saerl_cli.sae.sweep import plan, sweep_points

SIZES = {"tokens": 5120, "batch_size": 256, "dead_after_tokens": 2000, "resample_every_tokens": 2560, "lr": 1e-2}
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    wait_for_everyone=lambda: None,
    autocast=nullcontext,
)


def tiny(**changes) -> TrainSaeConfig:
    config = TrainSaeConfig(
        model=ModelConfig(planted=PlantedConfig(**TINY_PLANTED)),
        site=SiteConfig(names=["mlp_out.1"]),
        activations=ActivationsConfig(buffer_tokens=1024),
        sae=SaeConfig(**SIZES),
        eval_tokens=1500,
        log_every=5,
        checkpoint_every=5,
    )
    return replace(config, **changes)


def trained(folder: Path, accelerator=ACCELERATOR, **changes) -> dict:
    config = tiny(**changes)
    folder.mkdir(exist_ok=True)
    job.check(config)
    job.work(config, Run(folder), accelerator)
    return read_json(folder / "summary.json")["saes"]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / name / "sae_weights.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_points_of_a_sweep_by_hand():
    base = SaeConfig(tokens=4096, k=4, seed=7)
    points = sweep_points(base, [{"k": [8, 16]}, {"sae": "relu_unit", "l1": [2, 0.5], "seed": 1}, {"d_sae": 64}])
    assert list(points) == ["k_8", "k_16", "relu_unit-l1_2-seed_1", "relu_unit-l1_0.5-seed_1", "d_sae_64"]
    assert points["k_16"] == replace(base, k=16)
    preset = points["relu_unit-l1_0.5-seed_1"]
    assert (preset.architecture, preset.decoder_norm, preset.l1) == (Architecture.relu, DecoderNorm.unit, 0.5)
    assert (preset.tokens, preset.seed) == (4096, 1)
    assert (points["d_sae_64"].d_sae, points["d_sae_64"].expansion, points["d_sae_64"].k) == (64, None, 4)
    assert sweep_points(base, []) == {"": base}


def test_a_preset_brings_what_it_builds_on():
    point = sweep_points(SaeConfig(tokens=10**7, batch_size=512), [{"sae": "dl-demo-topk", "k": 8}])["dl-demo-topk-k_8"]
    assert (point.auxk_relu, point.decoder_norm, point.lr, point.batch_size) == (True, DecoderNorm.unit, 3e-4, 512)


def test_a_setting_that_is_a_list_takes_a_list_of_lists():
    base = SaeConfig(architecture=Architecture.matryoshka)
    assert list(sweep_points(base, [{"prefixes": [0.5, 1.0]}]))[0] == "prefixes_0.5_1.0"
    points = sweep_points(base, [{"prefixes": [[0.5, 1.0], [0.25, 1.0]]}])
    assert [point.prefixes for point in points.values()] == [[0.5, 1.0], [0.25, 1.0]]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ([3], "must change settings"),
        ([{}], "must change settings"),
        ([{"kk": 1}], "there is no setting sae.kk"),
        ([{"sae": "nope"}], "there is no preset sae=nope; there are"),
        ([{"k": [1, 1]}], "two points of the sweep are alike: k_1"),
        ([{"batch_size": 3}], "batch_size belongs to the stream"),
        ([{"lr": "abc"}], "'abc' of type 'str' could not be converted"),
        ([{"k": [0]}], "sae.k must be >= 1"),
        ([{"architecture": "foo"}], "Invalid value 'foo'"),
        ([{"expansion": 1, "k": 100}], "sae.k=100 exceeds d_sae=32"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(sweep, message, tiny_planted_model):
    with pytest.raises(ValueError, match=message) as error:
        job.check(tiny(sweep=sweep))
    assert "\n" not in str(error.value)


SWEEP = [
    {"k": [4, 8]},
    {"sae": ["relu", "gated", "jumprelu", "matryoshka"], "lr": 5e-3},
    {"sae": "batchtopk", "seed": [0, 1], "tokens": 2560},
]


def test_a_mixture_in_one_pass_equals_each_alone(tmp_path, tiny_planted_model, monkeypatch):
    """Eight SAEs at each of two sites read one stream; what one of them becomes does not depend on the others."""
    site = SiteConfig(names=["mlp_out.1", "resid_post.0"])
    together = trained(tmp_path / "all", site=site, sweep=SWEEP)
    assert len(together) == 16
    assert together["mlp_out.1-batchtopk-seed_1-tokens_2560"]["tokens"] == 2560
    assert {numbers["site"] for numbers in together.values()} == {"mlp_out.1", "resid_post.0"}
    for entry, name in [({"k": 8}, "k_8"), ({"sae": "gated", "lr": 5e-3}, "gated-lr_0.005")]:
        trained(tmp_path / name, sweep=[entry])
        full = f"mlp_out.1-{name}"
        assert same(weights(tmp_path / "all", full), weights(tmp_path / name, full))
        assert read_sae_config(tmp_path / "all" / "sae" / full)["metadata"]["saerl"]["site"] == "mlp_out.1"
    lines = read_jsonl(tmp_path / "all" / "metrics.jsonl")
    assert "mlp_out.1-k_4/fvu" in lines[-1] and "mlp_out.1-batchtopk-seed_0-tokens_2560/fvu" not in lines[-1]


def test_the_language_model_runs_once_for_all(tmp_path, tiny_planted_model, monkeypatch):
    from saerl_cli.activations import stream

    calls, real = [], stream.capture
    monkeypatch.setattr(stream, "capture", lambda *a, **k: calls.append(1) or real(*a, **k))
    counts = []
    for name, sweep in (("one", []), ("eight", SWEEP)):
        trained(tmp_path / name, sweep=sweep)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1] > 0


class Crash(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("after", [4, 5, 13])
@pytest.mark.parametrize("stream", ["planted", "cached", "streamed", "filtered"])
def test_a_crashed_sweep_continues_to_the_bit(tmp_path, monkeypatch, tiny_planted_model, after, stream):
    changes = streams(tmp_path, tiny_planted_model)[stream] | {"sweep": SWEEP}
    trained(tmp_path / "whole", **changes)
    real = loop.training

    def crashing(*arguments):
        for done, metrics in real(*arguments):
            yield done, metrics
            if done == after:
                raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop, "training", crashing)
        trained(tmp_path / "broken", **changes)
    trained(tmp_path / "broken", **changes)
    names = [path.name for path in (tmp_path / "whole" / "sae").iterdir()]
    assert len(names) == 8
    for name in names:
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "broken", name)), name
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()


def streams(folder: Path, model: Path) -> dict[str, dict]:
    """Changes of settings for every kind of stream."""
    text = folder / "text.jsonl"
    words = ["we", "saw", "the", "film", ".", "it", "was", "good", "and", "the", "story", "was", "long", "."]
    lines = [{"text": " ".join(words[i % 5 :] + words[: i % 7])} for i in range(900)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    local = ModelConfig(kind=ModelKind.local, path=str(model))
    streamed = DataConfig(kind=DataKind.text, path=str(text), stream=True, heldout_documents=100)
    return {
        "planted": {},
        "cached": {"activations": ActivationsConfig(buffer_tokens=1024, cache=str(folder / "cache"))},
        "streamed": {"model": local, "data": streamed},
        "filtered": {"activations": ActivationsConfig(buffer_tokens=1024, outlier_norm=1.2, prefetch=True)},
    }


def test_what_was_left_out_is_said_and_recorded(tmp_path, tiny_planted_model, capfd):
    trained(tmp_path / "run", **streams(tmp_path, tiny_planted_model)["filtered"])
    assert "activations as outliers" in capfd.readouterr().err
    assert read_json(tmp_path / "run" / "run.json")["text"]["outliers_since_start"] > 0


def test_empty_lines_and_bad_bytes_are_counted(tmp_path, tiny_planted_model, capfd):
    text = tmp_path / "text.txt"
    good = b"we saw the film . it was good and the story was long .\n" * 300
    text.write_bytes(good + b"\n\n\xff\xfe bad\n" + good)
    changes = {
        "model": ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)),
        "data": DataConfig(kind=DataKind.text, path=str(text)),
    }
    trained(tmp_path / "run", **changes)
    note = read_json(tmp_path / "run" / "run.json")["text"]["note"]
    assert "1 not UTF-8" in note and note in capfd.readouterr().err


# --- transcoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sae", ["topk", "batchtopk", "relu"])
def test_transcoders_predict_the_output_of_an_mlp_from_its_input(tmp_path, tiny_planted_model, sae):
    site = SiteConfig(names=["mlp_in.1"], targets=["mlp_out.1"])
    l1 = {"l1": 0.5} if sae in ("relu", "gated") else {}
    numbers = trained(tmp_path, site=site, sweep=[{"sae": sae, "tokens": 12_800} | l1])
    (name, found), *_ = numbers.items()
    assert name.startswith("mlp_in.1-to-mlp_out.1-") and (found["site"], found["target"]) == ("mlp_in.1", "mlp_out.1")
    assert found["fvu"] < 0.7
    assert found["ce_base"] <= found["ce_spliced"] < found["ce_zero"]
    sae_found = load_sae(tmp_path / "sae" / name)
    assert sae_found.transcoder and sae_found.target == "mlp_out.1"


@pytest.mark.parametrize(
    ("site", "sae", "message"),
    [
        ({"names": ["mlp_in.*"], "targets": ["mlp_out.1"]}, {}, "site.names gives 2 sites and site.targets 1"),
        ({"names": ["mlp_out.1"], "targets": ["mlp_out.1"]}, {}, "a transcoder from mlp_out.1 to itself"),
        ({"names": ["mlp_in.1"], "targets": ["mlp_out.7"]}, {}, "layer 7 is out of range"),
        (
            {"names": ["mlp_in.1"], "targets": ["mlp_out.1"]},
            {"architecture": Architecture.relu, "tied": True, "decoder_norm": DecoderNorm.unit},
            "sae.tied belongs to autoencoders",
        ),
    ],
)
def test_transcoders_that_make_no_sense_are_refused(site, sae, message, tiny_planted_model):
    with pytest.raises(ValueError, match=message):
        job.check(tiny(site=SiteConfig(**site), sae=SaeConfig(**SIZES, **sae)))


# --- starting points -------------------------------------------------------------------------------------------------


def test_training_continues_from_another_run(tmp_path, tiny_planted_model):
    first = trained(tmp_path / "first", sae=SaeConfig(**SIZES))
    from_it = SaeConfig(**SIZES | {"lr": 1e-9}, init_from=str(tmp_path / "first"))
    second = trained(tmp_path / "second", sae=from_it)
    fresh = trained(tmp_path / "fresh", sae=SaeConfig(**SIZES | {"lr": 1e-9}))
    assert second["mlp_out.1"]["fvu"] == pytest.approx(first["mlp_out.1"]["fvu"], rel=0.05)
    assert fresh["mlp_out.1"]["fvu"] > 1.5 * first["mlp_out.1"]["fvu"]


def test_starting_points_that_do_not_fit_are_refused(tmp_path, tiny_planted_model):
    trained(tmp_path / "first", sae=SaeConfig(**SIZES))
    start = {"init_from": str(tmp_path / "first")}
    cases = [
        ({"sae": SaeConfig(**SIZES, init_from=str(tmp_path / "none"))}, "no such folder|none"),
        ({"sae": SaeConfig(**SIZES, **start, expansion=2)}, "d_sae"),
        ({"sae": SaeConfig(**SIZES, **start), "site": SiteConfig(names=["resid_post.0"])}, "resid_post.0"),
        ({"sae": SaeConfig(**SIZES, **start, centre=Centre.off)}, "sae.centre=off would ignore"),
        (
            {
                "sae": SaeConfig(**SIZES, init_from=str(tmp_path / "first" / "sae" / "mlp_out.1")),
                "site": SiteConfig(names=["mlp_in.1"], targets=["mlp_out.1"]),
            },
            "is to be a transcoder, that is an SAE",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            job.check(tiny(**changes))
        assert "\n" not in str(error.value)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_an_sae_that_never_beats_the_mean_is_called_that(tmp_path, tiny_planted_model, capfd):
    numbers = trained(tmp_path, sae=SaeConfig(**SIZES, architecture=Architecture.relu, l1=1e4, l1_warmup=0.0))
    assert numbers["mlp_out.1"]["beats_mean"] is False
    assert "no better than predicting the mean activation" in capfd.readouterr().err


def test_the_language_model_runs_in_mixed_precision_while_training_alone(tmp_path, tiny_planted_model):
    class Autocast(SimpleNamespace):
        entered = 0

        def autocast(self):
            Autocast.entered += 1
            return torch.autocast("cpu", torch.bfloat16)

    lower = Autocast(**{k: v for k, v in vars(ACCELERATOR).items() if k != "autocast"})
    full = trained(tmp_path / "full")["mlp_out.1"]
    half = trained(tmp_path / "half", accelerator=lower)["mlp_out.1"]
    assert Autocast.entered > 0
    assert full["ce_base"] == half["ce_base"]  # measured in full precision
    assert half["fvu"] != full["fvu"] and half["fvu"] == pytest.approx(full["fvu"], rel=0.2)


def test_bfloat16_encoders_train_as_well(tmp_path, tiny_planted_model):
    numbers = trained(tmp_path, sweep=[{"encoder_dtype": ["float32", "bfloat16"]}])
    full, half = (numbers[f"mlp_out.1-encoder_dtype_{dtype.value}"]["fvu"] for dtype in EncoderDtype)
    assert half == pytest.approx(full, rel=0.1) and half != full


def test_a_cache_is_used_again(tmp_path, tiny_planted_model, monkeypatch):
    from saerl_cli.activations import cache

    changes = streams(tmp_path, tiny_planted_model)["cached"]
    trained(tmp_path / "a", **changes)
    monkeypatch.setattr(cache, "capture", None)  # another forward pass would fail
    trained(tmp_path / "b", **changes)
    assert same(weights(tmp_path / "a", "mlp_out.1"), weights(tmp_path / "b", "mlp_out.1"))


def test_trackers_get_what_is_logged(saerl, tiny_planted_model):
    pytest.importorskip("tensorboard", reason="needs the extra saerl[trackers]")
    words = [*TINY_WORDS, "site=mlp_out.1", "sae.tokens=5120", "sae.batch_size=256", "activations.buffer_tokens=1024"]
    done = saerl("train-sae", *words, "eval_tokens=1500", "launch.trackers=[tensorboard]", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    (events,) = Path("out/saerl").glob("events.*")
    assert b"mlp_out.1/fvu" in events.read_bytes()


def test_every_sae_of_a_plan_has_its_own_name(tiny_planted_model):
    from saerl_cli.models import describe

    config = tiny(site=SiteConfig(names=["mlp_out.*"]), sweep=[{"k": [4, 8]}])
    names = [planned.name for planned in plan(config, describe(config.model))]
    assert names == ["mlp_out.0-k_4", "mlp_out.0-k_8", "mlp_out.1-k_4", "mlp_out.1-k_8"]


def test_coefficients_on_a_transcoder_are_refused(tmp_path, tiny_planted_model):
    from saerl_cli.config.adapter import AdapterConfig
    from saerl_cli.models import describe
    from saerl_cli.rl.adapters.coefficients import check_saes

    trained(tmp_path, site=SiteConfig(names=["mlp_in.1"], targets=["mlp_out.1"]))
    model = tiny().model
    adapter = AdapterConfig(kind="sparse_coeffs", saes=str(tmp_path))
    with pytest.raises(ValueError, match="is a transcoder, which predicts another site than mlp_in.1"):
        check_saes(adapter, model, describe(model))
