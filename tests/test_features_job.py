"""`saerl features`: the real command on a run and on SAEs, what it refuses, what it writes, labels there and back."""

import csv
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import test_features
import test_rl_job
import torch
from conftest import TINY_WORDS
from rl_fixtures import tiny_sae, word_tokenizer
from test_rl_job import do, settings

from saerl_cli import cli
from saerl_cli.analysis.features import Depth, Source, describe_features, describe_run, heldout_text, take_census
from saerl_cli.analysis.features.find import FeatureResults
from saerl_cli.analysis.features.moved import completions_text, in_policy, snapshot_deltas
from saerl_cli.config.features import FeaturesConfig
from saerl_cli.config.groups import DataConfig, ModelConfig, PlantedConfig
from saerl_cli.data.prompts import Prompt
from saerl_cli.jobs import rlhf as rl_job
from saerl_cli.jobs.features import check
from saerl_cli.models import load_model, resolve_sites
from saerl_cli.report import features as report
from saerl_cli.rl.policy import load_policy
from saerl_cli.run.files import read_json, read_jsonl, write_json
from saerl_cli.sae.files import load_sae, save_sae

saes = test_rl_job.saes  # fixtures
service = test_features.service
PLANTED = PlantedConfig(**test_rl_job.TINY)
FEW = ["tokens=2000", "contexts=4", "cpu=true"]


@pytest.fixture(scope="module")
def finished(saes, tmp_path_factory) -> Path:
    """A finished run against cursing with policies along the way, through coefficients at both MLP outputs."""
    path = tmp_path_factory.mktemp("runs") / "run"
    do(path, settings(saes, "snapshots=2"))
    return path


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny_planted_model) -> Path:
    """The folder of a run without coefficients, as far as the checks look."""
    path = tmp_path_factory.mktemp("runs") / "full"
    test_rl_job.begin(path, settings(None)).end("completed")
    (path / "model").mkdir()
    return path


