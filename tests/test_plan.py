"""`saerl plan`: sizes against real models, caches, graphs and counters; times; refusals."""

import json
import shlex
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from saerl_cli.config.adapter import AdapterConfig, Splice
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.plan import command, machine, metrics, runs, supervised, table, work
from saerl_cli.plan.compose import composed
from saerl_cli.plan.examples import Examples, from_lengths
from saerl_cli.plan.policy import Policy
from saerl_cli.plan.runs import RUNS
from saerl_cli.plan.sae import estimate as estimate_sae
from saerl_cli.plan.shapes import PYTHIA, from_description, shape_of
from saerl_cli.planted.cache import planted_shape

PUBLISHED = {
    "14m": 14_067_712, "31m": 30_494_720, "70m": 70_426_624, "160m": 162_322_944, "410m": 405_334_016,
    "1b": 1_011_781_632, "1.4b": 1_414_647_808, "2.8b": 2_775_208_960, "6.9b": 6_857_302_016, "12b": 11_846_072_320,
}  # fmt: skip
TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def tiny(**changes) -> GPTNeoXForCausalLM:
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, max_position_embeddings=64, **dropout, **changes)).eval()


def hub(size: str) -> ModelConfig:
    return ModelConfig(kind=ModelKind.hub, name=f"EleutherAI/pythia-{size}")


# --- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PYTHIA)
def test_parameters_of_pythia_are_the_published_ones(size):
    assert shape_of(hub(size))[0].parameters == PUBLISHED[size]
    assert shape_of(hub(f"{size}-deduped"))[0].parameters == PUBLISHED[size]


@pytest.mark.parametrize("size", ["70m", "410m", "1.4b", "6.9b"])
def test_and_those_of_the_real_classes(size):
    shape, described = shape_of(hub(size))
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**vars(described)))
    layer = model.gpt_neox.layers[0]
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() for p in layer.parameters()) == shape.block
    assert sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias")) == shape.biases
    assert sum(p.numel() for p in model.gpt_neox.parameters()) == shape.trunk


def test_the_embedded_model_and_local_ones_are_counted(shared_data):
    config = ModelConfig()
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**planted_shape(config.planted)))
    assert shape_of(config)[0].parameters == sum(p.numel() for p in model.parameters()) == 869_632
    nano = ModelConfig(kind=ModelKind.local, path=str(shared_data / "neox_stories_nano"))
    assert shape_of(nano)[0].parameters == 265_600


def test_another_architecture_is_counted_from_its_modules():
    """A Llama by hand: embedding 50 x 32 tied, per layer four attention and three MLP matrices and two norms."""
    config = SimpleNamespace(
        model_type="llama", num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=64,
        **(TINY | {"intermediate_size": 48}),
    )  # fmt: skip
    shape = from_description(config)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert shape.block == block
    assert shape.parameters == 50 * 32 + 3 * block + 32
    assert shape.kv_bytes(rows=1, tokens=1, size=4) == 2 * 3 * 16 * 4


# --- what is trained ------------------------------------------------------------------------------------------------


def adapters() -> dict[str, AdapterConfig]:
    kinds = ("lora", "ia3", "steering_vector", "bias_only", "neuron_basis")
    chosen = {name: AdapterConfig(kind=name) for name in kinds}
    random = {"kind": "random_dictionary", "sites": ["mlp_out.1", "mlp_out.2"], "d_sae": 40, "k": 4}
    return chosen | {
        "lora of rank 3": AdapterConfig(kind="lora", rank=3, targets=["dense"]),
        "lora to match": AdapterConfig(kind="lora", match=700),
        "ia3 somewhere": AdapterConfig(kind="ia3", targets=["dense_h_to_4h"]),
        "random": AdapterConfig(**random),
        "random with biases": AdapterConfig(**random, splice=Splice.pre_activation),
    }


