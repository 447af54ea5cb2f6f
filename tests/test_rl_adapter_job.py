"""`saerl rlhf` with every adapter: refusals, run directory, evaluate; coefficients kept few, resumed to the bit."""

import json

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_WORDS
from rl_fixtures import tiny_sae
from safetensors.torch import load_file
from test_rl_adapters import BASELINES
from test_rl_job import begin, do, evaluate, lines, saes, settings  # noqa: F401 (saes is a fixture)
from transformers import AutoModelForCausalLM

from saerl_cli.adapter import deltas
from saerl_cli.jobs import rlhf as job
from saerl_cli.rl.export import export_policy
from saerl_cli.rl.policy import load_policy
from saerl_cli.run.directory import Run
from saerl_cli.sae.files import check_sae, load_sae

SHORT = ("algo.phases=1", "evaluation.every=0")


def of(kind: str, saes, *overrides: str):  # noqa: F811
    """Settings of a baseline; random directions imitate the SAEs."""
    random = kind == "random_dictionary"
    own = (f"adapter.kind={kind}", f"adapter.lr={5e-2 if random else 5e-3}")
    return settings(saes if random else None, *own, *SHORT, *overrides)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_run_of_every_adapter(saes, tmp_path, kind):  # noqa: F811
    config = of(kind, saes)
    job.check(config)
    run = do(tmp_path / "run", config)
    summary, record = run.read_summary(), run.record
    assert summary["adapter"] == kind and summary["frozen_unchanged"] is True
    policy = {name: n for name, n in record["trainable"].items() if "v_head" not in name}
    assert summary["trainable_parameters"] == sum(policy.values()) > 0 and summary["value_parameters"] == 33
    assert lines(run.path / "metrics.jsonl")[0]["kl"] == 0 and summary["kl_exact"] > 0
    assert ("nonzero" in summary) == (kind == "random_dictionary") == bool(summary["top_features"])
    tensors = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == summary["trainable_parameters"]
    if kind == "random_dictionary":
        exported = export_policy(run.path, "model", tmp_path / "model")
        assert "import saerl_cli.adapter" in exported
        policy, model = load_policy(run.path), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        ids = torch.arange(2, 22)[None]
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, atol=1e-5, rtol=1e-5)
    again = evaluate(run.path, tmp_path / "evaluated")
    assert again["adapter"] == kind
    assert again["nll_heldout_after"] == pytest.approx(summary["nll_heldout_after"], abs=1e-6)
    assert again["nll_heldout_before"] == pytest.approx(summary["nll_heldout_before"], abs=1e-6)


def test_random_directions_have_the_shapes_and_the_sparsity_of_the_saes(saes, tmp_path):  # noqa: F811
    from saerl_cli.models import load_model, resolve_sites
    from saerl_cli.rl.adapters.directions import text_activations
    from saerl_cli.rl.build import build_setup

    run = do(tmp_path / "a", of("random_dictionary", saes))
    other = do(tmp_path / "b", of("random_dictionary", saes, "adapter.seed=5"))
    parts = build_setup(of("random_dictionary", saes), run, "cpu")
    loaded = load_model(of("random_dictionary", saes).model)
    sites = resolve_sites(["mlp_out.0", "mlp_out.1"], loaded.model)
    x = text_activations(loaded, sites, parts.heldout_rows)
    for site in ("mlp_out.0", "mlp_out.1"):
        check_sae(run.path / "sae" / site, model_sha256=loaded.sha256, width=32)
        random, real = load_sae(run.path / "sae" / site), load_sae(saes / site)
        torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(64))
        count = [float((sae.encode(x[site]) != 0).sum(-1).float().mean()) for sae in (random, real)]
        assert count[0] == pytest.approx(count[1], rel=1e-3)
        assert (random.W_dec @ real.W_dec.T).abs().max() < 0.9
        assert not torch.equal(random.W_dec, load_sae(other.path / "sae" / site).W_dec)
    assert run.record["inputs"]["sae"].keys() == {"mlp_out.0", "mlp_out.1"}


def test_random_directions_by_number(tmp_path):
    sizes = ("adapter.sites=[mlp_out.1]", "adapter.d_sae=48", "adapter.k=4")
    run = do(tmp_path, settings(None, "adapter.kind=random_dictionary", "adapter.lr=5e-2", *SHORT, *sizes))
    sae = load_sae(tmp_path / "sae" / "mlp_out.1")
    assert (sae.d_sae, sae.k) == (48, 4) and run.read_summary()["trainable_parameters"] == 48


# --- coefficients kept few -------------------------------------------------------------------------------------------

FEW = (
    "adapter.sparsity.l1=0.02",
    "adapter.sparsity.l1_scale=effect",
    "adapter.sparsity.top_k=12",
    "adapter.sparsity.hard_concrete=1e-3",
    "adapter.sparsity.max_delta=0.3",
    "adapter.freeze.ids=[mlp_out.0:0-31]",
)