@pytest.fixture
def command(empty_place, monkeypatch, capfd):
    """A command in this process and an empty directory, which must succeed; what it prints."""

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["saerl", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capfd.readouterr().out

    return run


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [value for name, value in attrs if name in ("src", "href") and value], "the page needs a network"

    def handle_data(self, data):
        self.words.append(data)


# --- of a policy -----------------------------------------------------------------------------------------------------


def test_one_command_shows_what_a_policy_moved(saerl, finished):
    done = saerl("features", f"policy={finished}", "count=5", "samples=6", *FEW, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    found, record, summary = (read_json(Path("out", name)) for name in ("features.json", "run.json", "summary.json"))
    features = found["features"]
    assert len(features) == 5 and record["status"] == "completed"
    effects = [one["effect"] for one in features]
    assert effects == sorted(effects, reverse=True) and min(effects) > 0
    steps = [line["step"] for line in read_jsonl(finished / "metrics.jsonl")]
    for one in features:
        assert one["delta"] == pytest.approx(found["deltas"][one["site"]][one["feature"]], abs=1e-6)
        path = one["coefficient"]
        assert path[0] == [0, 1.0] and path[-1][0] == max(steps) and len(path) == 4
        assert path[-1][1] == pytest.approx(1 + one["delta"], abs=1e-5)
        assert one["heldout"]["mean_before"] == one["mean"] > 0
        if one["site"] == "mlp_out.0":  # nothing below it changes
            assert one["trivial"] and one["heldout"]["mean_after"] == pytest.approx(one["mean"], rel=1e-4)
        for context in one["heldout"]["contexts"]:
            assert all(len(token) == 3 for token in context)
        assert one["samples"].keys() == {"mean_before", "mean_after", "contexts_before", "contexts_after"}
        assert 0 <= one["f1"] <= 1 and one["output"]["promotes"]["auroc"] >= 0.5 >= one["output"]["suppresses"]["auroc"]
        assert sum(one["histogram"]["tokens"]) == round(one["density"] * one["tokens"])
        assert one["label_from"] == "tokens" and one["label"]
    assert {one["site"] for one in features} <= {"mlp_out.0", "mlp_out.1"}
    assert summary["features"] == 5 and summary["top_features"][0]["feature"] == features[0]["feature"]
    lines = done.stdout.splitlines()
    assert lines[0].split()[:6] == ["site", "feature", "label", "c", "effect", "density"] and len(lines) == 6
    assert "mlp_out.0 sees the current token alone" in done.stderr
    with Path("out/histograms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 40 and {row["feature"] for row in rows} == {str(one["feature"]) for one in features}
    page = Page(Path("out/features.html").read_text())
    assert page.tags.count("article") == 5 and page.tags.count("polyline") == 5 and page.tags.count("script") == 1
    assert not Path("out/neuronpedia").exists()


def test_features_in_the_policy_are_read_before_their_coefficient(finished, saes):
    """f(h) in the policy is that of the activations which its splice reads, with the layers below it changed."""
    policy = load_policy(finished)
    model = policy.model.get_base_model()
    sae = load_sae(saes / "mlp_out.1")
    loaded = load_model(ModelConfig(planted=PLANTED))
    site = resolve_sites(["mlp_out.1"], loaded.model)[0]
    text = heldout_text(DataConfig(), ModelConfig(planted=PLANTED), loaded, 600)
    base = Source(loaded.model, site, sae)
    with policy.reference():
        reference = take_census(in_policy(policy, base, reference=True), text)
    torch.testing.assert_close(reference.total, take_census(base, text).total)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(site.module)
    hook = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for rows in text.rows.split(7):
            model(input_ids=rows)
    hook.remove()
    f = sae.encode(torch.cat(seen)[text.mask])
    after = take_census(in_policy(policy, base), text)
    torch.testing.assert_close(after.total.float(), f.sum(0), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(after.total, reference.total, rtol=1e-3)


def test_gates_are_multiplied_into_the_coefficients_of_snapshots(tmp_path):
    from saerl_cli.adapter.coefficients.gates import gate
    from saerl_cli.run.files import write_safetensors

    key = "base_model.model.gpt_neox.layers.1.mlp.sparse_coeffs_{}.default.weight"
    delta, logits = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([9.0, -9.0, 0.5])
    file = tmp_path / "step-8.safetensors"
    write_safetensors(file, {key.format("delta"): delta, key.format("gate"): logits})
    (found,) = snapshot_deltas(file).items()
    assert found[0] == "gpt_neox.layers.1.mlp"
    torch.testing.assert_close(found[1], delta * gate(logits))
    assert found[1].tolist()[:2] == [1.0, 0.0]
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match="step-8.safetensors is corrupted"):
        snapshot_deltas(file)


def test_completions_alone_count_and_fillings_are_not_shown():
    tokenizer = word_tokenizer()
    prompts = [Prompt("w1 w2", (3, 4)), Prompt("w1", (3,))]
    text = completions_text(prompts, [[5, 6, 1], [7]], tokenizer)
    assert text.rows.tolist() == [[3, 4, 5, 6, 1], [3, 7, 0, 0, 0]]
    assert text.mask.tolist() == [[False, False, True, True, False], [False, True, False, False, False]]
    assert text.row(1).tolist() == [3, 7]


def test_describe_run_keeps_its_file(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    found = describe_run(run, count=4, tokens=1000)
    written = read_json(run / "features.json")
    assert written.keys() == {"features", "deltas"} and len(written["features"]) == 4
    assert {site: len(values) for site, values in written["deltas"].items()} == {"mlp_out.0": 64, "mlp_out.1": 64}
    old = {"site", "feature", "delta", "density", "effect", "fires_on", "promotes", "suppresses", "contexts"}
    old |= {"attribute", "f1"}
    for one, kept in zip(found["features"], written["features"], strict=True):
        assert old <= kept.keys() and kept["feature"] == one["feature"]
        assert all(isinstance(token, str) and value >= 0 for context in kept["contexts"] for token, value in context)


# --- of SAEs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(tiny_planted_model, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """An SAE two of whose features read and write what the model has for an attribute; the others are random."""
    from saerl_cli.activations import capture

    loaded = load_model(ModelConfig(planted=PLANTED))
    site = resolve_sites(["resid_post.1"], loaded.model)[0]
    text = heldout_text(DataConfig(), ModelConfig(planted=PLANTED), loaded, 4000)
    from saerl_cli.analysis.features.attributes import truth_of

    truth, names = truth_of(text.rows, text.mask, loaded.tokenizer)
    x = capture(loaded.model, [site], text.rows)[site.name][text.mask]
    sae = load_sae(tiny_sae(tmp_path_factory.mktemp("base"), "resid_post.1"))
    planted = {"cursing": 11, "second_language": 40}
    for name, feature in planted.items():
        positive = truth[:, names.index(name)]
        centred = x.double() - x.double().mean(0)
        target = positive.double() - positive.double().mean()
        weight = torch.linalg.lstsq(centred, target[:, None]).solution[:, 0]
        score = centred @ weight
        threshold = max(score.quantile(torch.linspace(0.5, 0.999, 60).double()), key=lambda t: f1(score > t, positive))
        scale = 1 / score.std()
        sae.W_enc.data[:, feature] = (weight * scale).float()
        sae.b_dec.data.zero_()
        sae.b_enc.data[feature] = float(-(x.double().mean(0) @ weight + threshold) * scale)
        words = loaded.tokenizer.convert_tokens_to_ids(sorted(words_of(name)))
        norm = loaded.model.gpt_neox.final_layer_norm.weight
        direction = loaded.model.get_output_embeddings().weight
        mean = direction[words].mean(0) - direction.mean(0)
        sae.W_dec.data[feature] = torch.nn.functional.normalize(mean / norm, dim=0)
    sae.site = "resid_post.1"
    folder = tmp_path_factory.mktemp("graded")
    save_sae(sae, folder / "resid_post.1")
    return folder, planted


def f1(found: torch.Tensor, positive: torch.Tensor) -> float:
    return float(2 * (found & positive).sum() / (found.sum() + positive.sum()))


def words_of(attribute: str) -> frozenset[str]:
    from saerl_cli.planted.language import attribute_words

    return attribute_words(attribute)


def test_features_that_stand_for_an_attribute_are_found_on_both_sides(graded):
    """As a notebook does it, without a run directory."""
    folder, planted = graded
    loaded = load_model(ModelConfig(planted=PLANTED))
    source = Source(loaded.model, resolve_sites(["resid_post.1"], loaded.model)[0], load_sae(folder / "resid_post.1"))
    text = heldout_text(DataConfig(), ModelConfig(planted=PLANTED), loaded, 4000)
    census = take_census(source, text)
    found = describe_features(source, loaded, text, census, list(planted.values()), Depth(attributes=True))
    for name, one in zip(planted, found, strict=True):
        assert one["attribute"] == name and one["f1"] > 0.6 and one["auroc"] > 0.7
        assert one["output"]["promotes"]["attribute"] == name and one["output"]["promotes"]["auroc"] > 0.85
        words = words_of(name)
        assert sum(token in words for token in one["fires_on"][:3]) >= 2
    (random,) = describe_features(source, loaded, text, census, [5], Depth(attributes=True))
    assert random["auroc"] < 0.8 or random["attribute"] not in planted


def test_labels_go_there_and_back_and_choose_features_to_train(command, graded):
    """features -> labels.json -> a person's edit -> features and adapter.features.labels."""
    folder, planted = graded
    words = ["features", f"saes={folder}", "model=planted", "data=planted", *TINY_WORDS, *FEW]
    shown = command(*words, "ids=[resid_post.1:11,resid_post.1:38-40]", "hydra.run.dir=first", "neuronpedia=true")
    found = read_json(Path("first/features.json"))
    assert [one["feature"] for one in found["features"]] == [11, 38, 39, 40] and found["deltas"] == {}
    assert "delta" not in found["features"][0] and " c " not in shown.splitlines()[0]
    (batch,) = Path("first/neuronpedia/resid_post.1").glob("*.json")
    assert len(read_json(batch)["features"]) == 4
    labels = read_json(Path("first/labels.json"))
    assert labels["resid_post.1"].keys() == {"11", "38", "39", "40"}
    labels["resid_post.1"]["11"] = "<script>alert(1)</script> swearing"
    write_json(Path("edited.json"), labels)
    command(*words, "ids=[resid_post.1:11,resid_post.1:12]", "labels=edited.json", "hydra.run.dir=second")
    one, other = read_json(Path("second/features.json"))["features"]
    assert (one["label"], one["label_from"], other["label_from"]) == (labels["resid_post.1"]["11"], "file", "tokens")
    page = Path("second/features.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; swearing" in page and page.count("<script") == 1
    assert read_json(Path("second/labels.json"))["resid_post.1"].keys() == {"11", "12", "38", "39", "40"}
    chosen = ["adapter.features.labels=second/labels.json", "adapter.features.pattern=swearing"]
    from saerl_cli.rl.adapters.selection import free_features

    assert free_features(settings(folder, *chosen).adapter, {"resid_post.1": 64}) == {"resid_post.1": {11}}
    rl_job.check(settings(folder, *chosen))


def test_a_service_labels_features_and_is_scored_on_other_contexts(command, graded, service):
    url, seen = service
    words = [f"saes={graded[0]}", "model=planted", "data=planted", *TINY_WORDS, *FEW, "ids=[resid_post.1:11]"]
    asked = [f"explain.endpoint={url}", "explain.model=stub", "explain.judged=3", "explain.shown=5", "explain.batch=2"]
    shown = command("features", *words, *asked, "hydra.run.dir=out")
    (one,) = read_json(Path("out/features.json"))["features"]
    assert (one["label"], one["label_from"]) == ("the word damn", "model") and len(one["contexts"]) == 4
    assert one["explanation"]["judged"] == 6 and one["explanation"]["score"] > 0.5 and len(seen) == 4
    assert not {"drawn", "silent"} & one.keys()
    assert read_json(Path("out/labels.json")) == {"resid_post.1": {"11": "the word damn"}}
    assert shown.splitlines()[0].endswith("detection") and " ± " in shown.splitlines()[1]


def test_text_that_a_page_shows_is_escaped(graded):
    """Tokens, labels and names come from models, texts and people."""
    bad = "</span><img src=x onerror=alert(1)>"
    one = {
        "site": bad,
        "feature": 1,
        "trivial": True,
        "tokens": 10,
        "density": 0.1,
        "mean": 0.1,
        "peak": 1.0,
        "effect": 0.1,
        "delta": -0.5,
        "coefficient": [[0, 1.0], [8, 0.5]],
        "fires_on": [bad],
        "promotes": [bad],
        "suppresses": [bad],
        "contexts": [[(bad, 1.0)]],
        "quantiles": [{"from": 0, "to": 1, "contexts": [[(bad, 0.5)]], "at": [0]}],
        "histogram": {"edges": [0, 0.5, 1], "tokens": [3, 1]},
        "neighbours": {"direction": [{"feature": 2, "cosine": 0.5}], "together": []},
        "attribute": bad,
        "f1": 0.5,
        "auroc": 0.5,
        "output": {"promotes": {"attribute": bad, "auroc": 1.0}, "suppresses": {"attribute": bad, "auroc": 0.0}},
        "label": bad,
        "label_from": "model",
        "explanation": {"text": bad, "model": bad},
        "heldout": {"mean_before": 0.1, "mean_after": 0.2, "contexts": [[(bad, 0.1, 0.2)]]},
        "samples": {"mean_before": 0.0, "mean_after": 0.1, "contexts_before": [], "contexts_after": [[(bad, 1.0)]]},
    }
    about = {"trivial": True, "d_sae": 4, "tokens": 10, "l0": 1.0, "dead": 0.0}
    inputs = {
        "model": {"name": bad, "sha256": "0" * 64},
        "sae": {bad: {"path": bad, "sha256": "0" * 64}},
        "policy": bad,
    }
    found = FeatureResults([one], {bad: about}, {}, inputs, None)  # type: ignore[arg-type]
    text = report.page(found, FeaturesConfig(policy=bad))
    page = Page(text)
    assert "img" not in page.tags and text.count("&lt;/span&gt;&lt;img") >= 18
    assert "".join(page.words).count(bad) >= 18


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(**words) -> str:
    with pytest.raises(ValueError) as caught:
        check(FeaturesConfig(**words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_refused_with_what_there_is(finished):
    policy = str(finished)
    assert "ids: mlp_out.1:64: the SAE of mlp_out.1 has the features 0 to 63" in refusal(
        policy=policy, ids=["mlp_out.1:64"]
    )
    assert "has the features 0 to 63" in refusal(policy=policy, ids=["mlp_out.1:60-70"])
    assert "there is no SAE of mlp_out.7; there are mlp_out.0, mlp_out.1" in refusal(policy=policy, ids=["mlp_out.7:1"])
    assert "sites: there is no SAE of mlp_out.7; there are mlp_out.0, mlp_out.1" in refusal(
        policy=policy, sites=["mlp_out.7"]
    )
    assert "neither SITE:FEATURE nor SITE:FIRST-LAST" in refusal(policy=policy, ids=["seven"])
    assert "ids: mlp_out.1:70-60: 70 is larger than 60" in refusal(policy=policy, ids=["mlp_out.1:70-60"])
    assert "there is no file" in refusal(policy=policy, labels="nowhere.json")
    assert "explain.model=nowhere is no folder" in refusal(
        policy=policy, explain=FeaturesConfig(policy="x").explain.__class__(model="nowhere")
    )
    assert "no SAEs at /nowhere" in refusal(saes="/nowhere")


def test_runs_that_cannot_be_described_are_refused_in_one_line(finished, full_run, tmp_path):
    assert "is not a run directory" in refusal(policy=str(tmp_path))
    assert "trained adapter=full, which has no coefficients of features" in refusal(policy=str(full_run))

    def changed(name: str, **record) -> Path:
        run = Path(shutil.copytree(finished, tmp_path / name))
        write_json(run / "run.json", read_json(run / "run.json") | record)
        return run

    assert "is failed; finish it first: saerl rlhf" in refusal(policy=str(changed("failed", status="failed")))
    assert "is interrupted; finish it first" in refusal(policy=str(changed("half", status="interrupted")))
    assert "is a run of `saerl train-sae`" in refusal(policy=str(changed("other", job="train_sae")))
    gone = changed("gone")
    shutil.rmtree(gone / "adapter")
    assert "has no adapter folder" in refusal(policy=str(gone))
    later = changed("later")
    config = later / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "a_setting_of_next_year: 1\n")
    assert "is not a config of `saerl rlhf`" in refusal(policy=str(later))
    lost = changed("lost")
    adapter = read_json(lost / "adapter" / "adapter_config.json")
    adapter |= {"saes": {module: "/nowhere" for module in adapter["saes"]}, "relative_saes": None}
    write_json(lost / "adapter" / "adapter_config.json", adapter)
    assert "no SAE for mlp_out.0; put the folder of its SAE in one of these places" in refusal(policy=str(lost))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "give policy=RUN, a run of `saerl rlhf`, or saes=DIR"),
        ({"policy": "a", "saes": "b"}, "not both"),
        ({"policy": "a", "model": {"kind": "planted"}}, "model does nothing without saes"),
        ({"policy": "a", "count": 0}, "count must be >= 1"),
        ({"policy": "a", "ids": []}, "ids is empty"),
        ({"policy": "a", "samples": -1}, "samples must be >= 0"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        FeaturesConfig(**words)


def test_a_refusal_is_one_line_and_leaves_nothing(saerl, graded):
    words = ["model=planted", "data=planted", *TINY_WORDS, "ids=[resid_post.1:64]", "hydra.run.dir=out"]
    done = saerl("features", f"saes={graded[0]}", *words)
    assert done.returncode == 2
    assert done.stderr == "saerl: ids: resid_post.1:64: the SAE of resid_post.1 has the features 0 to 63\n"
    assert not list(Path().iterdir())


def test_drawings_by_hand():
    assert report.bars([0, 0]) == "" and report.bars([]) == ""
    assert report.bars([0, 7]) == "M110.0 44v-44.0h109.4V44z"
    drawn = report.curve([[0, 1.0], [10, 0.0]])
    first, last = drawn["points"].split()
    assert first.startswith("0.0,") and last.startswith("220.0,") and drawn["steps"] == 10
    assert float(first.split(",")[1]) == drawn["one"] < float(last.split(",")[1]) == drawn["last"]
    assert report.curve([[0, 1.0]]) == {}


def test_long_labels_are_cut_in_the_table_alone():
    assert report.shortened("a\nb") == "a b"
    assert len(report.shortened("word " * 60)) == report.MOST_LETTERS and report.shortened("word " * 60)[-1] == "…"