@pytest.mark.parametrize("name", adapters())
def test_trained_numbers_are_the_adapter_s(name, tiny_planted_model, tmp_path):
    from peft import get_peft_model

    from saerl_cli.models import load_model
    from saerl_cli.rl.adapters import peft_config
    from saerl_cli.sae.autoencoder import SAE
    from saerl_cli.sae.files import save_sae

    model, adapter = ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)), adapters()[name]
    loaded, saes = load_model(model), {}
    for site in adapter.sites or [] if adapter.d_sae else []:
        sae = SAE(32, 40, "topk", 4)
        sae.site, sae.metadata = site, {"saerl": {"site": site}}
        saes["mlp_out.1"] = save_sae(sae, tmp_path / site)
    if saes:  # the tiny model has two layers
        adapter.sites = ["mlp_out.1"]
        sae.site = "mlp_out.1"
        saes = {"mlp_out.1": save_sae(sae, tmp_path / "one" / "mlp_out.1")}
    real = get_peft_model(loaded.model, peft_config(adapter, loaded, saes))
    count = sum(p.numel() for p in real.parameters() if p.requires_grad)
    config = composed("rlhf", [])
    config.model, config.adapter = model, adapter
    assert Policy(config, [], None).trained == count


def test_full_training_and_the_critics():
    policy = Policy(composed("rlhf", []), [], None)
    assert (policy.trained, policy.critic) == (869_632, 129)
    separate = Policy(composed("rlhf", ["algo.critic=separate"]), [], None)
    assert separate.critic == 869_632 - 298 * 128 + 129
    assert Policy(composed("rlhf", ["algo=grpo"]), [], None).critic == 0


# --- bytes and operations -------------------------------------------------------------------------------------------


