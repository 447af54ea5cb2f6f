"""The report page, from run directories written by hand."""

import json
from pathlib import Path

import pytest

from saerl_cli.report.page import policies, write_report


def write_run(folder: Path, adapter: str, **summary) -> Path:
    folder.mkdir(parents=True)
    record = {
        "job": "rlhf",
        "status": "completed",
        "command": "saerl rlhf",
        "versions": {"saerl": "0.1.0"},
        "inputs": {"model": {"name": "planted", "revision": None, "sha256": "ab"}},
    }
    numbers = {
        "adapter": adapter,
        "trainable_parameters": 3072,
        "reward_before": -1.5,
        "reward_after": -0.25,
        "reward_se": 0.05,
        "kl": 2.0,
        "kl_se": 0.1,
        "nll_heldout_before": 1.2,
        "nll_heldout_after": 1.3,
        "seconds": 60.0,
        "frozen_unchanged": True,
        "parts_after": {"cursing": -0.25},
        "curse_share_before": 0.08,
        "curse_share_after": 0.02,
        "curse_removed": 0.75,
        "length_before": 20.0,
        "length_after": 19.0,
        **summary,
    }
    metrics = [
        {"step": 16 * step, "phase": step, "reward": -1.5 + step / 10, "kl": step / 5, "length": 20.0}
        for step in range(5)
    ]
    samples = [
        {"step": step, "prompt": "the film", "completion": text, "reward": reward, "kl": 0.0}
        for step, text, reward in ((0, "was <script>alert(1)</script> & damn", -1.0), (5, "was fine", 0.0))
    ]
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text(json.dumps(numbers))
    for name, lines in (("metrics", metrics), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_page_holds_the_numbers_and_escapes_what_a_model_wrote(tmp_path):
    run = write_run(tmp_path / "sparse", "sparse_coeffs")
    page = write_report([run]).read_text()
    assert "<script" not in page
    assert "was &lt;script&gt;alert(1)&lt;/script&gt; &amp; damn" in page
    assert "-0.250 ± 0.098" in page  # 1.96 * 0.05
    assert "3,072" in page
    assert "75% of the curse words are gone" in page
    without_namespaces = page.replace("http://www.w3.org", "")
    assert "http" not in without_namespaces  # self-contained: nothing is fetched


def test_figures_are_saved_with_their_data(tmp_path):
    run = write_run(tmp_path / "sparse", "sparse_coeffs")
    write_report([run])
    assert (run / "figures" / "frontier.svg").read_text().startswith("<svg")
    assert (run / "figures" / "frontier.csv").read_text().splitlines()[1] == "sparse_coeffs,-0.25,0.05,2.0,0.1"
    assert len((run / "figures" / "curves.csv").read_text().splitlines()) == 1 + 5


def test_runs_are_called_by_adapter_unless_that_is_ambiguous(tmp_path):
    first, second = (write_run(tmp_path / f"seed{seed}", "full") for seed in (0, 1))
    page = write_report([first, second], tmp_path / "report.html").read_text()
    assert '<th scope="row">seed0</th>' in page
    assert '<th scope="row">seed1</th>' in page


def test_policies_that_shrink_or_moved_frozen_weights_are_flagged(tmp_path):
    run = write_run(tmp_path / "a", "full", frozen_unchanged=False, length_after=5.0)
    page = write_report([run]).read_text()
    assert "a frozen weight changed" in page
    assert "only learned to stop" in page


def test_a_demo_directory_stands_for_the_runs_inside_it(tmp_path):
    for name in ("sparse_coeffs", "full"):
        write_run(tmp_path / name, name)
    (tmp_path / "run.json").write_text(json.dumps({"job": "demo", "status": "completed"}))
    assert [path.name for path in policies([tmp_path])] == ["full", "sparse_coeffs"]


@pytest.mark.parametrize("status", ["running", "failed"])
def test_unfinished_runs_are_refused_by_name(tmp_path, status):
    run = write_run(tmp_path / "a", "full")
    (run / "summary.json").unlink()
    (run / "run.json").write_text(json.dumps({"job": "rlhf", "status": status}))
    with pytest.raises(ValueError, match=f"{run} is {status}"):
        write_report([run])


def test_a_folder_without_run_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run directory"):
        write_report([tmp_path])
