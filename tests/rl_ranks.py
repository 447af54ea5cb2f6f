"""Runs with greedy completions, in one or two processes: `python rl_ranks.py FOLDER`, which makes FOLDER/CASE/.

Greedy completions depend on the prompt alone, and with one minibatch a phase is the same set of completions however
it is split over processes; what is learned must then be the same. One start makes all runs.
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
GATES = SparsityConfig(hard_concrete=1e-3, l1=0.01, max_delta=0.5)
CASES = {
    "ppo": {},
    "ppo without the cache": {"prefix_cache": False},
    "gates": {"sparsity": GATES},
    **{algo: {"algo": algo} for algo in ("grpo", "rloo", "sft", "dpo", "rwr")},
    **{adapter: {"adapter": adapter} for adapter in ("full", "lora", "bias_only")},
}
"""Runs of `sparse_coeffs` by PPO, and what is different in them."""


def sample_greedily(trainer, tell_apart: bool) -> None:
    """Take the likeliest tokens; in a group, first words by the place among all ranks' completions tell them apart."""
    sample, temperature = trainer.sample, trainer.temperature

    def likeliest(prompt_ids):
        trainer.temperature = None
        completions = sample(prompt_ids)
        trainer.temperature = temperature
        for i, ids in enumerate(completions if tell_apart else []):
            ids[0] = 2 + 7 * ((trainer.accelerator.process_index * len(prompt_ids) + i) % 4)
        return completions

    trainer.sample = likeliest


def learn(folder: Path, name: str, algo: str = "ppo", **settings) -> None:
    """Train, and save what was learned and what was logged."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = []
    trainer = build_trainer(
        folder, algo=algo, per_device_train_batch_size=16 // world, max_steps=9, on_phase=rows.append,
        **PHASES.get(algo, {"phase_steps": 3}), **settings, ddp_backend="gloo" if world > 1 else None,
        lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
    if algo in PHASES:
        sample_greedily(trainer, tell_apart=algo in ("grpo", "rloo"))
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / name).mkdir(parents=True)
        save_file(trained(trainer), folder / name / "learned.safetensors")
        (folder / name / "rows.json").write_text(json.dumps(rows))
    trainer.accelerator.wait_for_everyone()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, settings in CASES.items():
        learn(folder, name, **settings)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
