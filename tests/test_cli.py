"""The command line itself: help, completion, showing configs, listing runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saerl_cli.rewards.kinds import KINDS
from saerl_cli.run import bridge
from saerl_cli.run.files import write_json
from saerl_cli.run.jobs import JOBS

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "matplotlib")
COMMANDS = (
    "demo",
    "train-lm",
    "train-sae",
    "eval-sae",
    "train-reward",
    "rlhf",
    "evaluate",
    "features",
    "audit",
    "compare",
    "export",
    "report",
    "reproduce",
    "plan",
    "runs",
    "completion",
)


def imported(*words: str, **env: str) -> set[str]:
    """Top-level packages that a command loads."""
    command = [sys.executable, "-X", "importtime", "-m", "saerl_cli.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    return {line.split("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "import time" in line}


def test_help_lists_every_command(saerl):
    shown = saerl("--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert [command for command in COMMANDS if re.search(rf"^  {command} ", shown.stdout, re.M)] == list(COMMANDS)
    assert saerl().stdout == shown.stdout


@pytest.mark.parametrize("words", [["--help"], ["rlhf", "--help"], ["runs"], ["train-sae", "--cfg", "job"]])
def test_nothing_heavy_is_imported(empty_place, words):
    loaded = imported(*words)
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_completing_loads_nothing_heavy(empty_place):
    completing = {"_SAERL_COMPLETE": "complete_bash", "COMP_WORDS": "saerl rlhf model=", "COMP_CWORD": "2"}
    loaded = imported(**completing)
    assert "hydra" in loaded
    assert not loaded & set(HEAVY)


def test_help_is_quick(empty_place):
    """0.3 s is promised; of CPU time here, because other tests share the machine, and the best of several."""
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "saerl_cli.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(spent)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", JOBS)
def test_help_of_a_command_lists_its_settings_with_their_docstrings(saerl, name):
    from saerl_cli.run.jobs import resolve
    from saerl_cli.run.refusals import settings

    shown = saerl(name.replace("_", "-"), "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    for key in settings(resolve(JOBS[name].schema)):
        assert f" {key}" in text
    assert not re.search(r"^  \S+=\S*( \(.*\))?: *$", shown.stdout, re.M), "a setting without a docstring"
    assert "-m key=1,2" in shown.stdout


def test_groups_and_nested_settings_are_in_the_help(saerl):
    shown = saerl("rlhf", "--help").stdout
    assert re.search(r"model=hub \| local \| planted \| pythia-14m \| .*pythia-12b", " ".join(shown.split()))
    assert "algo.kl_coef=0.05 (> 0): beta" in shown
    kinds = " ".join(shown.split()).split("reward.parts.NAME.kind=: ")[1].split(" reward.parts.NAME.weight=")[0]
    assert all(f"{kind} (" in kinds for kind in KINDS)


@pytest.mark.parametrize("name", JOBS)
def test_every_root_composes_and_is_shown(saerl, name):
    shown = saerl(name.replace("_", "-"), "--cfg", "job")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "seed" in shown.stdout or name in ("train_lm", "compare")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_composes(path):
    words = {"hub": ["model.name=a/b"], "local": ["model.path=x"]}.get(path.stem, [])
    config = composed("train_sae", [f"model={path.stem}", *words])
    if path.stem.startswith("pythia-"):
        assert (config.model.kind.value, config.model.name) == ("hub", f"EleutherAI/{path.stem}")


@pytest.mark.parametrize(
    "name, word",
    [
        (name, f"{folder.name}={file.stem}")
        for folder in sorted((ROOT / "conf").iterdir())
        if folder.is_dir() and folder.name not in ("model", "experiment", "pipeline", "local", "hydra")
        for file in sorted(folder.glob("*.yaml"))
        for name in (["train_sae"] if folder.name in ("site", "sae") else ["rlhf"])
    ],
)
def test_every_option_of_a_group_composes(name, word):
    needs = {
        "data=text": ["data.path=x"],
        "data=hub": ["data.name=a/b"],
        "adapter=sparse_coeffs": ["adapter.saes=x"],
        "adapter=random_dictionary": ["adapter.saes=x"],
        "reward=lexicon": ["reward.parts.lexicon.path=x"],
        "reward=hf": ["reward.parts.model.path=x"],
        "reward=python": ["reward.parts.function.function=a:b"],
        # what the checks write for -1, on a machine with as many GPUs
        **{f"launch={option}": ["launch.num_processes=2"] for option in ("gpu", "fsdp2")},
    }
    composed(name, [word, *needs.get(word, [])])


def composed(name: str, words: list[str]):
    """The typed settings that words stand for."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from saerl_cli.config import typed
    from saerl_cli.run.configs import conf_dir, register_schema
    from saerl_cli.run.jobs import resolve

    register_schema(name)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(name, words)
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return typed(cfg, resolve(JOBS[name].schema))


