"""Every experiment composes by the command in its header and has its evidence; the index says what the cards say."""

import json
import re
import shlex

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from saerl_cli.config import typed
from saerl_cli.config.renamed import translate
from saerl_cli.run.configs import conf_dir, register_schema
from saerl_cli.run.jobs import JOBS, resolve

DEFINITIONS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
CARDS = sorted((ROOT / "experiments").glob("[0-9]*/README.md"))
HEADINGS = (
    *("Question", "Claim", "Command", "Result", "Controls and baselines"),
    *("What would change our mind", "Cost", "Deviations and failures"),
)


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_header_command_composes(path):
    header = path.read_text().splitlines()[1]
    words = shlex.split(header.removeprefix("# "))
    assert words[0] == "saerl"
    assert f"experiment={path.stem}" in words
    name = words[1].replace("-", "_")
    overrides = ["adapter=sparse_coeffs" if word == "--sparse-coeffs" else word for word in words[2:]]
    register_schema(name)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        typed(compose(name, overrides), resolve(JOBS[name].schema))


def results_of(card):
    return json.loads((card.parent / "results.json").read_text())


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_definition_has_a_card(path):
    """One of its number, or one that lists it: a card may cover several sizes of one experiment."""
    own = [card for card in CARDS if card.parent.name.startswith(f"{path.stem[:3]}-")]
    assert own or any(path.stem in results_of(card).get("definitions", []) for card in CARDS)


def test_cards_list_definitions_that_exist():
    listed = {name for card in CARDS for name in results_of(card).get("definitions", [])}
    assert listed <= {path.stem for path in DEFINITIONS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_card_is_complete_and_its_numbers_are_in_its_results(card):
    text = card.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(HEADINGS)
    results = results_of(card)
    assert {"hardware", "versions", "commit", "runs"} <= results.keys()
    assert all("seed" in run for run in results["runs"])


# --- the index -------------------------------------------------------------------------------------------------------

COLUMNS = ("card", "question", "result", "seeds", "hardware", "cost, core-hours", "commit", "status")
VERDICTS = ("holds", "works", "fails", "claim fails", "not resolved", "defined, not run")
"""How a status begins."""
RENAMED = {"algo.kl_horizon": "algo.kl_gain", "sae.buffer_tokens": "activations.buffer_tokens"}
"""Settings that resolved configs of older cards still have; in CHANGELOG.md."""


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def index() -> dict[str, dict[str, str]]:
    """Rows of the table of experiments/README.md, by folder of the card."""
    text = (ROOT / "experiments" / "README.md").read_text()
    lines = [line for line in text.partition("\n\n## ")[0].splitlines() if line.startswith("|")]
    assert tuple(cells(lines[0])) == COLUMNS
    rows = [dict(zip(COLUMNS, cells(line), strict=True)) for line in lines[2:]]
    return {re.findall(r"\(([^/]+)/README\.md\)", row["card"])[0]: row for row in rows}


def facts(results: dict) -> dict[str, str]:
    """The cells that follow from results.json; a dash where nothing was run."""
    commits = [results["commit"]] if isinstance(results["commit"], str) else results["commit"] or []
    more = f" +{len(commits) - 1}" if len(commits) > 1 else ""
    hours, hardware = results.get("core_hours"), results["hardware"] or ""
    cores = re.match(r"(\d+) cores", hardware)
    return {
        "hardware": f"{cores[1]} CPU cores" if cores else hardware.partition(";")[0] or "–",
        "cost, core-hours": "–" if hours is None else f"{hours:g}",
        "commit": commits[0][:7] + more if commits else "–",
        "status": results["status"],
    }


def test_the_index_has_every_card_once_in_order():
    assert list(index()) == [card.parent.name for card in CARDS]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_index_says_what_the_card_says(card):
    row = index()[card.parent.name]
    results = json.loads((card.parent / "results.json").read_text())
    assert {key: row[key] for key in facts(results)} == facts(results)
    assert row["question"].endswith("?")
    assert row["result"] and row["status"].startswith(VERDICTS)
    if results["status"].startswith("defined, not run"):  # it says so wherever a result would stand, and claims none
        assert results["runs"] == [] and row["seeds"] == "–"
        assert card.read_text().split("## Result\n")[1].startswith("**Not run.**")
        return
    assert results["runs"]
    text = card.read_text()
    known = set(re.findall(r"\d[\d,.]*\d|\d", text))
    known |= {f"{float(number.replace(',', '')):.0f}" for number in known if number.count(".") == 1}  # 92.4 as 92
    missing = [n for n in re.findall(r"\d[\d,.]*\d|\d", row["result"]) if n not in known]
    assert not missing, f"the card does not have {missing}"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_index_names_the_cards_without_settings(card):
    text = (ROOT / "experiments" / "README.md").read_text()
    named = re.findall(r"\d{3}", text.partition("Without a `config.yaml`:")[2].partition(", benchmarks whose")[0])
    assert (card.parent / "config.yaml").is_file() == (card.parent.name[:3] not in named)


@pytest.mark.parametrize(
    "card", [c for c in CARDS if (c.parent / "config.yaml").is_file()], ids=lambda c: c.parent.name
)
def test_the_resolved_settings_of_a_card_still_compose(card):
    """Every setting of config.yaml exists today, in the command that it belongs to."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(card.parent / "config.yaml")
    if "words" in cfg or "fixed" in cfg:  # the words of a measurement, which its own script composes
        return
    cfg = OmegaConf.create(translate(OmegaConf.to_container(cfg)))
    for key in RENAMED:
        group, name = key.split(".")
        if group in cfg and name in cfg[group]:
            del cfg[group][name]
    job = next(name for key, name in (("policy", "audit"), ("algo", "rlhf"), ("sae", "train_sae")) if key in cfg)
    typed(cfg, resolve(JOBS[job].schema))
