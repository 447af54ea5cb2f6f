"""An adapter, and a reward, are one entry each: every command takes a new one, or says clearly why not."""

import shutil
from pathlib import Path

import pytest
import torch
from test_rl_adapter_job import SHORT
from test_rl_job import do, evaluate, settings
from typer.testing import CliRunner

from saerl_cli.cli import app
from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.compare import CompareConfig
from saerl_cli.config.reward import RewardConfig, RewardPart
from saerl_cli.jobs import compare, rlhf
from saerl_cli.jobs.report import report
from saerl_cli.models import resolve_sites
from saerl_cli.rewards.kinds import KINDS, Kind, of_text
from saerl_cli.rewards.score import check_reward
from saerl_cli.rl.adapters import ADAPTERS, Adapter, adapter_of
from saerl_cli.rl.export import export_policy
from saerl_cli.rl.policy import load_policy
from saerl_cli.run.directory import Run
from saerl_cli.run.help import settings_help

TOY = ("adapter.kind=layer_scale", "adapter.lr=5e-3", *SHORT)


def layer_scales(adapter, loaded, saes):
    """One factor a layer, on its output."""
    from saerl_cli.adapter import VectorConfig

    sites = resolve_sites(["resid_post.*"], loaded.model)
    return VectorConfig(task_type="CAUSAL_LM", kind="scale", widths={site.module: 1 for site in sites})


def refuse_nothing(*_):
    pass


@pytest.fixture(scope="module", autouse=True)
def entries():
    """The two entries that a person would write."""
    patch = pytest.MonkeyPatch()
    toy = Adapter(check=refuse_nothing, peft_config=layer_scales, sites=["resid_post.*"])
    patch.setitem(ADAPTERS, "layer_scale", toy)
    shortness = Kind(check=refuse_nothing, build=lambda *_: of_text(lambda text: -float(len(text))))
    patch.setitem(KINDS, "shortness", shortness)
    yield
    patch.undo()


def toy_settings(*more: str):
    config = settings(None, *TOY, *more)
    config.reward = RewardConfig(parts={"short": RewardPart(kind="shortness")})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A finished run of both."""
    rlhf.check(toy_settings())
    return do(tmp_path_factory.mktemp("toy") / "run", toy_settings())


def test_it_is_trained_and_evaluated(trained, tmp_path):
    summary = trained.read_summary()
    assert (summary["adapter"], summary["trainable_parameters"]) == ("layer_scale", 2)
    assert summary["frozen_unchanged"] is True and summary["reward_before"] < 0
    again = evaluate(trained.path, tmp_path / "evaluated")
    assert again["adapter"] == "layer_scale"
    assert again["nll_heldout_after"] == pytest.approx(summary["nll_heldout_after"], abs=1e-6)


def test_it_is_exported_or_refused_by_name(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    export_policy(trained.path, "model", tmp_path / "model")
    policy, ids = load_policy(trained.path).model, torch.arange(2, 22)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(model(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)
    assert "import saerl_cli.adapter" in export_policy(trained.path, "peft", tmp_path / "peft")
    with pytest.raises(ValueError, match="has no coefficients of features; write --to peft or --to model"):
        export_policy(trained.path, "compact", tmp_path / "compact")


def test_it_is_reported_compared_and_planned(trained, tmp_path):
    page = report([trained.path], tmp_path / "page.html").read_text()
    assert "layer_scale" in page
    config = CompareConfig(runs=[str(trained.path)])
    compare.check(config)
    planned = CliRunner().invoke(app, ["plan", "rlhf", *TOY[:2], "launch.cpu=true", "--no-probe", "--json"])
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize("command", ["features", "audit"])
def test_what_needs_features_refuses_it(trained, command):
    from importlib import import_module

    from saerl_cli.run.jobs import JOBS, resolve

    config = resolve(JOBS[command].schema)(policy=str(trained.path))
    with pytest.raises(ValueError, match="adapter=layer_scale, which has no coefficients of features"):
        import_module(f"saerl_cli.jobs.{command}").check(config)


def test_help_lists_their_options(tmp_path, monkeypatch):
    from saerl_cli.run import help as help_text
    from saerl_cli.run.configs import conf_dir

    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "adapter" / "layer_scale.yaml").write_text("kind: layer_scale\n")
    (tmp_path / "conf" / "reward" / "shortness.yaml").write_text("parts:\n  short:\n    kind: shortness\n")
    monkeypatch.setattr(help_text, "conf_dir", lambda: tmp_path / "conf")
    text = settings_help("rlhf")
    assert "| layer_scale |" in text and "| shortness |" in text


def test_every_option_has_an_entry():
    from omegaconf import OmegaConf

    from saerl_cli.run.configs import conf_dir

    options = {file.stem: OmegaConf.load(file).kind for file in (conf_dir() / "adapter").glob("*.yaml")}
    assert options == {name: name for name in ADAPTERS if name != "layer_scale"}
    files = [OmegaConf.load(file) for file in (conf_dir() / "reward").glob("*.yaml")]
    assert {part.kind for file in files for part in file.parts.values()} == KINDS.keys() - {"shortness"}


def test_a_forgotten_entry_is_named():
    with pytest.raises(ValueError, match=r"there is no adapter.kind=new; there are bias_only, .* an entry in saerl"):
        adapter_of(AdapterConfig(kind="new"))
    with pytest.raises(ValueError, match=r"parts.a: there is no kind=new; there are count, .* an entry in saerl"):
        check_reward(RewardConfig(parts={"a": RewardPart(kind="new")}))


def test_a_forgotten_part_is_named():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'peft_config'"):
        Adapter(check=refuse_nothing)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="has both saes and count"):
        Adapter(check=refuse_nothing, peft_config=layer_scales, saes=lambda *_: {"mlp_out.1": Path()})
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'build'"):
        Kind(check=refuse_nothing)  # pyright: ignore[reportCallIssue]


def test_checks_before_work_load_no_torch():
    import subprocess
    import sys

    code = "import sys, saerl_cli.rl.adapters, saerl_cli.rewards.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
