"""Two processes that share split models: `python -m torch.distributed.run shard_ranks.py FOLDER`.

Writes FOLDER/found.json: what `test_shards.py` asks of it. Every rank runs everything, so that one launch is enough.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from rl_fixtures import build_trainer, shape, tiny_model, trained, word_tokenizer
from torch import distributed
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saerl_cli.activations import capture
from saerl_cli.config.adapter import SparsityConfig
from saerl_cli.models import resolve_sites
from saerl_cli.rl.training import checkpoint
from saerl_cli.rl.training.base import PhasedTrainer
from saerl_cli.run import shards
from saerl_cli.run.worker import leave

CASES = {
    "coefficients": {},
    "reconstruct": {"splice": "reconstruct"},
    "gates": {"sparsity": SparsityConfig(hard_concrete=1e-3, l1=0.01, max_delta=0.5)},
    "shared critic": {"critic": "shared"},
    "no cache": {"prefix_cache": False},
    "whole for sampling": {"whole_for_sampling": True},
    "checkpointing": {"activation_checkpointing": True},
    "micro-batches": {"per_device_train_batch_size": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 2},
    "stopped early": {"stop_epochs_kl": 1e-4},
    "lora": {"adapter": "lora"},
    "vectors, rloo": {"adapter": "steering_vector", "algo": "rloo"},
    "neurons, grpo": {"adapter": "neuron_basis", "algo": "grpo"},
    "coefficients, sft": {"algo": "sft"},
    "coefficients, dpo": {"algo": "dpo"},
    "coefficients, rwr": {"algo": "rwr"},
    "full": {"adapter": "full"},
    "full, sft": {"adapter": "full", "algo": "sft"},
    "full, dpo": {"adapter": "full", "algo": "dpo"},
    "full, rloo": {"adapter": "full", "algo": "rloo"},
}
"""Runs that are made with the model whole in each process, and with it split."""
LOWEST: list[bool] = []
"""One for each time that the lowest block has run: in a split model or not."""
IDS = torch.arange(2, 22).view(2, 10)


def split_model(folder: Path, whole_for_sampling: bool = False) -> GPTNeoXForCausalLM:
    """`tiny_model`, a part in each process."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config={"fsdp_size": 2})
    shards.join(model.requires_grad_(False).eval(), whole_for_sampling)
    return model


# --- training --------------------------------------------------------------------------------------------------------


