"""Every experiment at its small scale: all stages of all pipelines run, through Snakemake, as commands."""

import itertools
import json
from fnmatch import fnmatch

import pytest
from conftest import TINY_PLANTED

from saerl_cli.config.pipeline import load_pipeline
from saerl_cli.reproduce import verdict
from saerl_cli.run.pipeline import known_pipelines, tasks_of

pytest.importorskip("snakemake", reason="needs the extra reproduce")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def own_model_and_text(tmp_path_factory) -> list[str]:
    """What the experiments on models in folders are given here: a tiny model and a text that its tokenizer knows."""
    from saerl_cli.config.groups import PlantedConfig
    from saerl_cli.planted.cache import planted_model
    from saerl_cli.planted.language import reviews

    model = planted_model(PlantedConfig(**TINY_PLANTED | {"layers": 4}))
    stories = tmp_path_factory.mktemp("text") / "stories.jsonl"
    texts = [review.text for review in itertools.islice(reviews(0), 600)]
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [f"model={model}", f"data={stories}"]


@pytest.mark.parametrize("name", known_pipelines())
def test_every_stage_runs(saerl, empty_place, own_model_and_text, name):
    needs = own_model_and_text if name in ("002-stories", "012-nano-frontier") else []
    needs = [f"{key}=unused" for key in ("text", "pairs", "prompts")] if name == "020-pythia-at-scale" else needs
    done = saerl("reproduce", name, *needs, "--scale", "small", "--out", "out", timeout=900)
    logs = "\n".join(log.read_text()[-600:] for log in (empty_place / "out" / "logs").rglob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert "not compared with the card" in done.stderr
    plan = json.loads((empty_place / "out" / "plan.json").read_text())
    for task in plan["tasks"]:
        folder = empty_place / "out" / task["task"]
        assert (folder / ".done").is_file()
        assert (folder / ("report.html" if task["words"][0] == "report" else "summary.json")).is_file()
    pipeline = load_pipeline(known_pipelines()[name])
    given = dict(word.split("=", 1) for word in needs)
    tasks = tasks_of(pipeline, (empty_place / "out").absolute(), given, small=True)
    for part in pipeline.expect:
        if any(not any(fnmatch(v, glob) for v in pipeline.small.each.get(k, [glob])) for k, glob in part.only.items()):
            continue  # of values that the small scale leaves out
        rows = verdict.got_rows(part, tasks)
        assert rows
        for metric, wanted in part.wanted().items():
            assert all((wanted.key or metric) in row for row in rows), metric
    again = saerl("reproduce", name, *needs, "--scale", "small", "--out", "out")
    assert again.returncode == 0
    assert f"{len(plan['tasks'])} of {len(plan['tasks'])} stages are finished already" in again.stderr
