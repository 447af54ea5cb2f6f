"""`saerl audit` of a tiny run: files, resuming, refusals; what kinds of features there are."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import test_rl_job
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from rl_fixtures import tiny_sae
from test_rl_job import do, settings

from saerl_cli.analysis.attribution import touched
from saerl_cli.analysis.audit import classify
from saerl_cli.config import typed
from saerl_cli.config.audit import AuditConfig
from saerl_cli.config.reward import RewardConfig, RewardPart
from saerl_cli.jobs import audit as job
from saerl_cli.rl.results import Audit
from saerl_cli.run.directory import Run
from saerl_cli.sae.files import load_sae, save_sae

saes, finished = test_rl_job.saes, test_rl_job.finished  # fixtures
FEW = ("evaluation.samples=8", "evaluation.heldout_tokens=400", "top=2", "pairs=1", "alphas=2", "draws=2")


def configured(policy: Path | str, *overrides: str) -> AuditConfig:
    words = OmegaConf.from_dotlist([f"policy={policy}", *FEW, *overrides])
    return typed(OmegaConf.merge(OmegaConf.structured(AuditConfig), words), AuditConfig)


def audited(policy: Path, path: Path, *overrides: str) -> dict:
    config = configured(policy, *overrides)
    job.check(config)
    path.mkdir(exist_ok=True)
    run = Run(path)
    run.start("audit", "saerl audit", config.seed)
    job.work(config, run, Accelerator(cpu=True))
    run.end("completed")
    return json.loads((path / "audit.json").read_text())


@pytest.fixture(scope="module")
def policy(finished, tmp_path_factory) -> Path:
    """A copy of the run that may be written into."""
    return Path(shutil.copytree(finished.path, tmp_path_factory.mktemp("policy") / "run"))


@pytest.fixture(scope="module")
def peer(saes, tmp_path_factory) -> Path:
    """The same with another seed."""
    return do(tmp_path_factory.mktemp("peer") / "run", settings(saes, "seed=1")).path


@pytest.fixture(scope="module")
def found(policy, peer, tmp_path_factory) -> Path:
    """The run directory of an audit."""
    path = tmp_path_factory.mktemp("audit")
    audited(policy, path, f"peers=[{peer}]", "features.ids=[mlp_out.1:3]")
    return path


# --- what it writes --------------------------------------------------------------------------------------------------


def test_an_audit_writes_everything_its_docstring_names(found, policy):
    numbers = json.loads((found / "audit.json").read_text())
    assert numbers == json.loads((policy / "audit.json").read_text()), "the report finds it beside the policy"
    assert numbers["features"].items() >= {"total": 128, "touched": 128}.items() and numbers["prompts"] == 8
    gain = numbers["gain"]
    assert gain["gain_se"] > 0 and numbers["curves"]["keep"][-1]["gain"] == gain["gain"], "all kept is the policy"
    assert gain["loss_increase"] == pytest.approx(gain["loss"] - gain["loss_reference"])
    attributions = [value for site in numbers["attributions"].values() for value in site]
    assert len(attributions) == 128
    assert numbers["completeness"]["attributed"] == pytest.approx(sum(attributions), abs=1e-2)
    curves = numbers["curves"]
    assert [p["n"] for p in curves["keep"]][:4] == [1, 2, 3, 4] and curves["keep"][-1]["n"] == 128
    assert (
        curves["keep"][-1]["gain"] == pytest.approx(gain["gain"]) == pytest.approx(curves["keep_by_effect"][-1]["gain"])
    )
    assert curves["remove"][-1]["gain"] == 0, "nothing left is the reference, to the bit"
    assert all(point["n"] < 128 for name in ("keep_random", "keep_matched") for point in curves[name])
    for group in numbers["shares"].values():
        assert sum(entry["features"] for entry in group.values()) == 128
        assert sum(e["attribution"] for e in group.values()) == pytest.approx(numbers["completeness"]["attributed"])
    assert set(numbers["shares"]) == {"by_kind", "by_place", "by_direction", "by_role", "by_attribute"}
    first = max(attributions)
    assert numbers["reverts"][0]["attribution"] == pytest.approx(first, rel=1e-3)
    assert {("mlp_out.1", 3)} <= {(row["site"], row["feature"]) for row in numbers["reverts"]}
    assert len(numbers["reverts"]) in (2, 3) and len(numbers["pairs"]) == 1


def test_what_was_drawn_is_there_as_numbers(found):
    for name in ("keep_only", "attribution"):
        assert all((found / f"{name}{end}").stat().st_size > 0 for end in (".svg", ".png", ".csv"))
    numbers = json.loads((found / "audit.json").read_text())
    rows = list(csv.DictReader((found / "keep_only.csv").read_text().splitlines()))
    assert len(rows) == sum(map(len, numbers["curves"].values()))
    assert len((found / "reverts.csv").read_text().splitlines()) == 1 + len(numbers["reverts"])
    summary = Run(found).read_summary()
    assert summary["gain"] == numbers["gain"]["gain"] and len(summary["agreement"]) == 1
    assert {"n50", "n90", "n99", "share_rewarded", "kl_per_gain", "seconds"} <= summary.keys()


def test_a_peer_is_compared(found, policy, peer):
    from saerl_cli.adapter.files import read_deltas
    from saerl_cli.analysis.audit.agreement import spearman

    (numbers,) = json.loads((found / "audit.json").read_text())["peers"]
    own, other = read_deltas(policy / "adapter"), read_deltas(peer / "adapter")
    assert numbers["seed"] == 1
    assert {site: n["delta"] for site, n in numbers["sites"].items()} == {s: spearman(own[s], other[s]) for s in own}
    assert all(n["top"] == 6 and n["top_expected"] == 6 / 64 for n in numbers["sites"].values())
    assert "attribution" not in numbers, "the peer has not been audited"


def test_killed_and_run_again_it_ends_with_the_same_numbers(found, policy, peer, tmp_path, monkeypatch):
    words = (f"peers=[{peer}]", "features.ids=[mlp_out.1:3]")
    lines = (found / "variants.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "variants.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    drawn = []
    from saerl_cli.analysis.audit.variants import Variants

    rewards = Variants._rewards
    monkeypatch.setattr(Variants, "_rewards", lambda self: drawn.append(1) or rewards(self))
    again = audited(policy, tmp_path / "again", *words)
    assert again == json.loads((found / "audit.json").read_text())
    assert 0 < len(drawn) < len(lines) - 5, "some were there already"


# --- refusals --------------------------------------------------------------------------------------------------------


def changed(source: Path, target: Path, **keys) -> Path:
    """A copy of a run whose run.json says something else."""
    shutil.copytree(source, target)
    record = json.loads((target / "run.json").read_text()) | keys
    (target / "run.json").write_text(json.dumps(record))
    return target


def test_what_cannot_be_audited_is_refused(policy, peer, saes, tmp_path):
    def refused(message: str, path: Path, *words: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            job.check(configured(path, *words))
        assert "\n" not in str(caught.value)

    refused("is not a run directory", tmp_path)
    refused("is failed; finish it first", changed(policy, tmp_path / "failed", status="failed"))
    refused("is running; finish it first", changed(policy, tmp_path / "running", status="running"))
    refused("is a run of `saerl evaluate`; give one of", changed(policy, tmp_path / "other", job="evaluate"))
    half = changed(policy, tmp_path / "half")
    shutil.rmtree(half / "adapter")
    refused("has no adapter folder: the run has not finished", half)
    full = changed(policy, tmp_path / "full")
    text = (full / ".hydra" / "config.yaml").read_text()
    config = settings(None)
    OmegaConf.save(OmegaConf.structured(config), full / ".hydra" / "config.yaml")
    refused("trained adapter=full, which has no coefficients of features; give a run of", full)
    (full / ".hydra" / "config.yaml").write_text(text + "\nnewer: 1\n")
    refused("is not a config of `saerl rlhf`", full)
    refused(
        "features.ids: mlp_out.1:64: the SAE of mlp_out.1 has the features 0 to 63",
        policy,
        "features.ids=[mlp_out.1:64]",
    )
    refused("there is no SAE of mlp_out.7; there are mlp_out.0, mlp_out.1", policy, "features.ids=[mlp_out.7:1]")
    refused("is neither SITE:FEATURE nor SITE:FIRST-LAST", policy, "features.ids=[curses]")
    refused("peers: .* is the policy itself", policy, f"peers=[{policy}]")
    refused("is not a run directory", policy, f"peers=[{tmp_path}]")
    other = tmp_path / "saes"
    shutil.copytree(saes, other)
    sae = load_sae(other / "mlp_out.1")
    sae.W_dec.data[0] *= 2
    shutil.rmtree(other / "mlp_out.1")
    save_sae(sae, other / "mlp_out.1")
    trained = do(tmp_path / "trained", settings(other, "seed=1")).path
    refused("peers: .* was trained on other SAEs than", policy, f"peers=[{trained}]")
    shutil.rmtree(other)
    refused("no SAE for mlp_out.0; put the folder", trained)


def test_a_policy_that_has_not_moved_is_refused(policy, tmp_path):
    from safetensors.torch import load_file, save_file

    still = changed(policy, tmp_path / "still")
    file = still / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="all coefficients of .* are untouched: there is nothing to revert"):
        job.check(configured(still))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("top=0", "top must be >= 1"),
        ("pairs=-1", "pairs must be >= 0"),
        ("alphas=0", "alphas must be >= 1"),
        ("draws=1", "draws must be >= 2"),
        ("f1=2", r"f1 must be in \[0, 1\]"),
        ("evaluation.samples=4", "evaluation.samples must be >= 8 for an audit"),
    ],
)
def test_settings_out_of_range_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        configured("run", word)


def test_the_command_refuses_in_one_line_and_leaves_nothing(saerl, policy, empty_place):
    refused = saerl("audit", f"policy={policy}", "features.ids=[mlp_out.1:99]", "hydra.run.dir=refused")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "features 0 to 63" in refused.stderr
    assert not (empty_place / "refused").exists()


@pytest.mark.slow
def test_the_command(saerl, policy, empty_place, found):
    done = saerl("audit", f"policy={policy}", *FEW, "launch.cpu=true", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "attributed" in done.stdout and "reverted: reward" in done.stdout
    assert "the gain" in done.stderr
    record = Run(empty_place / "out").record
    assert record["job"] == "audit" and record["inputs"]["policy"] == str(policy)
    numbers = json.loads((empty_place / "out" / "audit.json").read_text())
    before = json.loads((found / "audit.json").read_text())
    assert numbers["curves"] == before["curves"], "in a process of its own, the same to the bit"


# --- kinds of features -----------------------------------------------------------------------------------------------


class Words:
    """A stand-in tokenizer: one token a word."""

    vocabulary = ("<eos>", "damn", "the", "was", ".", "7", "film", "\n")
    eos_token_id = bos_token_id = pad_token_id = 0
    all_special_ids = (0,)

    def __call__(self, text: str) -> dict:
        return {"input_ids": []}

    def decode(self, ids, **_) -> str:
        return self.vocabulary[ids[0]]

    def __len__(self) -> int:
        return len(self.vocabulary)


def fired(pairs: list[tuple[int, int, float]], rows: list[list[int]], features: int) -> classify.Firing:
    rows_ = torch.tensor(rows)
    token, feature, value = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return classify.Firing(rows_, rows_ != 0, token, feature, value.float(), torch.ones(features))


def test_kinds_by_hand():
    rows = [[0, 3, 1, 6, 4, 2, 6, 7], [0, 5, 3, 1, 6, 6, 6, 4]]
    # text tokens: was damn film . the film \n | 7 was damn film film film .
    pairs = [(1, 0, 2.0), (9, 0, 1.0), (10, 0, 0.5), (0, 1, 1.0), (8, 1, 1.0), (3, 2, 1.0), (7, 3, 1.0), (6, 4, 1.0)]
    pairs += [(2, 5, 1.0), (0, 5, 1.0), (3, 5, 1.0)]
    found = fired(pairs, rows, 7)
    names = classify.token_kinds(found, Words(), [1])
    assert names[:5] == ["rewarded", "function word", "punctuation", "number", "newline"]
    assert names[5] in ("mixed", "position") and names[6] == "silent"
    places = classify.places(found, [1])
    # damn follows 2 of 14 tokens, and 1 of the 3 on which feature 5 fires: 2.3 times as often.
    assert places == ["on", "before", "elsewhere", "elsewhere", "elsewhere", "before", "elsewhere"]
    assert classify.fires_on(found, Words(), [0]) == {0: ["damn", "film"]}
    dense = found.dense(range(1, 3))
    assert dense.shape == (14, 2) and dense.nonzero().tolist() == [[0, 0], [3, 1], [8, 0]]


def test_position_is_a_correlation_with_the_log_of_the_place():
    rows = [[0] + [6] * 9] * 4
    place = torch.arange(1, 10).double().log().repeat(4)
    pairs = [(i, 0, float(v)) for i, v in enumerate(place) if v > 0] + [(i, 1, 1.0) for i in range(36)]
    found = fired(pairs, rows, 2)
    assert classify.position_correlation(found, Words()).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert classify.token_kinds(found, Words(), []) == ["position", "other word"]


def test_words_that_earn_something():
    def tokens(**part) -> list[int]:
        return classify.rewarded_tokens(RewardConfig({"x": RewardPart(**part)}), Words())

    assert tokens(kind="planted", attribute="cursing") == [1]
    assert tokens(kind="lexicon", words={"Film": 1.0, "damn": -1.0}) == [1, 6]
    assert tokens(kind="count", pattern="^w") == [3]
    assert tokens(kind="python", function="m:f") == [] == tokens(kind="planted", attribute="after_cursing")


def test_directions_are_weighed_against_the_vocabulary(policy, saes):
    """The closed form against logits written out."""
    from saerl_cli.analysis.features import logit_effect
    from saerl_cli.rl.policy import load_policy

    loaded = load_policy(policy)
    coefficients = touched(loaded.model)
    z = classify.writes(loaded, coefficients, [5, 9])
    sae = load_sae(tiny_sae(saes, "mlp_out.1"))
    base = loaded.model.get_base_model()
    for i in (64, 100):
        effect = logit_effect(base, "gpt_neox.layers.1.mlp", sae.W_dec[int(coefficients.feature[i])]).double()
        want = (effect[[5, 9]].mean() - effect.mean()) / effect.std(correction=0)
        assert float(z[i]) == pytest.approx(float(want), rel=1e-3)
    assert classify.direction_names(torch.tensor([1.2, -1.0, 0.4])) == ["towards", "away", "neither"]


def test_effects_are_what_features_write(policy):
    from saerl_cli.adapter.coefficients.deltas import site_layers
    from saerl_cli.rl.policy import load_policy

    loaded = load_policy(policy)
    coefficients = touched(loaded.model)
    rows = torch.randint(3, 200, (4, 20), generator=torch.Generator().manual_seed(0))
    found = classify.firing(loaded, coefficients, rows)
    assert int(found.text.sum()) == 80
    layer = site_layers(loaded.model)["mlp_out.1"]
    outputs = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with loaded.model.disable_adapter(), torch.no_grad():
        loaded.model(input_ids=rows)
    handle.remove()
    f = layer.sae.encode(outputs[0]).flatten(0, 1)  # [80, 64]
    here = coefficients.at("mlp_out.1")
    want = (f.mean(0) * layer.sae.W_dec.norm(dim=1))[coefficients.feature[here]] * coefficients.delta[here].abs()
    torch.testing.assert_close(found.effect[here], want, rtol=1e-4, atol=1e-7)
    first = int(here.nonzero()[0])
    assert torch.equal(found.dense(range(first, first + 64)), f), "what fires is what fired"


def test_roles():
    graded = [("cursing", 0.9), ("after_cursing", 0.6), ("polite", 0.8), ("cursing", 0.2)]
    assert classify.roles(graded, {"cursing"}, 0.5) == ["rewarded", "after rewarded", "other", "unassigned"]


def test_a_policy_that_may_not_be_written_to_is_audited_all_the_same(monkeypatch, capsys, tmp_path):
    def denied(path, value):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(job, "write_audit", denied)
    job.leave_beside(tmp_path, Audit())
    assert "has no audit.json for its report: Permission denied" in capsys.readouterr().err
