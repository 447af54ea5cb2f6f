"""A new architecture is one file: every command takes what it trains."""

import textwrap

import pytest
from conftest import TINY_PLANTED
from test_rl_job import settings
from test_sae_runs import SIZES, trained

import saerl_cli.sae.architectures as package
from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.features import FeaturesConfig
from saerl_cli.config.sae import Architecture, SaeConfig
from saerl_cli.jobs import eval_sae, features, rlhf
from saerl_cli.sae.architectures import parts_of
from saerl_cli.sae.evaluate import measure_saes
from saerl_cli.sae.export import export_saes
from saerl_cli.sae.files import load_sae

TOY = '''
"""ReLU whose loss is the absolute error, with no penalty."""

from saerl_cli.sae.architectures import relu, topk
from saerl_cli.sae.architectures.common import Outcome, linear_gradients, pre_activations
from saerl_cli.sae.layout import Dense

SAVED_AS = "standard"
penalty_weight, further_parameters, fold, unfold = topk.penalty_weight, relu.further_parameters, relu.fold, relu.unfold


def loss(p, batch, config, weight):
    layout = Dense()
    f = pre_activations(p, batch, config.encoder_dtype).relu()
    error = f @ p["decoder"] + p["b_dec"] - batch.y
    g = error.sign() / batch.tokens
    gradients, into = linear_gradients(batch, layout, f, layout.dot(g, p["decoder"]) * (f > 0), g)
    return Outcome(error, layout.count(f > 0), error.new_zeros(()), gradients, into)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The name in `Architecture`, and the folder of the file."""
    name = "absolute"
    member = object.__new__(Architecture)
    member._name_ = member._value_ = name
    monkeypatch.setitem(Architecture._member_map_, name, member)
    monkeypatch.setitem(Architecture._value2member_map_, name, member)
    monkeypatch.setattr(Architecture, "_member_names_", [*Architecture._member_names_, name])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, f"{package.__name__}.{name}", raising=False)
    yield member, tmp_path / f"{name}.py"
    __import__("sys").modules.pop(f"{package.__name__}.{name}", None)


def test_a_forgotten_file_or_part_is_named(toy):
    architecture, file = toy
    with pytest.raises(NotImplementedError, match=r"has no file saerl_cli/sae/architectures/absolute\.py"):
        parts_of(architecture)
    file.write_text(TOY.replace("def loss(", "def lost(").replace(", unfold = ", ", other = "))
    with pytest.raises(NotImplementedError, match=r"architectures/absolute\.py lacks loss, unfold: see"):
        parts_of(architecture)


def test_a_new_architecture_is_trained_and_used(toy, tmp_path, tiny_planted_model):
    architecture, file = toy
    file.write_text(textwrap.dedent(TOY))
    with pytest.raises(ValueError, match="sae.l1 does nothing with sae.architecture=absolute"):
        SaeConfig(architecture=architecture, l1=1.0)
    run = tmp_path / "run"
    numbers = trained(run, sae=SaeConfig(**SIZES, architecture=architecture, expansion=4))["mlp_out.1"]
    assert numbers["architecture"] == "absolute" and numbers["fvu"] < 0.9
    sae = load_sae(run / "sae" / "mlp_out.1")
    assert sae.architecture == "standard" and sae.metadata["saerl"]["training"]["architecture"] == "absolute"
    again = SaeConfig(**SIZES | {"lr": 1e-9}, architecture=architecture, expansion=4, init_from=str(run))
    assert trained(tmp_path / "again", sae=again)["mlp_out.1"]["fvu"] == pytest.approx(numbers["fvu"], rel=1e-3)
    place = {"model": {"kind": "planted", "planted": TINY_PLANTED}, "data": {"kind": "planted"}}
    config = EvalSaeConfig(saes=str(run), eval_tokens=300, probe_tokens=300, controls=True, control_tokens=512, **place)
    eval_sae.check(config)
    measured = measure_saes(config, "cpu")  # the controls are trained by it too
    assert {numbers["architecture"] for numbers in measured.saes.values()} == {"absolute"}
    assert "mlp_out.1/real" in measured.controls
    features.check(FeaturesConfig(saes=str(run), **place))
    rlhf.check(settings(run))
    assert "standard" in export_saes(str(run), "dictionary_learning", tmp_path / "out")[0]
    with pytest.raises(ValueError, match="sparsify has topk alone"):
        export_saes(str(run), "sparsify", tmp_path / "other")
