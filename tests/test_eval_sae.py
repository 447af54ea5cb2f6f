"""saerl eval-sae as a whole: the command, what it finds, what it refuses, what it writes."""

import csv
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from eval_sae_runs import SETTINGS, make_run, tiny_model
from safetensors.torch import load_file

from saerl_cli import cli
from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.sae import Architecture
from saerl_cli.jobs import eval_sae
from saerl_cli.report import saes as report
from saerl_cli.report import text
from saerl_cli.run.files import read_json, write_json
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.evaluate import SaeResults, list_saes, measure_saes, settings
from saerl_cli.sae.files import CONFIG_FILE, load_sae, save_sae
from saerl_cli.sae.metrics import evaluate_saes


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_planted_model) -> Path:
    """Three SAEs of one site, as a sweep leaves them: two seeds and another architecture."""
    settings = {
        "mlp_out.1-k4-seed0": SETTINGS,
        "mlp_out.1-k4-seed1": replace(SETTINGS, seed=1),
        "mlp_out.1-relu": replace(SETTINGS, architecture=Architecture.relu, l1=0.5, k=16),
    }
    return make_run(tmp_path_factory.mktemp("saes") / "run", settings)


@pytest.fixture
def here(run, empty_place) -> Path:
    """A copy of the run, `saes` in an empty working directory."""
    return Path(shutil.copytree(run, "saes"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_command_measures_every_sae_of_a_run(saerl, here):
    done = saerl("eval-sae", "saes=saes", "controls=true", "control_tokens=2000", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    summary, record = read_json(Path("out/summary.json")), read_json(Path("out/run.json"))
    names = ["mlp_out.1-k4-seed0", "mlp_out.1-k4-seed1", "mlp_out.1-relu"]
    assert list(summary["saes"]) == names
    for name, numbers in summary["saes"].items():
        assert (numbers["site"], numbers["d_in"], numbers["d_sae"]) == ("mlp_out.1", 32, 128)
        assert 0 < numbers["fvu"] < 1 and numbers["beats_mean"] is True
        for key in ("fvu", "l0", "ce_recovered", "kl_spliced", "cosine"):
            assert numbers[f"{key}_se"] >= 0
        assert record["inputs"]["sae"][name]["path"] == f"saes/sae/{name}"
    assert summary["saes"]["mlp_out.1-relu"]["architecture"] == "relu"
    assert record["result"] == summary["fvu_mean"] == pytest.approx(sum(n["fvu"] for n in summary["saes"].values()) / 3)
    # mlp_out has no other layer here that is not trivial, so no wrong layer
    assert list(summary["controls"]) == [f"{name}/{kind}" for name in names for kind in ("real", "shuffled", "random")]
    for name, numbers in summary["controls"].items():
        assert numbers["of"] == name.rpartition("/")[0]
        assert name.endswith("/shuffled") or numbers["fvu"] > summary["saes"][numbers["of"]]["fvu"]
    assert summary["controls"]["mlp_out.1-relu/random"]["l0"] == pytest.approx(
        summary["saes"]["mlp_out.1-relu"]["l0"], rel=0.2
    )
    (pair,) = summary["stability"][:1]
    assert pair["saes"] == names[:2] and pair["seeds"] == [0, 1]
    assert len(summary["stability"]) == 3
    assert set(summary["probes"]["saes"]) == set(names) and set(summary["probes"]["activations"]) == {"mlp_out.1"}
    # the table on the terminal
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "SAE",
        "site",
        "architecture",
        "width",
        "L0",
        "FVU",
        "CE",
        "recovered",
        "KL",
        "dead",
        "gamma",
    ]
    fvu = summary["saes"][names[0]]
    assert f"{fvu['fvu']:.4f} ± {fvu['fvu_se']:.4f}" in lines[1]
    # the files
    with Path("out/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [*summary["saes"], *summary["controls"]]
    assert float(rows[0]["fvu_se"]) == fvu["fvu_se"]
    for name in ("l0_fvu", "l0_ce_recovered", "density"):
        assert ET.parse(f"out/figures/{name}.svg").getroot().tag.endswith("svg")
        assert Path(f"out/figures/{name}.csv").read_text().count("\n") > 3
    rates = load_file("out/firing_rates.safetensors")
    assert set(rates) == set(names)
    for name, rate in rates.items():
        assert float(rate.sum()) == pytest.approx(summary["saes"][name]["l0"], rel=1e-5)
    page = Path("out/report.html").read_text()
    assert page.count("<svg") == 3 and "src=" not in page and "<script" not in page
    # a completed run is left alone
    before = Path("out/summary.json").stat().st_mtime_ns
    assert saerl("eval-sae", "saes=saes", "controls=true", "control_tokens=2000", "hydra.run.dir=out").returncode == 0
    assert Path("out/summary.json").stat().st_mtime_ns == before


def test_the_numbers_are_those_of_the_library(run):
    """The job adds nothing of its own: its metrics are `evaluate_saes` on the first held-out rows."""
    from saerl_cli.activations import special_ids, token_rows
    from saerl_cli.data.documents import documents
    from saerl_cli.models import resolve_sites
    from saerl_cli.sae.metrics import first_rows

    config = EvalSaeConfig(saes=str(run), eval_tokens=500, probe_tokens=500)
    found = measure_saes(config, torch.device("cpu"))
    loaded, special = tiny_model(), special_ids(tiny_model().tokenizer)
    model, data = settings(config, list_saes([run]))
    rows = first_rows(token_rows(documents(data, model, "heldout"), loaded.tokenizer, 64), special, 500)
    saes = {name: load_sae(path) for name, path in list_saes([run]).items()}
    expected = evaluate_saes(loaded.model, resolve_sites(["mlp_out.1"], loaded.model), saes, rows, special)
    for name, numbers in found.saes.items():
        assert 500 <= numbers["tokens_heldout"] < 600
        for key in ("fvu", "fvu_se", "ce_recovered", "ce_recovered_se", "l0", "max_cosine", "rare_cluster"):
            assert numbers[key] == expected[name][key], key


def test_an_sae_that_is_worse_than_the_mean_is_said_to_be(here, capfd, monkeypatch):
    folder = here / "sae" / "mlp_out.1-relu"
    sae = load_sae(folder)
    sae.W_dec.mul_(-1)
    save_sae(sae, folder)
    words = ["eval-sae", f"saes={folder}", "eval_tokens=500", "probe_tokens=500", "hydra.run.dir=out"]
    monkeypatch.setattr("sys.argv", ["saerl", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    numbers = read_json(Path("out/summary.json"))["saes"]["mlp_out.1-relu"]
    assert numbers["fvu"] >= 1 and numbers["beats_mean"] is False
    assert re.search(r"mlp_out.1-relu: FVU \d+\.\d+ >= 1, so that it is worse than the mean", capfd.readouterr().err)
    assert "worse than the mean" in Path("out/report.html").read_text()


def test_a_labelled_file_is_probed(here):
    lines = [{"text": text, "label": label} for text, label in [("i loved it", "good"), ("i hated it", "bad")] * 80]
    Path("labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = EvalSaeConfig(saes=str(here), eval_tokens=300, probes="labels.jsonl")
    probes = measure_saes(config, torch.device("cpu")).probes
    assert probes["kind"] == "documents" and set(probes["labels"]) == {"good", "bad"}
    assert probes["examples"] == {"train": 128, "test": 32}
    assert probes["activations"]["mlp_out.1"]["good"]["all"]["auroc"] == 1.0


def test_a_transcoder_is_measured_at_what_it_predicts(run, tmp_path):
    """Through the whole job, controls included: an exact one is exact; of the controls none is defined here."""
    loaded = tiny_model()
    exact = SAE(128, 256, d_out=32)
    dense = loaded.model.get_submodule("gpt_neox.layers.1.mlp.dense_4h_to_h")
    exact.W_enc.copy_(torch.cat([torch.eye(128), -torch.eye(128)], dim=1))
    exact.W_dec.copy_(torch.cat([dense.weight.T, -dense.weight.T]))
    exact.b_dec.copy_(dense.bias)
    exact.site, exact.target = "mlp_hidden.1", "mlp_out.1"
    save_sae(exact, tmp_path / "run" / "sae" / "transcoder")
    shutil.copytree(run / ".hydra", tmp_path / "run" / ".hydra")
    config = EvalSaeConfig(saes=str(tmp_path / "run"), eval_tokens=500, probe_tokens=1500, controls=True)
    eval_sae.check(config)
    found = measure_saes(config, torch.device("cpu"))
    numbers = found.saes["transcoder"]
    assert (numbers["site"], numbers["target"], numbers["d_in"]) == ("mlp_hidden.1", "mlp_out.1", 128)
    assert numbers["fvu"] < 1e-6 and numbers["ce_recovered"] == pytest.approx(1, abs=1e-3)
    assert found.controls == {}
    assert set(found.probes["activations"]) == {"mlp_hidden.1"}  # what it reads
    report.write_results(found, tmp_path, config)
    exact.target = "mlp_hidden.1"  # another width
    save_sae(exact, tmp_path / "run" / "sae" / "transcoder")
    with pytest.raises(ValueError, match="has d_out=32, but mlp_hidden.1 128"):
        eval_sae.check(config)


# --- what is found ---------------------------------------------------------------------------------------------------


def sae_folders(*names: str) -> None:
    for name in names:
        Path(name).mkdir(parents=True)
        Path(name, CONFIG_FILE).write_text("{}")


def test_saes_are_found_and_named_by_their_folders(empty_place):
    sae_folders("runs/a/sae/mlp_out.1", "runs/b/sae/mlp_out.1", "runs/b/sae/mlp_out.2", "mine/x", "mine/.x.partial.1")
    assert list(list_saes(["runs/b"])) == ["mlp_out.1", "mlp_out.2"]
    assert list(list_saes(["runs/b/sae"])) == ["mlp_out.1", "mlp_out.2"]
    assert list_saes(["runs/b/sae/mlp_out.2"]) == {"mlp_out.2": Path("runs/b/sae/mlp_out.2")}
    assert list(list_saes(["mine"])) == ["x"]
    both = {
        "a/mlp_out.1": "runs/a/sae/mlp_out.1",
        "b/mlp_out.1": "runs/b/sae/mlp_out.1",
        "b/mlp_out.2": "runs/b/sae/mlp_out.2",
    }
    assert list_saes(["runs"]) == list_saes(["runs/a", "runs/b"]) == {name: Path(path) for name, path in both.items()}
    assert list(list_saes(["runs/a", "runs/a"])) == ["mlp_out.1"]  # named twice, measured once


def test_model_and_text_are_those_of_the_run_unless_given(run, empty_place):
    folders = list_saes([run])
    model, data = settings(EvalSaeConfig(saes=str(run)), folders)
    assert model.planted.hidden_size == 32 and (data.kind.value, data.heldout) == ("planted", 0.1)
    changed = EvalSaeConfig(saes=str(run), model={"dtype": "bfloat16"}, data={"heldout": 0.2})
    model, data = settings(changed, folders)
    assert (model.planted.hidden_size, model.dtype.value, data.heldout) == (32, "bfloat16", 0.2)
    chosen = EvalSaeConfig(saes=str(run), model={"kind": "local", "path": "x"}, data={"kind": "text", "path": "y"})
    model, data = settings(chosen, folders)
    assert (model.kind.value, model.planted.hidden_size, data.path) == ("local", 128, "y")  # nothing of the record
    alone = {"x": Path(shutil.copytree(next(iter(folders.values())), "x"))}
    with pytest.raises(ValueError, match="no run directory that records their data; write data=…"):
        settings(EvalSaeConfig(saes="x", model={"kind": "planted"}, data={"heldout": 0.2}), alone)
    assert settings(chosen, alone)[1].path == "y"


# --- refusals --------------------------------------------------------------------------------------------------------


def changed(folder: Path, **values: object) -> None:
    """Change metadata.saerl of the first SAE."""
    path = folder / "sae" / "mlp_out.1-k4-seed0" / CONFIG_FILE
    config = read_json(path)
    config["metadata"]["saerl"] |= values
    write_json(path, config)


def labels(text: str):
    return lambda folder: Path("labels.jsonl").write_text(text)


GOOD = '{"text": "a", "label": "x"}\n'
REFUSALS = {
    "": ("saes has no value; write saes=…", None),
    "saes=nowhere": ("no SAEs at nowhere: no such folder", None),
    "saes=[]": ("saes must be a folder or a list of folders", None),
    "saes=3": ("saes must be a folder or a list of folders", None),
    "saes=empty": ("no SAEs in empty: expected a run directory", lambda folder: Path("empty").mkdir()),
    "saes=[saes,nowhere]": ("no SAEs at nowhere", None),
    "saes=saes eval_tokens=0": ("eval_tokens must be >= 1, got 0", None),
    "saes=saes model=planted": ("was trained on other weights", "default_model"),
    "saes=saes ": ("was trained on other weights (planted", lambda folder: changed(folder, model_sha256="0" * 64)),
    "saes=saes  ": ("layer 7 is out of range", lambda folder: changed(folder, site="mlp_out.7", module="x")),
    "saes=saes   ": ("but mlp_out.1 of this model is", lambda folder: changed(folder, module="elsewhere")),
    "saes=saes probes=labels.jsonl": ("probes=labels.jsonl does not exist", None),
    "saes=saes probes=labels.jsonl ": ("labels.jsonl line 2 is not JSON", labels(GOOD + "{nope\n")),
    "saes=saes probes=labels.jsonl  ": ("labels.jsonl line 2 is no", labels(GOOD + '{"text": "b"}\n')),
    "saes=saes probes=labels.jsonl   ": ("holds 1 labels; probing needs two", labels(GOOD * 3)),
    "saes=saes controls=true control_tokens=100": ("control_tokens=100 is less than one batch of 256", None),
    "saes=saes controls=true": (
        "cannot train controls for the SAE",
        lambda folder: changed(folder, training={"kk": 1}),
    ),
    "saes=saes data.heldout=0.9": ("data.heldout must be in (0, 0.5]", None),
    "saes=saes data.heldoutt=0.2": ("data.heldoutt", None),
    "saes=saes model.planted.hidden=2": ("model.planted.hidden", None),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refused_before_any_work(words, here, monkeypatch, capfd):
    says, needs = REFUSALS[words]
    if callable(needs):
        needs(here)
    elif needs == "default_model":  # another planted model, without training it
        monkeypatch.setattr(eval_sae, "known_sha256", lambda model: "1" * 64)
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr("sys.argv", ["saerl", "eval-sae", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    line = capfd.readouterr().err
    assert end.value.code == 2, line
    assert line.startswith("saerl: ") and line.count("\n") == 1 and "Traceback" not in line
    assert says in line
    assert sorted(Path().rglob("*")) == before


def test_a_check_imports_no_torch(here, saerl):
    import os
    import subprocess

    code = (
        "import sys; from saerl_cli.config.eval_sae import EvalSaeConfig; from saerl_cli.jobs.eval_sae import check;"
        "check(EvalSaeConfig(saes='saes', controls=True)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


# --- table, figures, page --------------------------------------------------------------------------------------------


class Text(HTMLParser):
    """The text of a page and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_names_cannot_break_the_page_or_the_figures(run, tmp_path):
    config = EvalSaeConfig(saes=str(run), eval_tokens=300, probe_tokens=2000)
    found = measure_saes(config, torch.device("cpu"))
    nasty = "<script>alert(1)</script> $a_{b$ & _c"
    plain = json.dumps({key: getattr(found, key) for key in ("saes", "controls", "stability", "probes", "inputs")})
    renamed = json.loads(
        plain.replace("mlp_out.1-relu", nasty).replace('"architecture": "relu"', '"architecture": "$x_{"')
    )
    report.write_results(SaeResults(**renamed), tmp_path, config)
    page = Text()
    page.feed((tmp_path / "report.html").read_text())
    assert "script" not in page.tags
    assert any(nasty in text for text in page.text)
    for path in (tmp_path / "figures").glob("*.svg"):
        ET.parse(path)
    assert nasty in "".join(ET.parse(tmp_path / "figures" / "density.svg").getroot().itertext())


def test_columns_are_aligned():
    lines = text.aligned([["SAE", "site", "kind", "L0"], ["a", "mlp_out.1", "topk", "8.0 ± 0.1"]], words=3).splitlines()
    assert lines == ["SAE  site       kind         L0", "a    mlp_out.1  topk  8.0 ± 0.1"]
    assert text.cell({"l0": 8.04, "l0_se": 0.11}, "l0", "{:.1f}") == "8.0 ± 0.1"
    assert text.cell({"dead": 0.25}, "dead", "{:.1%}") == "25.0%"
    assert text.cell({}, "dead", "{:.1%}") == "–"


def test_points_of_a_frontier_keep_controls_at_the_site_of_their_sae():
    sae = {
        "site": "mlp_out.1",
        "architecture": "topk",
        "d_sae": 64,
        "l0": 4.0,
        "l0_se": 0.1,
        "fvu": 0.2,
        "fvu_se": 0.01,
    }
    moved = sae | {"site": "mlp_out.3", "control": "wrong_layer", "of": "a", "fvu": 2.0}
    wide = sae | {"d_sae": 128}
    first, second, third = report.points({"a": sae, "a/wrong_layer": moved, "b": wide}, "fvu")
    assert (first["site"], first["control"], first["value"], first["value_se"]) == ("mlp_out.1", None, 0.2, 0.01)
    assert (second["site"], second["control"], second["value"]) == ("mlp_out.1", "wrong_layer", 2.0)
    assert [first["group"], third["group"]] == ["topk 64", "topk 128"]  # two widths are two lines
    assert report.comparable({"x": {"control": "shuffled"}, "y": {}}) == {"y": {}}


def test_a_control_that_does_as_well_is_reported():
    sae = {"site": "mlp_out.1", "trivial": False, "beats_mean": True, "l0": 4.0, "fvu": 0.3, "fvu_se": 0.03}
    controls = {f"a/{kind}": sae | {"fvu": fvu} for kind, fvu in (("random", 0.35), ("real", 0.31), ("shuffled", 0.1))}
    random, shuffled = report.warnings({"a": sae}, controls)
    assert random == "a: random directions reconstruct as well (FVU 0.350 at L0 4.0, the SAE 0.300 at 4.0)"
    assert "its like on shuffled weights reconstructs as well (FVU 0.100, on real ones 0.310)" in shuffled
    clear = {"a/random": sae | {"fvu": 0.9}, "a/real": sae, "a/shuffled": sae | {"fvu": 0.8}}
    assert report.warnings({"a": sae}, clear) == report.warnings({"a": sae}, {}) == []
    assert (
        "mlp_out.0 sees the current token alone"
        in report.warnings({"a": sae | {"trivial": True, "site": "mlp_out.0"}}, {})[0]
    )