def train(folder: Path, split: bool, **settings) -> tuple[PhasedTrainer, list[dict]]:
    """A trained trainer and its metrics, the clock's left out."""
    rows: list[dict] = []
    settings = dict(settings)
    at_once = settings.pop("whole_for_sampling", False)
    full = settings.get("adapter") == "full"
    if split:
        settings |= {"model": split_model(folder / "model", at_once), "save_only_model": True}
        if full and settings.get("algo") == "sft":
            settings["frozen"] = split_model(folder / "model")
        elif full:
            settings["model_init_kwargs"] = {"distributed_config": {"fsdp_size": 2}}
    settings = {"per_device_train_batch_size": 4, "phases": 2, **settings}
    trainer = build_trainer(folder, **settings, on_phase=rows.append, ddp_backend="gloo")
    if split and trainer.ref_model is not None and "frozen" not in settings:
        shards.join(trainer.ref_model)
    base = trainer.accelerator.unwrap_model(trainer.model)
    assert bool(shards.is_part(next(base.parameters()))) == split
    lowest = next(module for name, module in base.named_modules() if name.endswith("layers.0"))
    lowest.register_forward_hook(lambda *_: LOWEST.append(split))
    trainer.train()
    return trainer, [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def counted(turns: list[int], turn=shards._turn):
    """`shards._turn`, counting."""

    def count(wanted):
        turns.append(1)
        return turn(wanted)

    return count


def compare(folder: Path, settings: dict) -> dict:
    """The largest difference of a parameter, and of a metric, between the whole and the split model's run."""
    LOWEST.clear()
    one, whole_rows = train(folder, False, **settings)
    turns: list[int] = []
    shards._turn = counted(turns)
    two, split_rows = train(folder, True, **settings)
    first, second = trained(one), {name: shards.whole(p) for name, p in two.trainable()}
    assert first.keys() == second.keys()
    moved = max((p - q).abs().max().item() for p, q in zip(first.values(), initial(folder, settings), strict=True))
    saved = [checkpoint.contents(t.trainable(), t.optimizer, {}) for t in (one, two)]
    moments = max((x - saved[1].moments[name]).abs().max().item() for name, x in saved[0].moments.items())
    back = restored(two, folder, saved[1])
    while shards._splits:
        shards.leave(shards._splits[-1].model)
    return {
        "parameters": max((first[name] - second[name]).abs().max().item() for name in first),
        "moments": moments,
        "rows": [sorted(row) for row in whole_rows] == [sorted(row) for row in split_rows],
        "metrics": max(apart(a[key], b[key]) for a, b in zip(whole_rows, split_rows, strict=True) for key in a),
        "moved": moved,
        "restored": back,
        "turns": len(turns),
        "lowest": [LOWEST.count(False), LOWEST.count(True)],
    }


def apart(one: float, two: float) -> float:
    """Their difference, of numbers beyond 1 as a share of them."""
    return abs(one - two) / max(1.0, abs(one))


def initial(folder: Path, settings: dict) -> list[torch.Tensor]:
    """The trained parameters before training."""
    settings = {name: value for name, value in settings.items() if name != "whole_for_sampling"}
    return list(trained(build_trainer(folder, **settings, ddp_backend="gloo")).values())


def restored(trainer: PhasedTrainer, folder: Path, found: checkpoint.Contents) -> bool:
    """Whether a checkpoint brings back parameters and moments that were spoilt, to the bit."""
    place = folder / "checkpoint"
    found = copy.deepcopy(found)  # on the CPU what is not split is the trainer's own
    if distributed.get_rank() == 0:
        place.mkdir(exist_ok=True)
        checkpoint.save(place, found)
    distributed.barrier()
    with torch.no_grad():
        for _, parameter in trainer.trainable():
            parameter.add_(1)
    for state in trainer.optimizer.state.values():
        state["exp_avg"].add_(1)
    checkpoint.load_weights(place, trainer.trainable())
    checkpoint.load_optimizer(place, trainer.optimizer)
    again = checkpoint.contents(trainer.trainable(), trainer.optimizer, {})
    same = all(found.weights[name].equal(again.weights[name]) for name in found.weights)
    return same and all(found.moments[name].equal(again.moments[name]) for name in found.moments)


# --- passes ----------------------------------------------------------------------------------------------------------


def passes(folder: Path) -> dict:
    """Passes of a different number, kind and depth in each process give what whole models give."""
    rank = distributed.get_rank()
    found = {}
    for family, model in (("neox", tiny_model(folder / "model")), ("llama", tiny_llama(folder / "llama"))):
        path = folder / ("model" if family == "neox" else family)
        first, second = split_model(path), split_model(path)
        sites = resolve_sites(["mlp_out.0"], model)
        with torch.no_grad():
            whole = model(input_ids=IDS).logits
        lower = capture(model, sites, IDS)["mlp_out.0"]
        equal, heights = [], []

        def full(which, equal=equal, whole=whole) -> None:
            with torch.no_grad():
                equal.append(which(input_ids=IDS).logits.equal(whole))

        def low(which, equal=equal, sites=sites, lower=lower) -> None:
            equal.append(capture(which, sites, IDS)["mlp_out.0"].equal(lower))

        def runs(*_, heights=heights) -> None:
            heights.append(1)

        hook = second.get_submodule(resolve_sites(["resid_post.1"], model)[0].module).register_forward_hook(runs)
        orders = ([full, low, full, low, low], [low, full, low])[rank]
        for number, run in enumerate(orders):
            run((first, second)[(number + rank) % 2])
        shards.barrier()
        if rank == 0:  # alone, the other one helps
            for run in (low, full, low):
                run(second)
        shards.barrier()
        hook.remove()
        own = sum(p.to_local().numel() for p in first.parameters())
        found[family] = {
            "equal": all(equal) and len(equal) == (8, 3)[rank],
            "upper_layers": len(heights),
            "share": own / sum(p.numel() for p in model.parameters()),
            "split": all(map(shards.is_part, [*first.parameters(), *second.parameters()])),
            "whole": all(shards.whole(p).equal(q) for p, q in zip(first.parameters(), model.parameters(), strict=True)),
        }
        while shards._splits:
            shards.leave(shards._splits[-1].model)
    return found


def tiny_llama(folder: Path) -> LlamaForCausalLM:
    """Random weights, tied embeddings, several groups of weights outside the layers."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(1)
        neox = shape()
        sizes = {name: getattr(neox, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        tokens = {"vocab_size": neox.vocab_size, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
        LlamaForCausalLM(LlamaConfig(**sizes, **tokens, intermediate_size=64)).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


def strangers() -> str:
    """What is said of a model whose blocks are not known."""
    model = GPTNeoXForCausalLM(shape()).requires_grad_(False).eval()
    try:
        shards.split(model, [])
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    found: dict = {"passes": passes(folder), "strangers": strangers()}
    for name, settings in CASES.items():
        found[name] = compare(folder, dict(settings))
    everyone: list = [None, None]
    distributed.all_gather_object(everyone, found)
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    distributed.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
