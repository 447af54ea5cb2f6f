"""A run with greedy completions, in one or two processes: `python rl_ranks.py FOLDER NAME ADAPTER ALGO [nocache]`.

Greedy completions depend on the prompt alone, and with one minibatch a phase is the same set of completions however
it is split over processes; what is learned must then be the same.
"""

import json
import os
import sys
from pathlib import Path

import torch
from rl_fixtures import build_trainer, trained
from safetensors.torch import save_file

from saerl_cli.config.adapter import SparsityConfig
from saerl_cli.run.worker import leave

ROLLOUTS = {"steps_per_generation": 1, "num_iterations": 3, "kl_target": 0.5}
PHASES = {"ppo": {**ROLLOUTS, "stop_epochs_kl": 0.03}, "grpo": ROLLOUTS, "rloo": ROLLOUTS}


def tell_apart(trainer) -> None:
    """Give the greedy completions of a group different first words, by their place among those of all ranks."""
    generate = trainer._generate

    def differing(prompts, *args, **kwargs):
        generated = generate(prompts, *args, **kwargs)
        for i, ids in enumerate(generated[1]):
            ids[0] = 2 + 7 * ((trainer.accelerator.process_index * len(prompts) + i) % 4)
        return generated

    trainer._generate = differing


def main(folder: Path, name: str, adapter: str, algo: str, *flags: str) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows, given = [], {}
    if adapter == "gated":
        adapter, given = "sparse_coeffs", {"sparsity": SparsityConfig(hard_concrete=1e-3, l1=0.01, max_delta=0.5)}
    given |= PHASES.get(algo, {"phase_steps": 3})
    if "nocache" in flags:
        given["prefix_cache"] = False
    trainer = build_trainer(
        folder, adapter, algo=algo, per_device_train_batch_size=16 // world, max_steps=9, on_phase=rows.append,
        **given, ddp_backend="gloo" if world > 1 else None, lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
    if algo in ("grpo", "rloo"):
        tell_apart(trainer)
    if algo in PHASES:
        trainer.generation_config.do_sample = False
        trainer.generation_config.top_k = trainer.generation_config.temperature = None  # else generate() warns
    trainer.train()
    if trainer.accelerator.is_main_process:
        save_file(trained(trainer), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(rows))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
