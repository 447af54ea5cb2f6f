"""Every experiment composes by the command in its header and has its evidence."""

import json
import re
import shlex

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from saerl_cli.config import typed
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


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_definition_has_a_card(path):
    number = path.stem[:3]
    assert any(card.parent.name.startswith(f"{number}-") for card in CARDS)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_card_is_complete_and_its_numbers_are_in_its_results(card):
    text = card.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(HEADINGS)
    results = json.loads((card.parent / "results.json").read_text())
    assert {"hardware", "versions", "commit", "runs"} <= results.keys()
    assert all("seed" in run for run in results["runs"])
    index = (ROOT / "experiments" / "README.md").read_text()
    assert f"({card.parent.name}/README.md)" in index