def test_few_coefficients_resumed_to_the_bit(saes, tmp_path, monkeypatch):  # noqa: F811
    from saerl_cli.rl.training.phase import PPOTrainer

    config = settings(saes, *FEW)
    job.check(config)
    whole = do(tmp_path / "whole", config)
    summary = whole.read_summary()
    assert 0 < summary["nonzero"] <= 12 and summary["delta_max"] <= 0.3
    assert summary["trainable_parameters"] == 4 * 64, "a coefficient and a gate each"
    tensors = load_file(whole.path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 and all("delta" in name for name in tensors), "gates are multiplied in"
    assert sum(int((t != 0).sum()) for t in tensors.values()) == summary["nonzero"]
    assert not next(t for name, t in tensors.items() if "layers.0" in name)[:32].any()
    effect = load_file(whole.path / "effect.safetensors")
    assert effect.keys() == {"mlp_out.0", "mlp_out.1"} and all((e >= 0).all() and e.any() for e in effect.values())
    policy = load_policy(whole.path)
    assert sum(int((d != 0).sum()) for d in deltas(policy.model).values()) == summary["nonzero"]

    run = begin(tmp_path / "killed", config)
    true = PPOTrainer.describe_rollout

    def dies_in_phase_three(self, *args):
        if self.phase == 2:
            raise KeyboardInterrupt
        true(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPOTrainer, "describe_rollout", dies_in_phase_three)
        job.work(config, run, Accelerator(cpu=True))
    run.end("interrupted")
    do(tmp_path / "killed", config)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (whole.path / name).read_bytes()
    for file in ("metrics.jsonl", "samples.jsonl"):
        strip = [
            [{k: v for k, v in row.items() if "second" not in k} for row in lines(folder / file)]
            for folder in (tmp_path / "killed", whole.path)
        ]
        assert strip[0] == strip[1]


def test_a_subset_by_label_and_by_attribute(saes, tmp_path):  # noqa: F811
    labels = {"mlp_out.0": {"3": "Curse words", "5": "numbers"}, "mlp_out.1": {"8": "a curse"}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    words = [f"adapter.features.labels={tmp_path / 'labels.json'}", "adapter.features.pattern=curse"]
    run = do(tmp_path / "run", settings(saes, *SHORT, *words, "adapter.freeze.ids=[mlp_out.1:8]"))
    moved = {site: set(d.nonzero().flatten().tolist()) for site, d in deltas(load_policy(run.path).model).items()}
    assert moved["mlp_out.1"] == set() and moved["mlp_out.0"] <= {3}
    summary = {"saes": {"mlp_out.1": {"attributes": {"cursing": {"feature": 9, "f1": 0.9, "auroc": 1.0}}}}}
    graded = tmp_path / "graded"
    tiny_sae(graded / "sae")
    (graded / "summary.json").write_text(json.dumps(summary))
    job.check(settings(graded, "adapter.features.attributes=[cursing]"))
    with pytest.raises(ValueError, match="no feature detects cursing with F1 >= 0.95; the best has 0.90"):
        job.check(settings(graded, "adapter.features.attributes=[cursing]", "adapter.features.f1=0.95"))
    with pytest.raises(ValueError, match="unknown attribute 'swearing'; there are cursing"):
        job.check(settings(graded, "adapter.features.attributes=[swearing]"))
    with pytest.raises(ValueError, match="needs the run directory of `saerl train-sae` with its summary.json"):
        job.check(settings(saes, "adapter.features.attributes=[cursing]"))
    with pytest.raises(ValueError, match="no label in .*labels.json matches 'polite'"):
        job.check(settings(saes, words[0].replace("features", "freeze"), "adapter.freeze.pattern=polite"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.features.ids=[mlp_out.5:1]"], "features.ids: mlp_out.5:1: there is no SAE of mlp_out.5; there are"),
        (["adapter.features.ids=[mlp_out.1:64]"], "the SAE of mlp_out.1 has the features 0 to 63"),
        (["adapter.freeze.ids=[seven]"], "'seven' is neither SITE:FEATURE nor SITE:FIRST-LAST"),
        (["adapter.freeze.ids=[mlp_out.0:0-63,mlp_out.1:0-63]"], "leave no feature to train"),
        (["adapter.sparsity.top_k=129"], "top_k=129 is more than the 128 coefficients that may be trained"),
        (["adapter.sparsity.top_k=3", "adapter.features.ids=[mlp_out.1:4-5]"], "top_k=3 is more than the 2"),
        (["adapter.features.labels=/nowhere", "adapter.features.pattern=x"], "there is no file /nowhere"),
    ],
)
def test_features_that_are_not_there(saes, overrides, message):  # noqa: F811
    with pytest.raises(ValueError, match=message) as caught:
        job.check(settings(saes, *overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=4"], "adapter.rank does nothing with adapter=sparse_coeffs; it belongs to adapter=lora"),
        (
            ["adapter.k=4", "adapter.seed=1"],
            "adapter.k does nothing with adapter=sparse_coeffs",
        ),
        (["adapter.sparsity.l1=-1"], "adapter.sparsity.l1 must be >= 0"),
        (["adapter.sparsity.l1_scale=effect"], "adapter.sparsity.l1_scale does nothing without adapter.sparsity.l1"),
        (["adapter.sparsity.min_coeff=1.5"], "min_coeff=1.5 forbids the untouched coefficient 1"),
        (["adapter.sparsity.max_delta=0"], "max_delta must be > 0"),
        (
            ["adapter.sparsity.top_k=5", "adapter.splice=pre_activation"],
            "nothing with adapter.splice=pre_act",
        ),
        (["adapter.sparsity.hard_concrete=1", "adapter.weight_decay=0.1"], "would move the gates"),
        (["adapter.features.pattern=x"], "labels and pattern belong together"),
        (["adapter.kind=random_dictionary", "adapter.k=4"], "needs either adapter.saes=DIR"),
        (
            ["adapter.kind=lora"],
            "adapter.saes does nothing with adapter=lora; it belongs to adapter=sparse",
        ),
    ],
)
def test_settings_of_another_adapter_and_contradictions(saes, overrides, message):  # noqa: F811
    with pytest.raises(ValueError, match=message) as caught:
        settings(saes, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.kind=lora", "adapter.targets=[q_proj]"], "no layer of this model is called q_proj; there are dense"),
        (["adapter.kind=steering_vector", "adapter.sites=[resid_post.9]"], "layer 9 is out of range"),
        (["adapter.kind=random_dictionary", "adapter.sites=[nowhere.1]", "adapter.d_sae=8", "adapter.k=2"], "nowhere"),
        (["adapter.kind=random_dictionary", "adapter.sites=[mlp_out.1]", "adapter.d_sae=8", "adapter.k=9"],
         "adapter.k=9 directions cannot fire of adapter.d_sae=8"),
    ],
)  # fmt: skip
def test_places_that_the_model_lacks(tiny_planted_model, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        job.check(settings(None, *overrides))
    assert "\n" not in str(caught.value)


def test_a_model_without_biases_is_refused_before_work(tmp_path):
    from adapter_fixtures import tiny_llama
    from rl_fixtures import word_tokenizer

    tiny_llama().save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    local = ("model.kind=local", f"model.path={tmp_path / 'llama'}", "adapter.kind=bias_only")
    with pytest.raises(ValueError, match=r"this model \(llama\) has no biases, so adapter=bias_only has nothing"):
        job.check(settings(None, *local))


def test_another_random_dictionary_is_not_continued(saes, tmp_path):  # noqa: F811
    run = do(tmp_path, of("random_dictionary", saes))
    other = load_sae(run.path / "sae" / "mlp_out.1")
    other.W_dec.mul_(-1)
    from saerl_cli.sae.files import save_sae

    save_sae(other, run.path / "sae" / "mlp_out.1")
    with pytest.raises(ValueError, match="begun with another model or other SAEs"):
        do(tmp_path, of("random_dictionary", saes))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_runs_resumes_and_exports(saerl, tiny_planted_model, empty_place):
    tiny_sae(empty_place / "saes")
    small = [*TINY_WORDS, "algo.phases=2", "algo.rollouts=16", "algo.minibatches=2", "algo.max_new_tokens=8"]
    small += ["evaluation.samples=16", "evaluation.heldout_tokens=500", "checkpoint_every=1", "hydra.run.dir=run"]
    words = ["rlhf", "adapter=sparse_coeffs", f"adapter.saes={empty_place / 'saes'}", *small]
    few = ["adapter.sparsity.top_k=3", "adapter.features.ids=[mlp_out.1:0-9,mlp_out.1:20]"]
    done = saerl(*words, *few)
    assert done.returncode == 0, done.stderr
    assert Run(empty_place / "run").read_summary()["nonzero"] <= 3
    other = saerl(*words, "adapter.sparsity.top_k=4", *few[1:])
    assert other.returncode == 2 and "Traceback" not in other.stderr
    exported = saerl("export", "run", "--to", "compact")
    assert exported.returncode == 0 and "run-compact/sae/mlp_out.1" in exported.stdout, exported
    model = saerl("export", "run", "--to", "model", "--out", "model")
    assert model.returncode == 0 and (empty_place / "model" / "tokenizer.json").is_file(), model.stderr
    whole = saerl("rlhf", "adapter=full", *[word for word in small if "run.dir" not in word], "hydra.run.dir=full")
    assert whole.returncode == 0, whole.stderr
    assert saerl("export", "full", "--to", "model").returncode == 0
    assert (empty_place / "full-model" / "model.safetensors").is_file()
    refused = saerl("export", "full", "--to", "peft")
    assert refused.returncode == 2 and "trained every weight, so it has no adapter" in refused.stderr
    refused = saerl("rlhf", "adapter=lora", "adapter.sites=[mlp_out.1]", *small)
    assert refused.returncode == 2 and "adapter.sites does nothing with adapter=lora" in refused.stderr
