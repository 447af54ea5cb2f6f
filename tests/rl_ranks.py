"""A PPO run with greedy completions, started with one or two processes: `python rl_ranks.py FOLDER NAME ADAPTER`.

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


def main(folder: Path, name: str, adapter: str) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows, given = [], {}
    if adapter == "gated":
        adapter, given = "sparse_coeffs", {"sparsity": SparsityConfig(hard_concrete=1e-3, l1=0.01, max_delta=0.5)}
    trainer = build_trainer(
        folder, adapter, per_device_train_batch_size=16 // world, steps_per_generation=1, num_iterations=3, max_steps=9,
        **given,
        ddp_backend="gloo" if world > 1 else None, on_phase=rows.append, kl_target=0.5, lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
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
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