@pytest.mark.parametrize(
    "words, kind",
    [
        ([], "full"),
        (["--sparse-coeffs"], "sparse_coeffs"),
        (["seed=1", "--sparse-coeffs", "adapter.splice=reconstruct"], "sparse_coeffs"),
        (["--sparse-coeffs", "adapter=full"], "full"),
    ],
)
def test_the_flag_is_an_override_and_the_users_own_wins(saerl, words, kind):
    shown = saerl("rlhf", *words, "--cfg", "job")
    assert f"adapter:\n  kind: {kind}" in shown.stdout, shown.stderr


def test_parts_that_the_user_names_are_added_with_their_words():
    config = composed("rlhf", ["reward.parts={manners:{kind:planted,attribute:polite,weight:0.5}}"])
    assert {name: part.weight for name, part in config.reward.parts.items()} == {"cursing": -1.0, "manners": 0.5}
    lexicon = composed("rlhf", ["reward=lexicon", "reward.parts.lexicon.words={happy: 1.0, sad: -1}"])
    assert lexicon.reward.parts["lexicon"].words == {"happy": 1.0, "sad": -1.0}


def test_a_site_may_be_written_as_a_place(saerl):
    shown = saerl("train-sae", "site=[mlp_out.1,resid_post.2]", "--cfg", "job", "-p", "site")
    assert "names:\n- mlp_out.1\n- resid_post.2" in shown.stdout


def test_the_slurm_preset_composes(saerl):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    shown = saerl("rlhf", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    assert "max_num_timeout: 3" in shown.stdout, shown.stderr


def test_users_add_configs_of_their_own(saerl):
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/toy.yaml").write_text("kind: hub\nname: me/toy\n")
    shown = saerl("train-sae", "--config-dir", "mine", "model=toy", "--cfg", "job")
    assert "name: me/toy" in shown.stdout, shown.stderr


# --- runs and report -------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_status_numbers_and_resume_command(saerl):
    assert saerl("runs").stdout == "no runs in runs\n"
    facts = {"job": "rlhf", "started": "2026-01-02T03:04:05.678+00:00"}
    for name, status in (("a", "completed"), ("b", "failed"), ("c", "running")):
        folder = Path("runs/rlhf", name)
        folder.mkdir(parents=True)
        command = f"saerl rlhf hydra.run.dir={folder}"
        write_json(folder / "run.json", facts | {"status": status, "command": command, "error": None})
    write_json(Path("runs/rlhf/a/summary.json"), {"adapter": "full", "reward_after": -0.123456, "top_features": []})
    listed = saerl("runs")
    assert (listed.returncode, listed.stderr) == (0, "")
    text = re.sub(" +", " ", listed.stdout)
    assert "completed rlhf 2026-01-02T03:04 runs/rlhf/a\n adapter full, reward_after -0.1235\n" in text
    assert "failed rlhf 2026-01-02T03:04 runs/rlhf/b\n resume: saerl rlhf hydra.run.dir=runs/rlhf/b\n" in text
    assert "killed rlhf 2026-01-02T03:04 runs/rlhf/c\n resume: saerl rlhf hydra.run.dir=runs/rlhf/c\n" in text


def test_ctrl_c_ends_a_watch_with_the_list(empty_place, monkeypatch, capsys):
    from saerl_cli import cli
    from saerl_cli.run import watching

    def interrupted(folders: list[Path]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "watch", interrupted)
    monkeypatch.setattr("sys.argv", ["saerl", "runs", "--watch"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code or 0, capsys.readouterr().out) == (0, "no runs in runs\n")


def test_what_is_no_run_is_refused_by_report_and_runs(saerl):
    for words, says in ((["report", "nowhere"], "there is no folder"), (["runs", "nowhere"], "there is no folder")):
        refused = saerl(*words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("saerl: ")
        assert says in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, typed_so_far, expected",
    [
        ("rlhf", "model=", "model=pythia-70m"),
        ("rlhf", "algo.kl", "algo.kl_coef="),
        ("train_sae", "sae=", "sae=topk"),
        ("train_sae", "site=", "site=resid_post"),
    ],
)
def test_completion(name, typed_so_far, expected):
    assert expected in bridge.complete(name, ["seed=1"], typed_so_far)


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed_so_far, expected",
    [
        ("saerl train-s", "train-sae"),
        ("saerl train-sae model=pythia-31", "model=pythia-31m"),
        ("saerl train-sae seed=1 sae.expan", "sae.expansion="),
    ],
)
def test_tab_in_bash(tmp_path, empty_place, typed_so_far, expected):
    import pexpect

    (tmp_path / "saerl").write_text(f"#!{sys.executable}\nfrom saerl_cli.cli import main\nmain()\n")
    (tmp_path / "saerl").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb"}
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env=env, encoding="utf8", dimensions=(40, 160))
    try:
        shell.expect(r"\$ ")
        shell.sendline('eval "$(saerl completion bash)"; echo rea""dy')
        shell.expect("ready")
        shell.expect(r"\$ ")
        shell.send(typed_so_far + "\t")
        shell.expect(re.escape(expected))
    finally:
        shell.close(force=True)
