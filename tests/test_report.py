"""The report page, from run directories written by hand: what it holds, and what it says is missing."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from report_runs import (
    HOSTILE,
    behaviour,
    write_audit,
    write_evaluation,
    write_everything,
    write_failed,
    write_features,
    write_run,
)

from saerl_cli.analysis.behaviour import gold_parts, one_feature, proxy_and_gold
from saerl_cli.config.adapter import MOVED
from saerl_cli.report.collect import collect
from saerl_cli.report.content import TEXT, thin
from saerl_cli.report.page import embedded, write_report
from saerl_cli.rl.results import Audit


def data_of(page: Path) -> dict:
    """The JSON that a page shows."""
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)


def report(*paths: Path, out: Path) -> dict:
    return data_of(write_report(paths, out / "report.html"))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_stays_text(tmp_path):
    run = write_run(tmp_path / "a", warnings=[HOSTILE])
    text = write_report([run]).read_text()
    assert text.count("<script") == 2 and "<img" not in text  # the data and our own script
    assert "&lt;img src=x" in text  # the warning, escaped
    data = data_of(run / "report.html")
    assert data["samples"][0]["steps"][0]["rows"][0][1] == HOSTILE  # unharmed inside the JSON
    assert json.loads(embedded({"a": "<&>"})) == {"a": "<&>"} and "<" not in embedded({"a": "<&>"})


def test_nothing_is_fetched(tmp_path):
    text = write_report([write_everything(tmp_path / "all")]).read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert " src=" not in text.replace("img src=x onerror", "") and "@import" not in text and "url(" not in text


def test_a_run_that_a_constant_beats_is_labelled_at_the_top(tmp_path):
    run = write_run(tmp_path / "a")
    text = write_report([run]).read_text()
    assert text.index("Beaten by a constant.") < text.index("<main")
    assert data_of(run / "report.html")["numbers"]["rows"][0]["beaten"]
    good = write_run(tmp_path / "b", behaviour={}, warnings=[])
    assert "Beaten by a constant." not in write_report([good]).read_text().split("<main")[0]


def test_a_constant_that_wins_by_reward_alone_is_a_note(tmp_path):
    # as an earlier version wrote it down: the verdict by reward, and a sentence of that
    run = write_run(tmp_path / "a", behaviour=behaviour(empty_kl=12.0))
    head = write_report([run]).read_text().split("<main")[0]
    assert "Beaten by a constant." not in head and "a constant string gets reward" not in head
    assert head.count("a constant wins by reward alone: the empty completion") == 1 and 'class="note soft"' in head
    data = data_of(run / "report.html")
    assert not data["numbers"]["rows"][0]["beaten"] and not data["behaviour"][0]["beaten"]


def test_numbers_with_their_intervals_come_from_fresh_samples_where_there_are_some(tmp_path):
    run = write_run(tmp_path / "a")
    columns = {c["label"]: i for i, c in enumerate(report(run, out=tmp_path)["numbers"]["columns"])}
    table = report(run, out=tmp_path)["numbers"]["rows"][0]
    assert table["cells"][columns["reward"]] == [-0.25, pytest.approx(1.96 * 0.05), -1.5]
    assert table["measured"] == "end of training"
    write_evaluation(tmp_path / "e", run, reward=-0.1)
    table = report(run, tmp_path / "e", out=tmp_path)["numbers"]["rows"][0]
    assert table["cells"][columns["reward"]] == [-0.1, pytest.approx(1.96 * 0.04), -1.5]
    assert table["measured"] == "e, seed 1" and 60.0 in [cell[0] for cell in table["cells"]]  # seconds of training


def test_every_figure_is_saved_with_its_data(tmp_path):
    data = report(write_everything(tmp_path / "all"), out=tmp_path)
    for files in data["figures"].values():
        assert files
        for name in files:
            content = (tmp_path / name).read_text()
            assert content.startswith("<svg") if name.endswith(".svg") else len(content.splitlines()) >= 2
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"curves.svg", "frontier.svg", "features-sparse.svg", "audit-sparse.svg", "numbers.csv"} <= names
    frontier = rows(tmp_path / "figures" / "frontier.csv")
    assert [row["reward"] for row in frontier if row["what"] == "full"] == ["-0.4", "-0.1"]
    assert {"optimum", "best_of_n"} <= {row["what"] for row in frontier}
    curves = [row for row in rows(tmp_path / "figures" / "curves.csv") if row["run"] == "full"]
    assert [row["step"] for row in curves] == ["0", "16", "32", "48", "64"]


def test_features_are_listed_with_their_cards_first(tmp_path):
    run = write_run(tmp_path / "a", "sparse_coeffs")
    write_features(run, count=50, described=3)
    part = report(run, out=tmp_path)["features"][0]
    assert part["feature"][:3] == [0, 1, 2] and len(part["feature"]) == 50 and len(part["cards"]) == 3
    assert sorted(part["feature"]) == list(range(50)) and part["total"] == 50
    assert part["moved"] == sum(abs(d) > MOVED for d in part["delta"])


def test_an_audit_gives_its_curve_and_the_share_of_one_feature(tmp_path):
    run = write_run(tmp_path / "a", "sparse_coeffs")
    write_audit(tmp_path / "audit", run)
    data = report(run, tmp_path / "audit", out=tmp_path)
    assert data["audits"][0]["run"] == "sparse_coeffs" and data["audits"][0]["curves"]["keep"][-1]["share"] == 1
    found = data["behaviour"][0]["one_feature"]
    assert found["feature"] == 0 and found["share"] == pytest.approx(0.5 / 1.25)  # lost when it is reverted


def test_every_step_of_the_samples_is_kept(tmp_path):
    run = write_run(tmp_path / "a")
    assert [step["step"] for step in report(run, out=tmp_path)["samples"][0]["steps"]] == [0, 40, 80]


# --- which runs ------------------------------------------------------------------------------------------------------


def test_runs_are_called_by_adapter_unless_that_is_ambiguous(tmp_path):
    runs = [write_run(tmp_path / "x" / "s0", "full"), write_run(tmp_path / "x" / "l0", "lora")]
    assert [run.name for run in collect(runs)] == ["full", "lora"]
    again = write_run(tmp_path / "x" / "s1", "full", seed=1)
    found = collect([*runs, again])
    assert [run.name for run in found] == ["s0", "l0", "s1"]
    assert [run.group for run in found] == ["full", "lora", "full"]  # seeds of one method


def test_settings_that_differ_make_methods(tmp_path):
    runs = [write_run(tmp_path / name, "full") for name in ("a", "b")]
    (runs[1] / ".hydra" / "config.yaml").write_text("seed: 0\nadapter:\n  kind: full\n  lr: 0.3\n")
    assert [run.group for run in collect(runs)] == ["full lr=0.1", "full lr=0.3"]


def test_rewards_of_other_parts_are_told_apart_by_their_names(tmp_path):
    runs = [write_run(tmp_path / name, "full") for name in ("a", "b")]
    for run, part, weight in zip(runs, ("cursing", "cheer"), (-1.0, 2.0), strict=True):
        text = f"reward:\n  parts:\n    {part}: {{kind: lexicon, weight: {weight}}}\n"
        (run / ".hydra" / "config.yaml").write_text("seed: 0\nadapter:\n  kind: full\n" + text)
    assert [run.group for run in collect(runs)] == ["full reward=cursing", "full reward=cheer"]


def test_a_folder_stands_for_the_runs_in_it_and_a_run_for_its_policy(tmp_path):
    place = write_everything(tmp_path / "all")
    assert len(collect([place])) == 7
    assert {run.path.name for run in collect([place / "audit"])} == {"audit", "sparse"}
    assert len(collect([place, place / "full"])) == 7  # each once


def test_measurements_are_found_by_name_where_the_folders_were_moved(tmp_path):
    place = write_everything(tmp_path / "all")
    place = place.rename(tmp_path / "moved")
    evaluations = [run for run in collect([place]) if run.job == "evaluate"]
    assert sorted(run.name for run in evaluations) == ["full", "sparse"]


def test_a_copy_does_not_bring_its_original_in_twice(tmp_path):
    place = write_everything(tmp_path / "all")
    shutil.copytree(place, tmp_path / "copy")
    assert len(collect([tmp_path / "copy"])) == 7


def test_only_comparable_evaluations_share_a_frontier(tmp_path):
    place = write_everything(tmp_path / "all")
    assert [len(panel["series"]) for panel in report(place, out=tmp_path)["frontiers"]] == [2]
    summary = json.loads((place / "eval-full" / "summary.json").read_text())
    summary["measured"]["samples"] = 128
    (place / "eval-full" / "summary.json").write_text(json.dumps(summary))
    assert [len(panel["series"]) for panel in report(place, out=tmp_path)["frontiers"]] == [1, 1]


def test_seeds_of_a_method_get_a_mean(tmp_path):
    for seed, reward in ((0, -0.2), (1, -0.4)):
        run = write_run(tmp_path / f"s{seed}", seed=seed)
        write_evaluation(tmp_path / f"e{seed}", run, seed=seed, reward=reward)
    (panel,) = report(tmp_path, out=tmp_path)["frontiers"]
    assert panel["means"][0]["group"] == "full" and panel["means"][0]["points"][-1]["reward"] == pytest.approx(-0.3)


def test_a_report_only_reads(tmp_path):
    place = write_everything(tmp_path / "all")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    report(place, out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


# --- what is missing -------------------------------------------------------------------------------------------------


def missing(data: dict) -> str:
    return "\n".join(line["text"] for line in data["missing"])


def test_a_failed_run_says_where_and_why(tmp_path):
    data = report(write_failed(tmp_path / "a"), out=tmp_path)
    said = missing(data)
    assert "no samples.jsonl: the run failed at step 40: step 40: reward is NaN" in said
    assert f"continue with: saerl rlhf hydra.run.dir={tmp_path / 'a'}" in said
    assert data["curves"]["series"][0]["steps"] == [20, 40]  # what it left is shown
    assert "this run failed" in (tmp_path / "report.html").read_text().split("<main")[0]


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "samples.jsonl", ".hydra/config.yaml"])
def test_a_run_without_one_of_its_files_still_yields_a_page(tmp_path, name):
    run = write_run(tmp_path / "a")
    (run / name).unlink()
    data = report(run, out=tmp_path)
    assert name.startswith(".") or f"no {name}" in missing(data)


@pytest.mark.parametrize("name", ["run.json", "summary.json", "metrics.jsonl", "features.json", "audit.json"])
@pytest.mark.parametrize("text", ["{torn", "[1, 2]\n", '{"a": NaN}\n', '{"features": 3, "curves": 4}\n'])
def test_a_file_that_is_not_what_was_expected_is_no_exception(tmp_path, name, text):
    run = write_run(tmp_path / "a")
    (run / name).write_text(text)
    data = report(run, out=tmp_path)
    whole = name == "summary.json" and text.startswith('{"feat')  # a summary without numbers, but nothing is torn
    assert whole or name in missing(data) or name == "run.json"


def test_runs_of_an_earlier_version_are_shown_without_what_they_lack(tmp_path):
    run = write_run(tmp_path / "a", behaviour=None, warnings=None, length_after=5.0)
    data = report(run, out=tmp_path)
    assert "no behaviour in summary.json" in missing(data)
    assert "only learned to stop" in data["warnings"][0]["text"]  # follows from the numbers that it has


def test_frozen_weights_that_moved_come_first(tmp_path):
    run = write_run(tmp_path / "a", frozen_unchanged=False)
    assert "nothing on this page can be trusted" in report(run, out=tmp_path)["warnings"][0]["text"]


def test_a_run_of_saes_alone_has_a_page(tmp_path):
    place = write_everything(tmp_path / "all")
    data = report(place / "saes", out=tmp_path)
    assert data["others"][0]["lines"][0]["fvu"] == 0.01 and data["curves"]["metrics"][0]["key"] == "fvu"


def test_folders_that_are_not_there_or_hold_no_run_are_refused(tmp_path, saerl):
    with pytest.raises(ValueError, match="there is no folder"):
        write_report([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    refused = saerl("report", str(tmp_path / "empty"))
    assert refused.returncode == 2 and "holds no run" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_command_writes_the_page_it_names(tmp_path, saerl):
    run = write_run(tmp_path / "a")
    done = saerl("report", str(run), "--out", str(tmp_path / "out" / "page.html"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out" / "page.html")
    assert (tmp_path / "out" / "figures" / "curves.svg").is_file()


# --- large -----------------------------------------------------------------------------------------------------------


def test_long_curves_and_samples_are_thinned_and_say_so(tmp_path):
    run = write_run(tmp_path / "a", points=3000)
    (run / "samples.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "prompt": "p", "completion": "x" * 1000, "reward": 0.0, "kl": None}) + "\n"
            for i in range(TEXT // 500)
        )
    )
    data = report(run, out=tmp_path)
    series = data["curves"]["series"][0]
    assert data["curves"]["thinned"] == len(series["steps"]) == 500
    assert series["steps"][0] == 0 and series["steps"][-1] == 16 * 2999
    assert len(rows(tmp_path / "figures" / "curves.csv")) == 3000  # the data are all there
    steps = data["samples"][0]["steps"]
    assert steps[0]["step"] == 0 and data["samples"][0]["left_out"] == TEXT // 500 - len(steps) > 0
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_thinning_keeps_both_ends():
    assert thin(5, 10) == [0, 1, 2, 3, 4]
    assert thin(100, 4) == [0, 33, 66, 99]


# --- behaviour from files --------------------------------------------------------------------------------------------


def test_gold_is_what_is_measured_and_not_learned_from():
    def settings(**parts):
        return {f"reward.parts.{n}.{k}": v for n, part in parts.items() for k, v in part.items()}

    assert gold_parts(settings(words={"kind": "lexicon", "weight": 1.0})) == {}
    held_out = settings(words={"kind": "lexicon", "weight": 1.0}, judge={"kind": "hf", "weight": 0})
    assert gold_parts(held_out) == {"judge": 1.0}
    injected = settings(base={"kind": "planted", "weight": -1.0}, error={"kind": "heavy", "weight": 1.0})
    assert gold_parts(injected) == {"base": -1.0}
    lines = [{"step": 1, "kl": 0.5, "reward": 3.0, "reward/base": 2.0, "reward/error": 5.0}, {"step": 2, "reward": 1.0}]
    assert proxy_and_gold(lines, {"base": -1.0}) == [{"step": 1, "kl": 0.5, "proxy": 3.0, "gold": -2.0}]
    assert proxy_and_gold(lines, {}) == []


def test_the_feature_that_carries_most():
    reverts = [
        {"site": "s", "feature": 1, "reward": -0.1},
        {"site": "s", "feature": 2, "reward": -0.6, "reward_se": 0.1},
    ]
    found = one_feature(Audit(gain={"gain": 2.0}, reverts=reverts))
    assert found == {"site": "s", "feature": 2, "share": 0.3, "share_se": 0.05}
    assert one_feature(Audit()) is None and one_feature(Audit(gain={"gain": 2.0})) is None
