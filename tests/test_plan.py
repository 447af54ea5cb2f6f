"""`saerl plan`: counts against what is really built, extrapolation by hand, short runs, refusals."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_WORDS
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from saerl_cli.config.adapter import AdapterConfig, Splice
from saerl_cli.config.groups import LaunchConfig, ModelConfig, ModelKind
from saerl_cli.plan import command, machine, probe, table
from saerl_cli.plan.command import composed, estimate
from saerl_cli.plan.meta import PYTHIA, count, language_model, sequence
from saerl_cli.plan.probe import Short, ends, extrapolated, shortened
from saerl_cli.plan.rlhf import adapted

PUBLISHED = {
    "14m": 14_067_712, "31m": 30_494_720, "70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016,
    "1b": 1_011_781_632, "1.4b": 1_414_647_808, "2.8b": 2_775_208_960, "6.9b": 6_857_302_016, "12b": 11_846_072_320,
}  # fmt: skip


def planned(name: str, *words: str, sae: str | None = None):
    making = None if sae is None else composed("train-sae", shlex.split(sae))
    return estimate(name, composed(name, words), making, None)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PYTHIA)
def test_parameters_of_pythia_are_the_published_ones(size):
    model = ModelConfig(kind=ModelKind.hub, name=f"EleutherAI/pythia-{size}-deduped")
    assert count(language_model(model).parameters()) == PUBLISHED[size]


def adapters() -> dict[str, AdapterConfig]:
    kinds = ("full", "lora", "ia3", "steering_vector", "bias_only", "neuron_basis")
    random = {"kind": "random_dictionary", "sites": ["mlp_out.1"], "d_sae": 40, "k": 4}
    return {name: AdapterConfig(kind=name) for name in kinds} | {
        "lora to match": AdapterConfig(kind="lora", match=700),
        "ia3 somewhere": AdapterConfig(kind="ia3", targets=["dense_h_to_4h"]),
        "coefficients": AdapterConfig(**random),
        "coefficients and biases": AdapterConfig(**random, splice=Splice.pre_activation),
    }


@pytest.mark.parametrize("name", adapters())
def test_trained_numbers_are_those_of_the_real_adapter(name, tiny_planted_model, tmp_path):
    from peft import get_peft_model

    from saerl_cli.models import load_model
    from saerl_cli.rl.adapters import peft_config
    from saerl_cli.sae.autoencoder import SAE
    from saerl_cli.sae.files import save_sae

    config = composed("rlhf", [])
    config.model, config.adapter = ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)), adapters()[name]
    loaded, saes = load_model(config.model), {}
    if config.adapter.d_sae:
        sae = SAE(32, 40, "topk", 4)
        sae.site, sae.metadata = "mlp_out.1", {"saerl": {"site": "mlp_out.1"}}
        saes["mlp_out.1"] = save_sae(sae, tmp_path / "sae")
    chosen = peft_config(config.adapter, loaded, saes)
    real = loaded.model.requires_grad_(True) if chosen is None else get_peft_model(loaded.model, chosen)
    assert adapted(config, None)[1] == count(p for p in real.parameters() if p.requires_grad)


def test_the_reward_models_and_those_that_are_not_there():
    words = ["reward=hf", "reward.parts.model.path=EleutherAI/pythia-14m"]
    assert planned("rlhf", *words).stays["reward models"] == 4 * (PUBLISHED["14m"] - 50304 * 128)
    found = planned("rlhf", words[0], "reward.parts.model.path=nowhere")
    assert found.stays["reward models"] == 4 * (869_632 - 298 * 128) and "nowhere is not there" in found.notes[0]
    assert found.once[0] > planned("rlhf").once[0]


def test_the_critics_and_a_run_in_parts():
    assert planned("rlhf").parameters == {"language model": 869_632, "SAEs": 0, "trained": 869_632, "critic": 129}
    assert planned("rlhf", "algo.critic=separate").parameters["critic"] == 869_632 - 298 * 128 + 129
    assert planned("rlhf", "algo=grpo").parameters["critic"] == 0
    two = [f"launch={name}" for name in ("cpu_2", "fsdp2")]
    whole, split = (planned("rlhf", word, "launch.cpu=true", "launch.num_processes=2").stays for word in two)
    assert split["language model"] == whole["language model"] / 2
    assert split["optimiser"] == 8 * (869_632 / 2 + 129)
    assert whole["gradients"] == 2 * 4 * (869_632 + 129)  # and the buckets of DDP


@pytest.mark.parametrize("trained", ["nothing", "weights", "at a site"])
def test_operations_and_bytes_are_those_of_real_tensors(trained):
    """A sequence in a tiny model, by torch's counter, the storages that autograd keeps, and transformers' cache."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=50, hidden_dropout=0.0, attention_dropout=0.0, **sizes)
    real = GPTNeoXForCausalLM(config).eval().requires_grad_(trained == "weights")
    with torch.device("meta"):
        meta = GPTNeoXForCausalLM(config).eval().requires_grad_(trained == "weights")
    site = {"gpt_neox.layers.1.mlp": 32} if trained == "at a site" else {}
    found = sequence(meta, 16, ModelConfig(), LaunchConfig(), site)
    if site:
        vector = torch.zeros(32, requires_grad=True)
        real.gpt_neox.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + vector)
    own, kept = {p.untyped_storage().data_ptr() for p in real.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    cache, ids = DynamicCache(), torch.zeros(1, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.gpt_neox(input_ids=ids, past_key_values=cache, use_cache=True)
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert found.saved == pytest.approx(saved, rel=0.05)
    assert found.cache == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    real.set_attn_implementation("eager")  # whose products a CPU's counter sees
    with FlopCounterMode(display=False) as forward:
        hidden = real.gpt_neox(input_ids=ids).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        if trained != "nothing":
            hidden.sum().backward()
    assert (found.forward, found.backward) == (forward.get_total_flops(), backward.get_total_flops())
    assert found.head == 2 * 50 * 32


def test_what_the_trainer_of_an_sae_holds():
    found = planned("train-sae", "site.names=[mlp_out.1,mlp_out.2]", "sae.expansion=4")
    each = 2 * 128 * 512 + 512 + 128
    assert found.parameters["SAEs"] == 2 * each
    assert found.stays["SAEs"] == found.stays["their gradients"] == 2 * 4 * each
    assert found.stays["their optimiser"] == 2 * 8 * each
    assert found.stays["shuffle buffer"] == 2 * 65_536 * 128 * 4
    assert (found.repeated, found.count) == ("steps", 2_000_000 // 2048)


def test_saes_that_are_not_there_are_those_that_train_sae_makes():
    words = "site=mlp_out.2 sweep=[{k:[4,8]}] sae.expansion=4"
    one, all_ = (
        planned("eval-sae", "saes=none", sae=words),
        planned("eval-sae", "saes=none", "controls=true", sae=words),
    )
    assert one.parameters == {"language model": 869_632, "SAEs": 2 * (2 * 128 * 512 + 512 + 128)}
    assert all_.measurement[0] > 5 * one.measurement[0] > 0
    config = composed("rlhf", ["adapter=sparse_coeffs", "adapter.saes=none"])
    assert command.unmade("rlhf", config) == "none"
    with pytest.raises(ValueError, match="has no SAE at any of adapter.sites"):
        planned("rlhf", "adapter=sparse_coeffs", "adapter.saes=none", "adapter.sites=[mlp_out.3]", sae=words)


def test_an_evaluation_is_planned_from_its_run(tmp_path):
    from omegaconf import OmegaConf

    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.structured(composed("rlhf", [])), tmp_path / ".hydra" / "config.yaml")
    (tmp_path / "run.json").write_text('{"job": "rlhf"}')
    more, usual, few = (
        planned("evaluate", f"policy={tmp_path}", *words).measurement[0]
        for words in (["factors=[0.5]"], [], ["evaluation.samples=16"])
    )
    assert more > usual > few


# --- times -----------------------------------------------------------------------------------------------------------


def test_a_gpu_s_time_is_that_of_products_or_of_weights_that_are_read():
    gpu = machine.Machine("a GPU", False, 1, False, float32=1e9, low=4e9, bandwidth=1e8, memory=1e9)
    one = SimpleNamespace(dtype="float32", weights=1e7, layers=10)
    calls = 10 * machine.CALLS * machine.CALL_S
    assert gpu.seconds(np.array([3e9, 1]), one) == pytest.approx(3 + calls)
    assert gpu.seconds(np.array([3e9, 50]), one) == pytest.approx(50 * (0.1 + calls))
    one.dtype = "bfloat16"
    assert gpu.seconds(np.array([4e9, 1]), one) == pytest.approx(1 + calls)


def test_two_short_runs_are_extended_by_hand():
    """Start 10, a phase 2, a look 1, and 3 + 8 x share behind; CPU seconds are half of all. Memory grows at the end."""
    short, mib = Short(60, 1, "algo.phases", looks=7), 2**20

    def run(share: float, phases: int, rest: int) -> dict:
        ended = [10 + 2 * n + (n == phases) for n in range(1, phases + 1)]
        marks = [(n, at, at / 2) for n, at in enumerate(ended, 1)]
        end = ended[-1] + 3 + 8 * share
        held = (400 * mib, 500 * mib, rest * mib)
        return {"share": share, "marks": marks, "end": (end, end / 2), "resident": held, "peak": 510 * mib}

    parts = extrapolated([run(0.25, 4, 430), run(0.5, 6, 470)], short)
    assert {name: part["seconds"] for name, part in parts.items()} == pytest.approx(
        {"start": 10, "repeated": 2, "look": 1, "rest": 11}
    )
    assert all(part["cpu_seconds"] == pytest.approx(part["seconds"] / 2) for part in parts.values())
    held = {name: part["peak_bytes"] / mib for name, part in parts.items()}
    assert held == {"start": 400, "repeated": 500, "look": 500, "rest": 550}  # 470 + 40 / 0.25 x 0.5
    alone = extrapolated([run(1.0, 4, 430)], short)
    assert (alone["rest"]["seconds"], alone["repeated"]["peak_bytes"]) == (11, 510 * mib)


def test_lines_between_which_there_is_nothing_but_steps():
    marks = [(step, 1.0 * step, 0.0) for step in (1, 32, 64, 90)]
    assert [mark[0] for mark in ends(marks, Short(unit=32))] == [32, 64, 90]
    assert [mark[0] for mark in ends(marks[:2], Short(unit=32))] == [32, 32, 32]
    assert ends([], Short()) == [(0, 0.0, 0.0)] * 3


def test_what_makes_a_run_short():
    short = shortened("rlhf", composed("rlhf", ["algo.critic_warmup=5"]), 60)
    assert (short.share, short.looks) == (0.25, 6)  # one batch of 64 of 256 samples
    assert short.words(2, 0.25) == [
        *("evaluation.every=0", "snapshots=0", "algo.critic_warmup=0"),
        *("evaluation.samples=64", "evaluation.heldout_tokens=5000", "algo.phases=4"),
    ]
    assert not any("phases" in word for word in short.words(60, 0.25))
    sae = shortened("train-sae", composed("train-sae", ["eval_tokens=10000"]), 976)
    assert sae.words(1, sae.share) == [
        *("log_every=32", "activations.cache=null", "eval_tokens=10000", f"sae.tokens={2 * 65_536}"),
    ]


def test_a_job_is_run_shortly_once_and_the_faster_of_two_is_kept(tiny_planted_model, tmp_path, monkeypatch):
    """A real short run, as the launcher starts it."""
    from saerl_cli.planted import cache

    monkeypatch.setattr(probe, "cache_folder", lambda: tmp_path)
    few = ["site=mlp_out.1", "activations.buffer_tokens=2048", "sae.batch_size=256", "sae.k=4", "eval_tokens=1000"]
    words = [*TINY_WORDS, *few, "launch.cpu=true", "launch.threads=1"]
    assert cache.planted_folder(composed("train-sae", words).model.planted) == tiny_planted_model
    first = command.plan("train-sae", [*words, "sae.tokens=100000"])
    names = [phase["name"] for phase in first["phases"]]
    assert (names, first["phases"][1]["count"]) == (["start and text", "steps", "measurement"], 390)
    assert all(phase["cpu_seconds"] > 0 and phase["peak_bytes"] > 2**27 for phase in first["phases"])
    assert first["seconds"] == pytest.approx(sum(one["count"] * one["seconds"] for one in first["phases"]))
    assert "from short runs" in table.text_of(first)
    (file,) = (tmp_path / "plan").iterdir()
    kept = json.loads(file.read_text())
    marks = kept["runs"][0]["marks"]
    assert [mark[0] for mark in marks] == [1, 8, 16]
    slower = kept["runs"][0] | {"marks": [[n, 9 * wall, 9 * cpu] for n, wall, cpu in marks]}
    monkeypatch.setattr(probe, "watched", lambda words, folder, env: slower)
    longer = command.plan("train-sae", [*words, "sae.tokens=200000"], again=True)  # the same short run
    assert longer["timed"] == first["timed"]
    assert longer["seconds"] - first["seconds"] == pytest.approx(391 * first["phases"][1]["seconds"], rel=0.01)


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_plan_of_the_largest_needs_no_network_and_no_files(saerl):
    done = saerl(
        *("plan", "rlhf", "--sparse-coeffs", "model=pythia-6.9b"),
        *("adapter.saes=runs/none", "adapter.sites=[mlp_out.3]"),
        *("--device", "h200", "--json", "--out", "plan.json"), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(Path("plan.json").read_text())
    assert found["parameters"]["language model"] == 6_857_302_016
    assert found["parameters"]["trained"] == 8 * 4096
    assert found["stays_bytes"]["language model"] == 4 * 6_857_302_016
    assert 27e9 < found["peak_bytes"] < 60e9 and found["fits"]
    assert found["timed"] is None and any("not measured" in note for note in found["notes"])
    assert any("runs/none is not there yet" in note for note in found["notes"])


def test_unconstrained_training_of_the_largest_does_not_fit_and_says_so():
    shown = table.text_of(command.plan("rlhf", ["model=pythia-6.9b"], "a100-80gb"))
    assert "does NOT fit" in shown and "6,857,302,016" in shown and "not measured" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["dance"],
            "saerl plan has no word dance; write one of train-lm, train-sae, train-reward, rlhf, evaluate, eval-sae",
        ),
        (["rlhf", "algo.rolouts=3"], "there is no setting algo.rolouts; did you mean algo.rollouts?"),
        (["rlhf", "algo.rollouts=-1"], "algo.rollouts must be >= 1"),
        (["eval-sae", "saes=."], "no SAEs in ."),
        (["eval-sae"], "saes has no value"),
        (["rlhf", "-m", "seed=0,1"], "saerl plan plans one job; leave out -m"),
        (["rlhf", "--device", "abacus"], "there is no --device abacus"),
        (["rlhf", "--length", "0"], "--length is in tokens, > 0"),
        (["rlhf", "--sparse-coeffs", "adapter.saes=no", "--sae", "sae.k=0"], "sae.k must be >= 1"),
        (["train-sae", "site=mlp_out.9"], "out of range"),
        (["train-lm", "model=pythia-70m"], "train-lm makes a new model"),
        (["evaluate", "policy=nowhere"], "nowhere is not a run directory"),
        (["evaluate"], "policy has no value"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, says, capsys, monkeypatch):
    refused(words, says, capsys, monkeypatch)


def refused(words, says, capsys, monkeypatch):
    from saerl_cli import cli

    monkeypatch.setattr(sys, "argv", ["saerl", "plan", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out == ""
    line = shown.err.splitlines()[-1]
    assert line.startswith("saerl: ") and says in line


def test_what_the_job_itself_refuses_is_its_own_line(tiny_planted_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "cache_folder", lambda: tmp_path)
    words = ["rlhf", *TINY_WORDS, "algo=sft", "algo.examples=nowhere.jsonl", "launch.cpu=true"]
    refused(words, "nowhere.jsonl", capsys, monkeypatch)


def test_the_examples_compose():
    block = (ROOT / "saerl_cli" / "run" / "examples.md").read_text().split("## saerl plan\n")[1].split("```")[1]
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("saerl plan")]
    assert len(lines) >= 3
    for words in lines:
        flags = [i for i, word in enumerate(words) if word in ("--length", "--sae", "--device")]
        plain = [w for i, w in enumerate(words[3:], 3) if i not in flags and i - 1 not in flags and w != "--json"]
        composed(words[2], ["adapter=sparse_coeffs" if w == "--sparse-coeffs" else w for w in plain])


@pytest.mark.parametrize("name", command.PLANNED[:3])
def test_a_job_that_is_not_run_has_its_products_counted(name, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "cache_folder", lambda: tmp_path)
    found = command.plan(name, ["launch.cpu=true"], probing=False)
    assert "Peak memory" in table.text_of(found) and found["parameters"]["language model"] == 869_632
    assert found["machine"]["measured"] and found["timed"] is None and any("not run" in note for note in found["notes"])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_small():
    script = ROOT / "experiments" / "020-pythia-at-scale" / "measure.py"
    small = "--shape 2 32 2 64 --batch 64 --steps 2 --rollouts 8 --micro-batch 2 --prompt 4 --new 4 --kinds sae coeffs"
    done = subprocess.run([sys.executable, str(script), *small.split()], capture_output=True, text=True, timeout=300)
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [line["kind"] for line in lines] == ["sae step", "ppo phase, coeffs"], done.stderr
    assert all(line["flops"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert all(0 < line["share_of_peak"] < 1 and line["weights"] == "random" for line in lines)
