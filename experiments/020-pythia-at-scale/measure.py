"""Shapes of Pythia with random weights: SAE steps and PPO phases, their speed, peak memory and share of the peak.

python measure.py --size 410m           # JSON lines; on a GPU where there is one
python measure.py --size 6.9b --dtype bfloat16 --kinds sae coeffs

Says `random` because nothing is learned: only what it costs is measured. The share is that of operations in matrix
products, counted by torch on the very run, over what a large product reaches on the same device at the same precision.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saerl_cli.activations import capture
from saerl_cli.adapter import sparse_coeffs
from saerl_cli.config.sae import Architecture, SaeConfig
from saerl_cli.models import resolve_sites
from saerl_cli.plan.meta import PYTHIA
from saerl_cli.rl.training.config import PPOConfig
from saerl_cli.rl.training.phase import PPOTrainer
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import save_sae
from saerl_cli.sae.train import SaeTrainer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--size", choices=list(PYTHIA), default="410m")
p.add_argument(
    "--shape", type=int, nargs=4, metavar=("LAYERS", "WIDTH", "HEADS", "VOCABULARY"), help="instead of a size"
)
p.add_argument("--kinds", nargs="+", choices=["sae", "coeffs", "full"], default=["sae", "coeffs", "full"])
p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
p.add_argument("--bf16", action="store_true", help="autocast")
p.add_argument("--site", default="mlp_out.1")
p.add_argument("--expansion", type=int, default=4)
p.add_argument("--batch", type=int, default=1024)
p.add_argument("--steps", type=int, default=50)
p.add_argument("--rollouts", type=int, default=64)
p.add_argument("--micro-batch", type=int, default=4)
p.add_argument("--prompt", type=int, default=128)
p.add_argument("--new", type=int, default=128)
a = p.parse_args()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, WIDTH, HEADS, VOCABULARY = a.shape or PYTHIA[a.size]
KIND = getattr(torch, a.dtype)


def now() -> float:
    """Seconds, everything that was started having ended."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int | None:
    """Bytes allocated at most since the last call; None on a CPU, where others' count too."""
    if DEVICE.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def fastest_product(dtype: torch.dtype) -> float:
    """Operations a second that a large product reaches."""
    side = 8192 if DEVICE.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        begin = now()
        left @ right
        seconds.append(now() - begin)
    return 2 * side**3 / min(seconds[1:])


def random_model() -> GPTNeoXForCausalLM:
    """The shape with random weights, frozen."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=1, dtype=KIND,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = GPTNeoXForCausalLM(config).to(KIND)
    return model.requires_grad_(False).eval()


def counted(work: Callable[[], Any]) -> float:
    """Operations in matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def report(kind: str, seconds: float, tokens: int, flops: float, peak: float, **more: Any) -> None:
    """One JSON line."""
    line = {
        "kind": kind, "weights": "random", "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "layers": LAYERS, "width": WIDTH, "dtype": a.dtype, "bf16": a.bf16, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "flops": flops, "share_of_peak": flops / seconds / peak,
        "peak_product_flops": peak, "peak_memory_bytes": peak_memory(), **more,
    }  # fmt: skip
    print("RESULT " + json.dumps(line), flush=True)


def sae_steps() -> None:
    """Collect activations at the site once, then take steps on them."""
    model = random_model()
    sites = resolve_sites([a.site], model)
    rows = torch.randint(2, VOCABULARY, (-(-2 * a.batch // 128), 128), device=DEVICE)
    begin = now()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=a.bf16):
        x = capture(model, sites, rows)[a.site].flatten(0, 1)[: a.batch].float()
    collected = now() - begin
    settings = SaeConfig(
        architecture=Architecture.relu, expansion=a.expansion, batch_size=a.batch, tokens=10**9,
        resample_every_tokens=10**9,
    )  # fmt: skip
    trainer = SaeTrainer(WIDTH, settings, DEVICE)
    flops = counted(lambda: trainer.step(x))
    begin = now()
    for _ in range(a.steps):
        trainer.step(x)
    report(
        "sae step", (now() - begin) / a.steps, a.batch, flops, fastest_product(torch.float32),
        collecting_seconds=collected, collecting_tokens=rows.numel(),
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", pad_token="<pad>", eos_token="<eos>")


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def ppo_phase(kind: str, folder: Path) -> None:
    """Two phases: operations of the first are counted, the second is timed."""
    model = random_model()
    method = None
    if kind == "coeffs":
        sae = SAE(WIDTH, a.expansion * WIDTH)
        directions = torch.nn.functional.normalize(torch.randn(sae.d_sae, WIDTH))
        sae.W_dec.data.copy_(directions)
        sae.W_enc.data.copy_(directions.T)
        sae.site, sae.metadata = a.site, {"saerl": {"site": a.site}}
        save_sae(sae, folder / "sae" / a.site)
        method = sparse_coeffs(model, folder / "sae")
    else:
        model.save_pretrained(folder / "model")  # the reference is loaded from here
        tokenizer().save_pretrained(folder / "model")
        model.config._name_or_path = model.name_or_path = str(folder / "model")
        model.requires_grad_(True)
    ids = torch.randint(2, VOCABULARY, (2 * a.rollouts, a.prompt), generator=torch.Generator().manual_seed(2)).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in ids]
    batches = a.rollouts // a.micro_batch
    trainer = PPOTrainer(
        model=model, reward_funcs=share_of_even, processing_class=tokenizer(), peft_config=method,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        args=PPOConfig(
            output_dir=str(folder / "out"), save_strategy="no", use_cpu=DEVICE.type == "cpu", disable_tqdm=True,
            dataloader_pin_memory=False, seed=3, bf16=a.bf16, max_steps=2 * 16, num_iterations=4,
            per_device_train_batch_size=a.micro_batch, steps_per_generation=batches,
            gradient_accumulation_steps=batches // 4, max_completion_length=a.new, learning_rate=1e-6,
        ),
    )  # fmt: skip
    marks: list[tuple[float, float]] = []
    counter = FlopCounterMode(display=False)

    def on_phase(metrics: dict[str, float]) -> None:
        if not marks:
            counter.__exit__(None, None, None)
            peak_memory()
        marks.append((now(), metrics["tokens"]))

    trainer.on_phase = on_phase
    counter.__enter__()
    trainer.train()
    (first, _), (second, tokens) = marks
    flops, dtype = float(counter.get_total_flops()), torch.bfloat16 if a.bf16 else KIND
    report(f"ppo phase, {kind}", second - first, int(tokens), flops, fastest_product(dtype), rollouts=a.rollouts)


with tempfile.TemporaryDirectory() as place:
    for kind in a.kinds:
        if kind == "sae":
            sae_steps()
        else:
            ppo_phase(kind, Path(place) / kind)
