"""Peak memory of coefficient-only PPO and of generation alone, each in a process of its own.

python memory.py                        # one JSON line; resident memory from the kernel's peak, reset after loading
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("mode", nargs="?", choices=["generation", "ppo", "ppo, plain"])
p.add_argument("--width", type=int, default=512)
p.add_argument("--layers", type=int, default=6)
p.add_argument("--vocabulary", type=int, default=50304)
p.add_argument("--rollouts", type=int, default=32)
p.add_argument("--micro-batch", type=int, default=4)
p.add_argument("--tokens", type=int, default=32)
a = p.parse_args()


def resident(key: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run one mode and report."""
    import pieces
    import torch

    torch.set_num_threads(1)
    before_model = resident("VmRSS")
    model = pieces.random_model(a.layers, a.width, a.vocabulary)
    texts = pieces.prompts(a.rollouts, 8, a.vocabulary)
    with tempfile.TemporaryDirectory() as place:
        trainer = pieces.ppo(
            Path(place), model, f"mlp_out.{a.layers // 2}", texts, max_steps=16,
            per_device_train_batch_size=a.micro_batch, steps_per_generation=a.rollouts // a.micro_batch,
            gradient_accumulation_steps=a.rollouts // a.micro_batch // 4, num_iterations=4,
            max_completion_length=a.tokens, prefix_cache=a.mode != "ppo, plain",
        )  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        start = resident("VmRSS")
        if a.mode == "generation":
            ids = [trainer.processing_class(text)["input_ids"] for text in texts]
            trainer._generate_single_turn(ids, None, {}, 1)
        else:
            trainer.train()
        peak = resident("VmHWM")
    weights = sum(t.numel() * t.element_size() for t in trainer.model.parameters()) / 2**20
    pieces.report(
        kind="memory", mode=a.mode, seed=3, peak_mib=peak, start_mib=start, above_start_mib=peak - start,
        without_libraries_mib=peak - before_model, weights_mib=weights,
    )  # fmt: skip


if a.mode:
    main()
else:
    for mode in ("generation", "ppo", "ppo, plain"):
        done = subprocess.run([sys.executable, __file__, mode, *sys.argv[1:]], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        print(lines[0] if lines else json.dumps({"mode": mode, "failed": done.stderr[-2000:]}), flush=True)
