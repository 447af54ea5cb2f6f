"""The commands of the README and of every `--help` compose, and those of the walk-through run (small)."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from conftest import ROOT, TINY_WORDS
from hydra import compose, initialize_config_dir

from saerl_cli.cli import app
from saerl_cli.config import typed
from saerl_cli.run.configs import conf_dir, register_schema
from saerl_cli.run.examples import examples
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.words import expand_sites, split_words, sweep_points

README = (ROOT / "README.md").read_text()
SMALL = {
    "train-lm": TINY_WORDS,
    "train-sae": [*TINY_WORDS, "sae.tokens=20_000", "activations.buffer_tokens=8192", "eval_tokens=2_000"],
    "rlhf": [*TINY_WORDS, "algo.phases=2", "evaluation.samples=16", "checkpoint_every=1"],
    "evaluate": ["evaluation.samples=16"],
    "eval-sae": ["eval_tokens=2_000", "probe_tokens=2_000", "control_tokens=4_096"],
}


ABOUT_SAES = {
    "sweep=[{k:[8,16,32]},{sae:relu,l1:[2,5]},{sae:jumprelu,seed:[0,1]}]",
    *("sae=newhouse2023", "site.names=[mlp_in.1]", "sae.init_from=runs/saes", "controls=true", "dictionary_learning"),
}
"""A word of each command about SAEs that a test runs."""
HELP = (ROOT / "saerl_cli" / "run" / "examples.md").read_text()


def commands(text: str) -> list[list[str]]:
    """Words of every `saerl` line in a text's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "saerl"]


def section(text: str, start: str) -> str:
    """A text from a heading, or from the words of a paragraph, to the next heading or bold word."""
    return re.split(r"\n(?:## |\*\*)", text.split(start)[1])[0]


EVERY = {" ".join(words): words for words in [*commands(README), *commands(HELP)]}


@pytest.mark.parametrize("words", [w for w in EVERY.values() if w[0].replace("-", "_") in JOBS], ids=" ".join)
def test_every_command_composes(words):
    name, rest = words[0].replace("-", "_"), [w for w in words[1:] if w != "--sparse-coeffs"]
    sugar = ["adapter=sparse_coeffs"] if "--sparse-coeffs" in words else []
    flags, overrides = split_words([*sugar, *rest])
    register_schema(name)
    overrides = expand_sites(overrides, conf_dir(), "-m" in flags)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for point in sweep_points(overrides) if "-m" in flags else [overrides]:
            if "--cfg" not in flags:
                typed(compose(name, point), resolve(JOBS[name].schema))


@pytest.mark.parametrize("words", [w for w in EVERY.values() if w[0].replace("-", "_") not in JOBS], ids=" ".join)
def test_every_other_command_is_understood(words):
    """Commands without a root config: their words are theirs, and those that a plan is asked for compose."""
    command = typer.main.get_command(app).commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if words[0] == "plan":
        sparse = ["--sparse-coeffs"] if context.params["sparse_coeffs"] else []
        test_every_command_composes([context.params["command"], *sparse, *context.params["overrides"]])
        test_every_command_composes(["train-sae", *shlex.split(context.params["sae"])])


def test_the_help_of_a_command_ends_with_its_examples(saerl):
    assert list(examples()) == [name for name in typer.main.get_command(app).commands if name != "completion"]
    for name, text in examples().items():
        mine = commands(section(HELP, f"\n## saerl {name}\n"))
        assert mine and any(words[0] == name for words in mine)
        for words in mine:
            assert re.search(rf"^  saerl {re.escape(words[0])}\b", text, re.M)
    shown = saerl("plan", "--help").stdout
    assert "\n    saerl plan eval-sae saes=runs/later controls=true --sae 'site=mlp_out.2'\n" in shown


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= targets


def test_the_list_of_files_is_the_package():
    listed = set(re.findall(r"^  ([a-z_]+(?:\.py|/)) ", README, re.MULTILINE))
    package = {p.name + "/" * p.is_dir() for p in (ROOT / "saerl_cli").iterdir() if not p.name.startswith(("_", "."))}
    assert listed == package - {"py.typed"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_walk_through_runs(saerl, empty_place):
    for words in commands(section(README, "The same as commands")):
        done = saerl(*words, *SMALL.get(words[0], []))
        assert done.returncode == 0, (words, done.stderr)
    assert "sparse_coeffs" in Path("runs/report.html").read_text()


@pytest.mark.slow
def test_the_commands_about_saes_run(saerl, empty_place):
    assert saerl("train-sae", *SMALL["train-sae"], "hydra.run.dir=runs/saes").returncode == 0
    planted = [words for words in commands(HELP) if words[0] != "plan" and set(words) & ABOUT_SAES]
    assert len(planted) == len(ABOUT_SAES)
    for words in planted:
        done = saerl(*words, *SMALL.get(words[0], []))
        assert done.returncode == 0, (words, done.stderr)
    assert len(list(Path("runs/sweep/sae").iterdir())) == 7
    assert list(Path("runs").glob("eval_sae/**/report.html"))


@pytest.mark.slow
def test_the_demo_runs_and_resumes(saerl, empty_place):
    first = saerl("demo", "scale=small", "hydra.run.dir=runs/demo")
    assert first.returncode == 0, first.stderr
    assert "RLHF against cursing, on fresh prompts" in first.stdout
    page = Path("runs/demo/report.html").read_text()
    assert '"fires_on":' in page and '"behaviour":[{' in page  # feature cards, detectors
    for stage in ("train_lm", "train_sae", "sparse_coeffs", "full"):
        assert (Path("runs/demo") / stage / "summary.json").is_file()
    again = saerl("demo", "scale=small", "hydra.run.dir=runs/demo")
    assert again.returncode == 0
    assert "complete" in again.stderr + again.stdout


def test_what_to_write_to_add_something_is_said_where_the_readme_points():
    places = re.findall(r"^\| an? .*\]\((saerl_cli/.*/__init__\.py)\)", README, re.MULTILINE)
    assert len(places) == 4
    for place in places:
        assert "you write\n  1. " in (ROOT / place).read_text(), place