def test_keys_and_values_are_those_of_the_cache():
    model, cache = tiny(), DynamicCache()
    model(input_ids=torch.zeros(5, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert from_description(model.config).kv_bytes(rows=5, tokens=7, size=4) == held == 2 * 3 * 32 * 5 * 7 * 4


@pytest.mark.parametrize(("grad", "frozen"), [("inputs", True), ("weights", False)])
def test_activations_are_those_that_the_graph_keeps(grad, frozen):
    """Distinct storages that autograd saves, other than parameters, of one layer more."""

    def saved(layers: int) -> int:
        model = tiny()
        model.gpt_neox.layers = model.gpt_neox.layers[:layers]
        model.config.num_hidden_layers = layers
        model.requires_grad_(not frozen)
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(4, 16, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.gpt_neox(inputs_embeds=x).last_hidden_state
        assert out.requires_grad
        return sum(kept.values())

    widths = (saved(3) - saved(2)) / (4 * 16 * 32 * 4)
    # An MLP twice as wide as the stream keeps fewer hidden units than Pythia's, which is four times as wide.
    narrower = {"inputs": 2, "weights": 4}[grad]
    assert widths == pytest.approx(work.SAVED[grad] - narrower, rel=0.03)


@pytest.mark.parametrize("grad", ["none", "weights"])
def test_operations_are_those_that_torch_counts(grad):
    model = tiny(attn_implementation="eager")
    shape = from_description(model.config)
    ids = torch.zeros(4, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model.gpt_neox(input_ids=ids, use_cache=False).last_hidden_state
        if grad == "weights":
            hidden.sum().backward()
    found = work.forward(shape, 3, 4, 16, "float32", grad).flops
    # Nothing is multiplied for the gradient of the embedding's output but that of the first layer.
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_operations_with_frozen_weights():
    model = tiny(attn_implementation="eager").requires_grad_(False)
    x = torch.randn(4, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.gpt_neox(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    found = work.forward(from_description(model.config), 3, 4, 16, "float32", "inputs").flops
    assert found == counter.get_total_flops()


def test_a_step_of_decoding_by_hand():
    """Two rows behind 5 tokens: 3 layers of 2 x (4 x 32 x 32 + 2 x 32 x 64) and 4 x 5 x 32, and the head."""
    shape = from_description(tiny().config)
    assert work.decode(shape, 2, 5, "float32").flops == 2 * (3 * (2 * 8192 + 640) + 2 * 50 * 32)


def test_what_the_trainer_of_an_sae_holds():
    found = estimate_sae(composed("train_sae", ["site.names=[mlp_out.1,mlp_out.2]", "sae.expansion=4"]))
    each = 2 * 128 * 512 + 512 + 128
    assert found.parameters["SAEs"] == 2 * each
    assert found.stays["SAEs"] == found.stays["their gradients"] == 2 * 4 * each
    assert found.stays["their optimiser"] == 2 * 8 * each
    assert found.stays["shuffle buffer"] == 2 * 65_536 * 128 * 4
    (activations,) = [phase for phase in found.phases if phase.name == "activations"]
    assert activations.count == -(-(2_000_000 // 2048) // 32)
    (part,) = [part for _, part in activations.work if part.kind == "forward"]
    assert dict(part.sizes)["layers"] == 3  # nothing above the highest site


def test_processes_share_batches():
    one, two = (
        command.estimate("rlhf", composed("rlhf", ["launch.cpu=true", f"launch.num_processes={n}"]), [], None)
        for n in (1, 2)
    )
    update = {e.processes: next(p for p in e.phases if p.name == "updates") for e in (one, two)}
    tokens = {n: next(w for _, w in p.work if w.kind == "forward").flops for n, p in update.items()}
    assert tokens[1] == 2 * tokens[2]
    assert two.stays["gradients"] == 2 * one.stays["gradients"]  # the buckets of DDP


def test_a_split_model_is_held_in_parts():
    words = ["launch=fsdp2", "launch.cpu=true", "launch.num_processes=2"]
    kinds = {"full": [], "lora": ["adapter=lora"]}
    for kind, adapter in kinds.items():
        whole, split = (
            command.estimate("rlhf", composed("rlhf", [*adapter, *launch]), [], None)
            for launch in (["launch=cpu_2"], words)
        )
        assert split.stays["language model"] == whole.stays["language model"] / 2
        shape = Policy(composed("rlhf", adapter), [], None).shape
        assert split.stays["gathered weights"] == 4 * (2 * shape.embedding + shape.block + shape.norm)
        critic = 128 + 1
        if kind == "full":
            assert split.stays["its frozen copy"] == whole.stays["its frozen copy"] / 2
            assert split.stays["optimiser"] == 8 * (shape.parameters / 2 + critic)
            assert split.stays["gradients"] == 4 * (shape.parameters / 2 + 2 * critic)
        else:  # what is added is whole in every process
            assert split.stays["optimiser"] == whole.stays["optimiser"]
            assert split.stays["gradients"] == whole.stays["gradients"]
        at_once = command.estimate(
            "rlhf", composed("rlhf", [*adapter, *words, "launch.gather_for_sampling=true"]), [], None
        )
        assert any("split weights" in note for note in command.described(split, machine.published("h200"))["notes"])
        (sampling,) = [phase for phase in at_once.phases if phase.name == "generation"]
        assert sampling.holds["the other blocks"] == 4 * (shape.layers - 1) * shape.block
    sae = [estimate_sae(composed("train_sae", launch)).stays for launch in (["launch=cpu_2"], words)]
    assert sae[1]["language model"] == sae[0]["language model"] / 2 and "gathered weights" in sae[1]


def test_the_frozen_part_is_left_out_above_the_lowest_site():
    words = ["adapter=random_dictionary", "adapter.d_sae=64", "adapter.k=4", "adapter.sites=[mlp_out.2]"]
    policy = Policy(composed("rlhf", words), [], None)
    assert policy.above == 1  # of four layers the last; of the site's own only the sum
    assert Policy(composed("rlhf", [*words, "algo.prefix_cache=false"]), [], None).above == 4


# --- sft, dpo, rwr --------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes of storages made inside that are alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tensors(out)):
            key = storage._cdata
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, key)
        return out

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_of(part: work.Piece) -> int:
    call = RUNS[part.kind](torch.device("cpu"), **dict(part.sizes))
    with Peak() as peak:
        call()
    return peak.most


@pytest.mark.parametrize("grad", ["none", "inputs", "weights"])
def test_trl_s_head_holds_so_many_tiles(grad):
    shape = replace(from_description(tiny().config), vocabulary=work.FUSED_COLUMNS, width=8)
    cpu, gpu = work.fused_bytes(shape, 40, "float32", grad)
    assert gpu == 40 * work.FUSED_COLUMNS * 4
    assert cpu == pytest.approx(peak_of(work.fused(shape, 40, "float32", grad, "entropy,is_top1")), rel=0.08)


@pytest.mark.parametrize("grad", ["inputs", "weights"])
def test_the_weighted_likelihood_holds_so_many_matrices(grad):
    sizes = {"width": 8, "vocabulary": 1000, "rows": 4, "seq": 40, "grad": grad, "dtype": "float32"}
    found = peak_of(work.piece("likelihood", 0, 0, 0, **sizes))
    assert found == pytest.approx(supervised.WHOLE * 4 * 4 * 40 * 1000, rel=0.08)


@pytest.mark.parametrize(("topk", "matrices"), [(True, metrics.TOPK_FEATURES), (False, metrics.FEATURES)])
def test_encoding_holds_so_many_matrices(topk, matrices):
    part = work.dictionary(8, 1000, 4, topk, 500, "values")
    assert matrices * 4 * 500 * 1000 == pytest.approx(peak_of(part), rel=0.08)


def product(added, a, b, *_, **__) -> int:
    """Operations of `added += a @ b`, from shapes: torch counts none of those in place."""
    return 2 * a[0] * a[1] * b[1]


def policy_of(folder: Path, algo: str, adapter: str) -> Policy:
    config = composed("rlhf", [f"algo={algo}", f"adapter={adapter}", "algo.batch_size=8"])
    config.model = ModelConfig(kind=ModelKind.local, path=str(folder))
    config.algo.max_new_tokens = 4
    return Policy(config, [], None)


@pytest.mark.parametrize("adapter", ["full", "steering_vector"])
@pytest.mark.parametrize(("algo", "longest"), [("sft", 12), ("dpo", 7), ("rwr", 6)])
def test_a_step_computes_what_its_trainer_does(tmp_path, algo, longest, adapter):
    """Products in the first optimiser step of the real trainer, with every product written out (eager attention)."""
    from rl_fixtures import build_trainer, tiny_model

    model = tiny_model(tmp_path / "model")
    model.set_attn_implementation("eager")
    trainer, seen = build_trainer(tmp_path, adapter, algo=algo, model=model, phases=1), []
    true = trainer.training_step

    def counting(model, inputs, *more):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
            loss = true(model, inputs, *more)
        seen.append((inputs["input_ids"].shape, counter.get_total_flops()))
        return loss

    trainer.training_step = counting
    if trainer.ref_model is not None:
        trainer.ref_model.set_attn_implementation("eager")
    trainer.train()
    (rows, length), counted = seen[0]
    assert (rows, length) == (16 if algo == "dpo" else 8, longest)
    policy = policy_of(tmp_path / "model", algo, adapter)
    planned = supervised.stepped(policy, Examples(1, 1, length, length, length, [], []))
    assert sum(times * part.flops for times, part in planned) == pytest.approx(counted, rel=0.02)


def test_pairs_are_padded_to_the_longest_of_a_batch():
    found = from_lengths([3, 5, 4, 9, 2], context=8, rows=2, number=100, heldout=10, reading=[], notes=[], sides=2)
    assert (found.sequences, found.heldout) == (200, 20)
    assert (found.mean, found.padded, found.longest) == (14 / 4, (5 + 4) / 2, 5)  # the ninth does not fit


def test_planted_pairs_and_documents_are_as_long_as_their_tokens():
    words = ["algo=dpo", "algo.pairs.count=60"]
    found = supervised.examples_of(Policy(composed("rlhf", words), [], None))
    assert (found.sequences, found.heldout) == (120, 400)
    assert 30 < found.mean < found.padded <= found.longest <= 96
    packed = supervised.examples_of(Policy(composed("rlhf", ["algo=sft", "data.max_documents=3000"]), [], None))
    assert packed.padded == packed.longest == 96
    assert packed.sequences == pytest.approx(3000 * 32 / 96)


def test_an_examples_file_is_counted_by_the_model_s_tokenizer(tmp_path, tiny_planted_model):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join('{"prompt": "the movie", "completion": "was good ."}' for _ in range(10)))
    config = composed("rlhf", ["algo=sft", f"algo.examples={file}"])
    config.model = ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model))
    found = supervised.examples_of(Policy(config, [], None))
    assert (found.sequences, found.heldout, found.padded) == (9, 1, 6)  # with the end token


def phases_of(name: str, *words: str, saes: tuple[str, ...] = ()) -> dict[str, work.Phase]:
    found = command.estimate(name, composed(name.replace("-", "_"), words), list(saes), None)
    return {phase.name: phase for phase in found.phases}


def test_what_each_supervised_algorithm_does_besides():
    rwr, sft, dpo = (phases_of("rlhf", f"algo={algo}", "algo.phases=7") for algo in ("rwr", "sft", "dpo"))
    assert [phases["steps"].count for phases in (rwr, sft, dpo)] == [70, 70, 70]
    assert "drawing" in rwr and "held-out examples" not in rwr
    assert "held-out examples" in sft and "held-out examples" in dpo and "drawing" not in dpo
    rows = [dict(part.sizes)["rows"] for part in (p for _, p in dpo["steps"].work) if part.kind == "forward"]
    assert rows == [64, 64]  # both sides of 32 pairs, by policy and reference
    short = phases_of("rlhf", "algo=rwr", "algo.draws=512")["drawing"].flops
    assert rwr["drawing"].flops == pytest.approx(16 * short)


def test_gradients_go_back_to_the_lowest_site_only():
    adapter = ["adapter=random_dictionary", "adapter.d_sae=64", "adapter.k=4", "adapter.sites=[mlp_out.1,mlp_out.2]"]
    parts = [part for _, part in phases_of("rlhf", "algo=sft", *adapter)["steps"].work]
    layers = {dict(p.sizes)["grad"]: dict(p.sizes)["layers"] for p in parts if p.kind == "forward"}
    assert layers == {"inputs": 2, "none": 2}
    assert [dict(p.sizes)["how"] for p in parts if p.kind == "splice"] == ["first", "back"]


def test_a_cpu_s_temporaries_are_none_of_a_gpu():
    found = command.estimate("rlhf", composed("rlhf", ["algo=sft"]), [], None)
    (steps,) = [phase for phase in found.phases if phase.name == "steps"]
    gpu = command.described_phase(steps, machine.published("h200"), 0.0)
    rates = machine.Rates(1e9, 1e9, 1e9, 1e-6)
    cpu = command.described_phase(steps, machine.Machine("here", True, 1, True, 1e9, rates, {}), 0.0)
    assert cpu["holds_bytes"]["activations"] == gpu["holds_bytes"]["activations"]
    assert cpu["holds_bytes"]["logits"] == round(8.25 * 4 * 32 * 96 * 298)
    assert gpu["holds_bytes"]["logits"] == 4 * 32 * 96 * 32_768
    assert "examples" not in command.described(found, machine.published("h200"))["stays_bytes"]


# --- eval-sae -------------------------------------------------------------------------------------------------------


def test_an_evaluation_of_saes_that_are_not_there_is_that_of_what_train_sae_makes():
    saes = ("site=mlp_out.2", "sweep=[{k:[4,8]}]", "sae.expansion=4")
    found = command.estimate("eval-sae", composed("eval_sae", ["saes=none"]), list(saes), None)
    each = 2 * 128 * 512 + 512 + 128
    assert found.parameters == {"language model": 869_632, "SAEs": 2 * each}
    phases = {phase.name: phase for phase in found.phases}
    assert list(phases) == ["start and text", "metrics", "stability", "probes", "table and figures"]
    passes = [times for times, part in phases["metrics"].work if part.kind == "logits"]
    assert passes == [pytest.approx(50_000 / (85 * 96) * (1 + 2 + 2))]  # base, two ablations, two SAEs
    assert any("none is not there yet" in note for note in found.notes)


def test_controls_train_two_saes_for_each_and_measure_four():
    phases = phases_of("eval-sae", "saes=none", "controls=true", "control_tokens=40960", saes=("site=mlp_out.2",))
    assert phases["training controls"].count == 2
    steps = [times for times, part in phases["training controls"].work if part.kind == "sae_step"]
    assert steps == [20]
    assert phases["metrics of controls"].flops == pytest.approx(4 * phases["metrics"].flops)
    assert phases["training controls"].holds["shuffle buffer"] == 65_536 * 128 * 4


def test_an_evaluation_of_saes_reads_them_and_their_run(tmp_path):
    from omegaconf import OmegaConf
    from rl_fixtures import tiny_sae

    tiny_sae(tmp_path / "sae", "mlp_out.1", width=128, features=300)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.structured(composed("train_sae", [])), tmp_path / ".hydra" / "config.yaml")
    words = [f"saes={tmp_path}", "controls=true", "eval_tokens=1000", "probe_tokens=100"]
    found = command.estimate("eval-sae", composed("eval_sae", words), [], None)
    assert found.parameters["SAEs"] == 2 * 128 * 300 + 300 + 128
    names = [phase.name for phase in found.phases]
    assert "training controls" not in names and "metrics of controls" in names  # another tool's: nothing to train alike


def test_a_worker_s_memory_is_its_own(monkeypatch):
    """However much the process holds that starts it."""
    monkeypatch.setattr(runs, "BEGIN", "found = bytearray({modules})")
    monkeypatch.setitem(runs.IMPORTS, "little", "2**25")
    ballast = torch.ones(2**28 // 4)  # 256 MiB
    assert 2**25 < runs.started("little")["resident_bytes"] < 2**27 < ballast.nbytes


# --- times ----------------------------------------------------------------------------------------------------------


def test_times_of_pieces_come_first_and_the_roofline_else():
    rates = machine.Rates(float32=1e9, low=4e9, bandwidth=1e8, call=1e-3)
    here = machine.Machine("a machine", True, 1, True, 1e9, rates, {"known": {"seconds": 7.0}})
    known = work.piece("known", 1e9, 0, 0)
    assert here.total([(2, known)]) == 14
    assert here.seconds(work.piece("products", 3e9, 1e8, 1)) == pytest.approx(3.001)
    assert here.seconds(work.piece("memory", 1e8, 3e8, 0)) == pytest.approx(3)
    assert here.seconds(work.piece("low", 4e9, 0, 0, dtype="bfloat16")) == pytest.approx(1)
    assert here.timed([(1, known), (1, work.piece("other", 7e9, 0, 0))]) == pytest.approx(0.5)


def test_a_large_piece_is_timed_smaller_and_scaled():
    from saerl_cli.plan.probe import smaller

    shape = shape_of(hub("6.9b"))[0]
    parts = smaller(work.forward(shape, 32, 16, 512, "float32"))
    layers = [dict(part.sizes)["layers"] for _, part in parts]
    assert set(layers) == {0, 1}
    tokens = sum(times * dict(part.sizes)["rows"] for times, part in parts if dict(part.sizes)["layers"] == 1)
    assert tokens == pytest.approx(32 * 16)  # as many rows and layers in all
    small = work.forward(shape_of(ModelConfig())[0], 4, 2, 16, "float32")
    assert smaller(small) == [(1, small)]


def test_a_probe_times_real_pieces_once_and_keeps_them(tmp_path, monkeypatch):
    from saerl_cli.plan import probe as probes
    from saerl_cli.plan.probe import RUNS, probe

    monkeypatch.setenv("SAERL_CACHE", str(tmp_path))
    monkeypatch.setattr(probes, "ENOUGH_S", 0.001)
    shape = from_description(tiny().config)
    parts = [
        work.forward(shape, 2, 2, 8, "float32", "weights"),
        work.decode(shape, 2, 5, "float32"),
        work.score(shape, 16, "float32", "inputs"),
        work.score(shape, 16, "float32", "weights"),
        work.fused(shape, 16, "float32", "weights", "entropy"),
        next(w for _, w in phases_of("rlhf", "algo=rwr", "algo.batch_size=2")["steps"].work if w.kind == "likelihood"),
        work.logits(shape, 16, "float32"),
        *(work.splice(32, 64, 4, True, 16, how) for how in ("encode", "known", "first", "back")),
        *(work.dictionary(32, 64, 4, topk, 16, "values") for topk in (True, False)),
        work.piece("newton", 0, 0, 0, labels=2, rows=40, columns=2),
        work.piece("lbfgs", 0, 0, 0, labels=2, rows=40, columns=8, steps=3),
        work.piece("matching", 0, 0, 0, width=16),
        work.splice(32, 64, 4, False, 16, "encode"),
        work.adam(1000),
        next(w for p in estimate_sae(composed("train_sae", [])).phases for _, w in p.work if w.kind == "sae_step"),
    ]
    first = probe(parts, 1, True, 30.0)
    assert all(first.known[part.key]["seconds"] > 0 for part in parts)
    monkeypatch.setitem(RUNS, "forward", None)  # would fail if it were timed again
    again = probe(parts, 1, True, 30.0)
    assert again.known == first.known
    assert len(list((tmp_path / "plan").iterdir())) == 1
    assert probe([work.adam(77)], 1, True, 0.0).known == first.known  # no time, no piece


# --- the command ----------------------------------------------------------------------------------------------------


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
    assert not found["machine"]["measured"] and any("not measured" in note for note in found["notes"])
    assert any("runs/none is not there yet" in note for note in found["notes"])


def test_unconstrained_training_of_the_largest_does_not_fit_and_says_so(saerl):
    done = saerl("plan", "rlhf", "model=pythia-6.9b", "--device", "a100-80gb", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "does NOT fit" in done.stdout and "6,857,302,016" in done.stdout
    assert "not measured" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["dance"],
            "saerl plan has no word dance; write one of train-lm, train-sae, train-reward, rlhf, evaluate, eval-sae",
        ),
        (["rlhf", "algo.rolouts=3"], "there is no setting algo.rolouts; did you mean algo.rollouts?"),
        (["rlhf", "algo.rollouts=-1"], "algo.rollouts must be >= 1"),
        (["rlhf", "algo=sft", "algo.examples=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval-sae", "saes=.", "probes=nowhere.jsonl"], "no SAEs in ."),
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
    from saerl_cli import cli

    monkeypatch.setattr(sys, "argv", ["saerl", "plan", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("saerl: ") and says in line


def test_the_readme_s_plans_compose():
    block = (ROOT / "README.md").read_text().split("## Before it runs\n")[1].split("```")[1]
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("saerl plan")]
    assert len(lines) >= 3
    for words in lines:
        flags = [i for i, word in enumerate(words) if word in ("--length", "--sae", "--device")]
        plain = [w for i, w in enumerate(words[3:], 3) if i not in flags and i - 1 not in flags and w != "--json"]
        composed(words[2].replace("-", "_"), ["adapter=sparse_coeffs" if w == "--sparse-coeffs" else w for w in plain])


@pytest.mark.parametrize("name", command.PLANNED[:3])
def test_tables_of_other_commands(name):
    found = command.described(
        command.estimate(name, composed(name.replace("-", "_"), []), [], None), machine.published("h200")
    )
    shown = table.text_of(found)
    assert "Peak memory" in shown and "869,632" in shown
    assert found["peak_bytes"] == max(phase["peak_bytes"] for phase in found["phases"])
    assert found["seconds"] == pytest.approx(sum(phase["count"] * phase["seconds"] for phase in found["phases"]))


def test_an_evaluation_is_planned_from_its_run(tmp_path):
    (tmp_path / ".hydra").mkdir()
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(composed("rlhf", [])), tmp_path / ".hydra" / "config.yaml")
    (tmp_path / "run.json").write_text('{"job": "rlhf"}')

    def seconds(*words: str) -> float:
        config = composed("evaluate", [f"policy={tmp_path}", *words])
        found = command.described(command.estimate("evaluate", config, [], None), machine.published("h200"))
        return sum(phase["count"] * phase["seconds"] for phase in found["phases"] if phase["name"] != "start and text")

    assert seconds("factors=[0.5]") > seconds() > seconds("evaluation.samples=16")


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_small():
    script = ROOT / "experiments" / "020-pythia-at-scale" / "measure.py"
    small = "--shape 2 32 2 64 --batch 64 --steps 2 --rollouts 8 --micro-batch 2 --prompt 4 --new 4 --kinds sae coeffs"
    done = subprocess.run([sys.executable, str(script), *small.split()], capture_output=True, text=True, timeout=300)
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [line["kind"] for line in lines] == ["sae step", "ppo phase, coeffs"], done.stderr
    assert all(line["flops"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert all(0 < line["share_of_peak"] < 1 and line["weights"] == "random" for line in lines)
