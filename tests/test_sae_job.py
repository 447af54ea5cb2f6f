"""train-sae as a whole: the real command, its refusals, crashes and processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TRUE
from conftest import TINY_PLANTED, TINY_WORDS
from safetensors.torch import load_file

from saerl_cli.config.activations import ActivationsConfig
from saerl_cli.config.groups import (
    DataConfig,
    DataKind,
    LaunchConfig,
    ModelConfig,
    ModelKind,
    PlantedConfig,
    SiteConfig,
)
from saerl_cli.config.sae import Architecture, DecoderNorm, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.jobs import train_sae as job
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl
from saerl_cli.sae.files import check_sae, find_saes, load_sae, sae_sha256

SIZES = {
    "tokens": 12_800,
    "batch_size": 256,
    "dead_after_tokens": 2000,
    "resample_every_tokens": 2560,
}
WORDS = [
    *TINY_WORDS,
    "site=[mlp_out.1,resid_post.0]",
    "activations.buffer_tokens=1024",
    *(f"sae.{key}={value}" for key, value in SIZES.items()),
]
WORDS += ["eval_tokens=1500", "log_every=5", "checkpoint_every=10"]
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, process_index=0, wait_for_everyone=lambda: None, autocast=nullcontext
)


def tiny(**changes) -> TrainSaeConfig:
    config = TrainSaeConfig(
        model=ModelConfig(planted=PlantedConfig(**TINY_PLANTED)),
        site=SiteConfig(names=["mlp_out.1", "resid_post.0"]),
        activations=ActivationsConfig(buffer_tokens=1024),
        sae=SaeConfig(**SIZES, lr=1e-2),
        eval_tokens=1500,
        log_every=5,
        checkpoint_every=10,
    )
    return replace(config, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{site}/{name}": tensor
        for site, path in find_saes(folder).items()
        for name, tensor in load_file(path / "sae_weights.safetensors").items()
    }


def equal(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return set(first) == set(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_command_trains_saes_at_several_sites(saerl, tiny_planted_model):
    done = saerl("train-sae", *WORDS, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    summary, record = read_json(Path("out/summary.json")), read_json(Path("out/run.json"))
    assert list(summary["saes"]) == ["mlp_out.1", "resid_post.0"]
    for site, numbers in summary["saes"].items():
        assert (numbers["site"], numbers["d_in"], numbers["d_sae"]) == (site, 32, 256)
        assert (numbers["architecture"], numbers["tokens"], numbers["l0"] <= 16) == ("topk", 12_800, True)
        assert 0 < numbers["fvu"] < 1
        assert numbers["ce_base"] <= min(numbers["ce_spliced"], numbers["ce_mean"])
        room = numbers["ce_zero"] - numbers["ce_base"]
        assert numbers["ce_recovered"] == pytest.approx((numbers["ce_zero"] - numbers["ce_spliced"]) / room)
        assert numbers["tokens_per_second"] == pytest.approx(12_800 / numbers["seconds"])
        assert {"dead_fraction", "dead_heldout", "kl_spliced", "ev_legacy", "l2_ratio", "density"} < set(numbers)
        scores = numbers["attributes"]["cursing"]
        assert 0 <= scores["feature"] < 256 and 0 < scores["f1"] <= 1 and 0 <= scores["auroc"] <= 1
        folder = Path("out/sae", site)
        model_sha256 = record["inputs"]["model"]["sha256"]
        check_sae(folder, model_sha256, 32)
        assert record["outputs"]["sae"][site] == {"path": f"sae/{site}", "sha256": sae_sha256(folder)}
        assert load_sae(folder).metadata["saerl"]["model_sha256"] == model_sha256
    lines = read_jsonl(Path("out/metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, *range(5, 51, 5)]
    assert lines[-1]["mlp_out.1/fvu"] < lines[0]["mlp_out.1/fvu"]
    assert record["result"] == pytest.approx(sum(n["fvu"] for n in summary["saes"].values()) / 2)
    before = Path("out/summary.json").stat().st_mtime_ns
    assert saerl("train-sae", *WORDS, "hydra.run.dir=out").returncode == 0
    assert Path("out/summary.json").stat().st_mtime_ns == before  # completed: nothing is done again


def test_a_trivial_site_is_warned_about(tmp_path, capfd, tiny_planted_model):
    job.work(tiny(site=SiteConfig(names=["mlp_out.0"])), Run(tmp_path), ACCELERATOR)
    assert "warning: mlp_out.0 sees the current token alone" in capfd.readouterr().err
    assert read_json(tmp_path / "summary.json")["saes"]["mlp_out.0"]["trivial"] is True


@pytest.mark.parametrize("norm", list(DecoderNorm))
def test_relu_saes_are_saved_as_standard(tmp_path, tiny_planted_model, norm):
    config = tiny(sae=SaeConfig(**SIZES, architecture=Architecture.relu, decoder_norm=norm, l1=0.5, lr=5e-3))
    job.work(config, Run(tmp_path), ACCELERATOR)
    sae = load_sae(tmp_path / "sae" / "mlp_out.1")
    assert sae.architecture == "standard"
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(256), atol=1e-5)
    assert read_json(tmp_path / "summary.json")["saes"]["mlp_out.1"]["fvu"] < 1


# --- refusals --------------------------------------------------------------------------------------------------------


def text_file(folder: Path, name: str, content: str) -> DataConfig:
    (folder / name).write_text(content)
    return DataConfig(kind=DataKind.text, path=str(folder / name))


def local(folder: Path) -> ModelConfig:
    return ModelConfig(kind=ModelKind.local, path=str(folder))


SHORT = "".join(json.dumps({"text": "we saw the film ."}) + "\n" for _ in range(20))
REFUSALS = {
    "unknown site": (lambda m, t: {"site": SiteConfig(names=["mlp_side.1"])}, "unknown site|no module"),
    "layer": (lambda m, t: {"site": SiteConfig(names=["mlp_out.2"])}, "layer 2 is out of range"),
    "glob": (lambda m, t: {"site": SiteConfig(names=["mlp_out.9*"])}, "no site matches"),
    "k": (lambda m, t: {"sae": SaeConfig(expansion=1, k=33, batch_size=64)}, "sae.k=33 exceeds d_sae=32"),
    "context": (lambda m, t: {"data": DataConfig(context_size=65)}, "exceeds the model's context of 64"),
    "planted text too short": (lambda m, t: {"data": DataConfig(max_documents=3)}, "less than one batch"),
    "no model": (lambda m, t: {"model": local(t / "none")}, "no such folder"),
    "no weights": (lambda m, t: {"model": local(without(m, t, "model.safetensors"))}, "no safetensors weights"),
    "no tokenizer": (lambda m, t: {"model": local(without(m, t, "tokenizer.json"))}, "has no tokenizer"),
    "planted data": (lambda m, t: {"model": local(m)}, "data=planted belongs to model=planted"),
    "no file": (lambda m, t: {"data": DataConfig(kind=DataKind.text, path=str(t / "x.txt"))}, "x.txt"),
    "empty": (lambda m, t: {"data": text_file(t, "a.txt", "\n\n")}, "holds no text"),
    "malformed": (lambda m, t: {"data": text_file(t, "a.jsonl", '{"text": "a"}\n{"text": \n')}, "a.jsonl line 2"),
    "no key": (lambda m, t: {"data": text_file(t, "a.jsonl", '{"story": "a"}\n')}, "story"),
    "one document": (lambda m, t: {"data": text_file(t, "a.txt", "a b c")}, "one document"),
    "short text": (lambda m, t: {"model": local(m), "data": text_file(t, "a.jsonl", SHORT)}, "less than one batch of"),
    "hub": (lambda m, t: {"model": ModelConfig(kind=ModelKind.hub, name="EleutherAI/pythia-0m")}, "model=planted and"),
    "processes": (
        lambda m, t: {"sae": SaeConfig(batch_size=1, tokens=10), "launch": LaunchConfig(num_processes=2, cpu=True)},
        "less than a token for each",
    ),
}


def without(model: Path, folder: Path, name: str) -> Path:
    copy = shutil.copytree(model, folder / "copy")
    (copy / name).unlink()
    return copy


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_in_one_line(name, tmp_path, tiny_planted_model):
    changes, message = REFUSALS[name]
    config = tiny(**changes(tiny_planted_model, tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        job.check(config)
    assert "\n" not in str(error.value)


def test_checks_accept_what_works_without_importing_torch(tmp_path, tiny_planted_model):
    (tmp_path / "a.jsonl").write_text(SHORT * 100)
    code = f"""
