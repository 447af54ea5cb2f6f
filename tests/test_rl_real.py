"""The job on real models that were not made here: GPT-NeoX and Llama, with a lexicon reward on stories."""

import json

import pytest
from accelerate import Accelerator
from omegaconf import OmegaConf
from rl_fixtures import tiny_sae
from safetensors.torch import load_file

from saerl_cli.config import typed
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.jobs import rlhf as job
from saerl_cli.run.directory import Run

pytestmark = pytest.mark.real_data
PARAMETERS = {"neox_stories_nano": 265_600, "stories260k": 260_032}


def stories(shared_data, saes, model, *overrides) -> RlhfConfig:
    fixed = {
        "model": {"kind": "local", "path": str(shared_data / model)},
        "data": {  # neither model reads far beyond 256 tokens well
            "kind": "text",
            "path": str(shared_data / "tinystories" / "stories.jsonl"),
            "context_size": 192,
        },  # fmt: skip
        "adapter": {"kind": "sparse_coeffs", "saes": str(saes), "lr": 5e-2},
        "reward": {"parts": {"happy": {"kind": "lexicon", "words": {"happy": 1.0, "play": 0.5}}}},
        "algo": {"phases": 2, "rollouts": 16, "minibatches": 2, "epochs": 2, "max_new_tokens": 16},
        "evaluation": {"samples": 16, "batch_size": 16, "every": 1, "heldout_tokens": 1000},
        "launch": {"cpu": True},
    }
    words = OmegaConf.from_dotlist(list(overrides))
    return typed(OmegaConf.merge(OmegaConf.structured(RlhfConfig), fixed, words), RlhfConfig)


@pytest.mark.parametrize("model", ["neox_stories_nano", "stories260k"])
@pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
def test_the_job_runs_on_models_it_has_not_seen(shared_data, tmp_path, model, adapter):
    tiny_sae(tmp_path / "saes", "mlp_out.2", width=64)
    changes = [] if adapter == "sparse_coeffs" else ["adapter.kind=full", "adapter.saes=null", "adapter.lr=1e-4"]
    config = stories(shared_data, tmp_path / "saes", model, *changes)
    job.check(config)
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    run.start("rlhf", "saerl rlhf", 0)
    job.work(config, run, Accelerator(cpu=True))
    summary = run.read_summary()
    assert summary["frozen_unchanged"] is True and "curse_share_before" not in summary
    assert summary["trainable_parameters"] == (64 if adapter == "sparse_coeffs" else PARAMETERS[model])
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and rows[1]["kl_k3"] > 0
    assert 1.2 < summary["nll_heldout_before"] < 2.3, "a model of stories reading stories"
    if adapter == "full":
        saved = load_file(run.path / "model" / "model.safetensors")
        assert not any("v_head" in name for name in saved)


def test_a_tokenizer_of_another_model_is_refused(shared_data, tmp_path):
    import shutil

    shutil.copytree(shared_data / "neox_stories_nano", tmp_path / "model")
    shutil.copy(shared_data / "pythia_tokenizer" / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    tiny_sae(tmp_path / "saes", "mlp_out.2", width=64)
    config = stories(shared_data, tmp_path / "saes", "neox_stories_nano", f"model.path={tmp_path / 'model'}")
    with pytest.raises(ValueError, match="they disagree"):
        job.check(config)


def test_an_sae_of_another_width_is_refused(shared_data, tmp_path):
    tiny_sae(tmp_path / "saes", "mlp_out.2", width=32)
    with pytest.raises(ValueError, match="d_in=32, but the site has width 64"):
        job.check(stories(shared_data, tmp_path / "saes", "neox_stories_nano"))