import sys
from saerl_cli.config.groups import *
from saerl_cli.config.sae import Architecture, DecoderNorm, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.jobs.train_sae import check
check(TrainSaeConfig())
model = ModelConfig(kind=ModelKind.local, path={str(tiny_planted_model)!r})
data = DataConfig(kind=DataKind.text, path={str(tmp_path / "a.jsonl")!r})
check(TrainSaeConfig(model=model, data=data))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"PYTHONPATH": str(job.__file__).split("/saerl_cli/")[0]},
    )


# --- crashes ---------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_planted_model):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    job.work(tiny(), Run(folder), ACCELERATOR)
    return folder


@pytest.mark.parametrize("after", [0, 3, 10, 37, 50])
def test_a_crashed_run_continues_to_the_bit(tmp_path, monkeypatch, whole, after):
    """Crash right after step `after`: before and after the first checkpoint, on one, and before the evaluation."""
    broken = tmp_path
    from saerl_cli.sae import loop

    real = loop.training

    def crashing(*arguments):
        for done, metrics in real(*arguments):
            yield done, metrics
            if done == after:
                raise Crash
        raise Crash

    def crash_at_once(*arguments):
        raise Crash
        yield

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop, "training", crashing if after else crash_at_once)
        job.work(tiny(), Run(broken), ACCELERATOR)
    job.work(tiny(), Run(broken), ACCELERATOR)
    assert equal(whole, broken)
    assert (whole / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()
    assert [step for step, _ in Run(broken).checkpoints()] == [50]
    numbers = [read_json(run / "summary.json")["saes"]["mlp_out.1"] for run in (whole, broken)]
    for timed in ("seconds", "tokens_per_second"):
        assert all(n.pop(timed) > 0 for n in numbers)
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(saerl, tiny_planted_model):
    words = ["train-sae", *(w for w in WORDS if "sae.tokens" not in w), "sae.tokens=256000", "sae.lr=1e-2"]

    assert saerl(*words, "hydra.run.dir=whole").returncode == 0
    for lines in (2, 100):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*TRUE, *words, "hydra.run.dir=killed"], start_new_session=True, **quiet)
        deadline = time.monotonic() + 240
        while len(read_jsonl(Path("killed/metrics.jsonl"))) < lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = saerl(*words, "hydra.run.dir=killed")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stderr
    assert equal(Path("whole"), Path("killed"))
    assert Path("whole/metrics.jsonl").read_text() == Path("killed/metrics.jsonl").read_text()


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize(
    "architecture", ["topk", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relu_unit", "matryoshka"))]
)
def test_two_processes_train_what_one_does(saerl, tiny_planted_model, architecture):
    """The same batch split over two processes; sums are taken in another order, so bits may differ, digits not.

    Means over 256 tokens of numbers that went through products of width 32 and 256: sqrt(256 + 256 + 32) 2^-24 = 1.4e-6
    of their terms, 1e-5 of which the first step is given. Twenty steps of Adam at lr 1e-3 move a weight by 0.02 at
    most, one whose gradient is a hundredth of its terms by 0.02 x 1.4e-4 = 3e-6 otherwise, or one of a feature that
    fires for one token more, a 256th, by 0.02 / 256 = 8e-5.
    """
    words = [
        *WORDS,
        f"sae={architecture}",
        "sae.tokens=5120",
        "sae.dead_after_tokens=500",
        "sae.resample_every_tokens=1280",
    ]
    for launch in ("one", "cpu_2"):
        done = saerl("train-sae", *words, f"launch={launch}", f"hydra.run.dir={launch}")
        assert done.returncode == 0, done.stderr
    first, second = weights(Path("one")), weights(Path("cpu_2"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=2e-4), name
    numbers = [read_json(Path(folder, "summary.json"))["saes"]["mlp_out.1"] for folder in ("one", "cpu_2")]
    for key in ("fvu", "l0", "ce_base", "ce_spliced", "ce_zero", "tokens_heldout", "dead_fraction"):
        assert numbers[0][key] == pytest.approx(numbers[1][key], rel=1e-3, abs=1e-4), key
    metrics = [read_jsonl(Path(folder, "metrics.jsonl")) for folder in ("one", "cpu_2")]
    assert [line["step"] for line in metrics[0]] == [line["step"] for line in metrics[1]]
    assert metrics[0][0]["mlp_out.1/fvu"] == pytest.approx(metrics[1][0]["mlp_out.1/fvu"], rel=1e-5)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["neox_stories_nano", "stories260k"])
def test_real_models_of_two_families(tmp_path, shared_data, name):
    data = DataConfig(kind=DataKind.text, path=str(shared_data / "tinystories" / "stories.jsonl"), context_size=128)
    sae = SaeConfig(tokens=60_000, batch_size=512, lr=1e-2)
    config = tiny(model=local(shared_data / name), data=replace(data, max_documents=200), sae=sae)
    config = replace(config, site=SiteConfig(names=["mlp_out.1", "mlp_out.3"]), eval_tokens=4000)
    job.check(config)
    mean_fvu = job.work(config, Run(tmp_path), ACCELERATOR)
    numbers = read_json(tmp_path / "summary.json")["saes"]
    assert mean_fvu < 0.35
    for site in numbers.values():
        assert site["ce_base"] < site["ce_spliced"] < site["ce_mean"]
        assert 0.6 < site["ce_recovered"] < 1
        assert "attributes" not in site
