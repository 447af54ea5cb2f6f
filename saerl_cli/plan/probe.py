"""Timing of pieces of work on the present machine: real layers, SAEs and optimisers with random weights.

Seconds are CPU seconds of this process where it computes on the CPU, so that others who share the machine do not count,
and elapsed seconds on a GPU. What would take long is timed smaller and scaled: few layers, few rows, small batches.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from saerl_cli.config.sae import SaeConfig
from saerl_cli.plan import machine as machines
from saerl_cli.plan.machine import Machine
from saerl_cli.plan.work import Piece, Work
from saerl_cli.run.progress import say

AT_ONCE = 2e10
"""Operations in a piece that is timed as it is; a larger one is timed smaller."""
LARGEST = 2e9
"""Bytes that a timed piece may hold, about."""
REPEATS, ENOUGH_S = 9, 0.8
"""A piece is repeated so often, or for so long; the median counts: a job gets the machine as it is, not at its best."""
IMPORTS = {
    "lm": "saerl_cli.world.job, saerl_cli.world.train",
    "sae": "saerl_cli.sae.job, saerl_cli.sae.train, saerl_cli.sae.results, saerl_cli.sae.metrics",
    "rl": "saerl_cli.rl.build, saerl_cli.rl.job, saerl_cli.rl.summary",
}
"""What a worker imports."""


@dataclass
class Clock:
    """Times calls on a device."""

    device: torch.device

    def now(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def spent(self) -> float:
        """Seconds of this process and of those that it has started."""
        return time.perf_counter() if self.device.type == "cuda" else sum(os.times()[:4])

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median of some calls after one that warms up."""
        call()
        found: list[float] = []
        while len(found) < REPEATS and (not found or sum(found) < ENOUGH_S):
            begin = self.now()
            call()
            found.append(self.now() - begin)
        return statistics.median(found)


def probe(pieces: Iterable[Piece], threads: int, cpu: bool, budget: float, fresh: bool = False) -> Machine:
    """The present machine, with the times of these pieces; what was timed before is taken from its file.

    Args:
        pieces: those that matter most first.
        threads: CPU threads of a process.
        cpu: leave a GPU alone.
        budget: seconds after which no further piece is begun; CPU seconds where it computes on the CPU.
        fresh: time everything again.
    """
    device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
    torch.set_num_threads(threads)
    on_cpu = device.type == "cpu"
    hardware = machines.cpu_name() if on_cpu else torch.cuda.get_device_name(device)
    memory = psutil.virtual_memory().total if on_cpu else torch.cuda.get_device_properties(device).total_memory
    file = machines.file_of(hardware, threads, torch.__version__)
    record = {} if fresh else machines.load(file)
    clock = Clock(device)
    deadline = clock.spent() + budget
    if not record:
        record = {"hardware": hardware, "threads": threads, "torch": torch.__version__}
        record |= {"rates": measured_rates(clock), "pieces": {}}
    known, told = record["pieces"], False
    for part in pieces:
        if part.key in known or part.kind not in RUNS:
            continue
        if clock.spent() >= deadline:
            break
        if not told:
            say(f"timing pieces of this job on {hardware} ({threads} threads), {budget:g} s at most")
            told = True
        known[part.key] = timed(part, clock) | {"flops": part.flops}
    machines.keep(file, record)
    return machines.from_record(record, on_cpu, memory)


def measured_rates(clock: Clock) -> dict[str, float]:
    """Rates of a machine at sizes that suit it, for pieces that are not timed."""
    side = 1024 if clock.device.type == "cpu" else 8192
    rate = {}
    for name, dtype in (("float32", torch.float32), ("low", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        rate[name] = 2 * side**3 / clock.seconds(lambda a=a, b=b: a @ b)
    block = torch.zeros(2**24, device=clock.device)
    copy = torch.zeros_like(block)
    bandwidth = 8 * len(block) / clock.seconds(lambda: copy.copy_(block))
    few = torch.zeros(16, device=clock.device)

    def small() -> None:
        for _ in range(1000):
            few.add_(1)

    return rate | {"bandwidth": bandwidth, "call": clock.seconds(small) / 1000}


# --- smaller than asked ---------------------------------------------------------------------------------------------


def timed(part: Piece, clock: Clock) -> dict[str, float]:
    """Seconds of a piece, and what else was found."""
    if part.kind == "start":
        return started(**dict(part.sizes))
    runs = [(times, RUNS[small.kind](clock.device, **dict(small.sizes))) for times, small in smaller(part)]
    return {"seconds": max(0.0, sum(times * clock.seconds(run) for times, run in runs))}


def smaller(part: Piece) -> Work:
    """Pieces that are quickly timed, and how often each to count so that they make up this one."""
    sizes = dict(part.sizes)
    if part.flops <= AT_ONCE and part.bytes <= LARGEST:
        return [(1, part)]
    if sizes.get("layers", 1) > 1:  # what all layers share, and one of them so often
        one, none = (with_sizes(part, layers=n) for n in (1, 0))
        scale = 1 / sizes["layers"]
        one = replace(one, flops=part.flops * scale, bytes=part.bytes * scale)
        return [
            *((sizes["layers"] * times, p) for times, p in smaller(one)),
            *(((1 - sizes["layers"]) * times, p) for times, p in smaller(replace(none, flops=0, bytes=0))),
        ]
    for name, least in (("rows", 1), ("tokens", 32), ("batch", 32), ("numbers", 2**20)):
        count = sizes.get(name, 0)
        share = min(1.0, AT_ONCE / max(part.flops, 1), LARGEST / max(part.bytes, 1))
        few = max(least, int(count * share))
        if count > 2 * few:
            return along(part, name, few, count)
    return [(1, part)]


def along(part: Piece, name: str, few: int, count: int) -> Work:
    """A piece extrapolated in a straight line from two smaller ones."""
    half = max(1, few // 2)
    if half == few:
        return [(count / few, with_sizes(part, **{name: few}))]
    rise = (count - few) / (few - half)
    return [(1 + rise, with_sizes(part, **{name: few})), (-rise, with_sizes(part, **{name: half}))]


def with_sizes(part: Piece, **changes: Any) -> Piece:
    """The same kind of piece with other sizes."""
    return replace(part, sizes=tuple((dict(part.sizes) | changes).items()))


# --- what is timed --------------------------------------------------------------------------------------------------


BEGIN = """
import resource
import statistics
import accelerate, torch, transformers, {modules}
accelerate.Accelerator(cpu=True)
model = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""
"""What every worker does before it works: imports, and a first pass forward and back."""


def started(modules: str) -> dict[str, float]:
    """CPU seconds and resident bytes of a process that begins; `command` is the one that reads the words."""
    worker = ["-c", BEGIN.format(modules=IMPORTS.get(modules))]
    words = ["-m", "saerl_cli.cli", "rlhf", "--cfg", "job"] if modules == "command" else worker
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds} | ({} if modules == "command" else {"resident_bytes": float(done.stdout.split()[-1])})


def network(device: torch.device, width: int, hidden: int, heads: int, layers: int, vocabulary: int, dtype: str) -> Any:
    """A random model of Pythia's architecture."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=hidden, max_position_embeddings=2048,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return GPTNeoXForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def run_forward(
    device: torch.device, width: int, hidden: int, heads: int, layers: int, rows: int, seq: int, grad: str, dtype: str
) -> Callable[[], Any]:
    """Layers, and back through them."""
    trunk = network(device, width, hidden, heads, layers, 8, dtype).gpt_neox.requires_grad_(grad == "weights")
    x = torch.randn(rows, seq, width, device=device, dtype=getattr(torch, dtype)).requires_grad_(grad != "none")
    mask = torch.ones(rows, seq, dtype=torch.long, device=device)

    def call() -> None:
        with torch.set_grad_enabled(grad != "none"):
            out = trunk(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
            if grad != "none":
                out.backward(torch.ones_like(out))
        x.grad = None
        trunk.zero_grad()

    return call


def run_decode(
    device: torch.device, width: int, hidden: int, heads: int, layers: int, rows: int, past: int, vocabulary: int,
    dtype: str,
) -> Callable[[], Any]:  # fmt: skip
    """One token a row behind keys and values."""
    from transformers import DynamicCache

    from saerl_cli.rl.frozen.sampling import choose

    model = network(device, width, hidden, heads, layers, vocabulary, dtype)
    kind = getattr(torch, dtype)
    keys = [torch.randn(rows, heads, past, width // heads, device=device, dtype=kind) for _ in range(layers)]
    ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
    mask = torch.ones(rows, past + 1, dtype=torch.long, device=device)
    uniforms = torch.rand(rows, dtype=torch.float64, device=device)

    @torch.no_grad()
    def call() -> None:
        cache = DynamicCache(config=model.config)
        for layer, held in enumerate(keys):
            cache.update(held, held, layer)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=ids + past, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        choose(out.logits[:, -1], 1.0, uniforms)

    return call


def run_score(
    device: torch.device, width: int, vocabulary: int, tokens: int, grad: str, dtype: str
) -> Callable[[], Any]:
    """The head's log-probabilities and their gradient."""
    from saerl_cli.rl.frozen.head import HELD, FrozenHead

    kind = getattr(torch, dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(kind).requires_grad_(grad == "weights")
    hidden = torch.randn(tokens, width, device=device, dtype=kind).requires_grad_(grad != "none")
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def call() -> None:
        if grad == "weights":  # a tile at a time, computed again on the way back
            for part in hidden.split(max(16, HELD // vocabulary)):
                with torch.no_grad():
                    (part @ weight.T).float().logsumexp(-1)
                logp = (part @ weight.T).float().log_softmax(-1)
                logp.gather(-1, labels[: len(part), None]).sum().backward(retain_graph=True)
        else:
            logp: Any = FrozenHead.apply(hidden, weight, None, labels, 1.0)
            if grad == "inputs":
                logp[0].sum().backward()
        hidden.grad = weight.grad = None

    return call


def run_logits(device: torch.device, width: int, vocabulary: int, tokens: int, dtype: str) -> Callable[[], Any]:
    """Whole distributions."""
    kind = getattr(torch, dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=kind)
    hidden = torch.randn(tokens, width, device=device, dtype=kind)
    return lambda: (hidden @ weight.T).float().log_softmax(-1)


def run_splice(
    device: torch.device, d_in: int, d_sae: int, k: int, topk: bool, tokens: int, how: str
) -> Callable[[], Any]:
    """An SAE's coefficients at a site."""
    from saerl_cli.adapter.codes import sparse_codes
    from saerl_cli.adapter.layer import splice
    from saerl_cli.sae.autoencoder import SAE

    sae = SAE(d_in, d_sae, "topk" if topk else "standard", k if topk else None).to(device)
    sae.W_dec.data.copy_(nn.functional.normalize(torch.randn(d_sae, d_in)))
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    x = torch.randn(tokens, d_in, device=device)
    if not topk:  # a bias that leaves about k features active
        pre = sae.pre_activations(x[:64]).flatten()
        sae.b_enc.data.fill_(-float(pre.kthvalue(max(1, round((1 - k / d_sae) * len(pre)))).values))
    delta = torch.full((d_sae,), 0.01, device=device).requires_grad_(how != "encode")
    x = x.requires_grad_(how == "back")
    codes = sparse_codes(sae, x) if how == "known" else None

    def call() -> None:
        with torch.set_grad_enabled(how != "encode"):
            out = splice(sae, x, "error_preserving", delta, codes=codes)
            if how != "encode":
                out.backward(torch.ones_like(out))
        x.grad = delta.grad = None

    return call


def run_adam(device: torch.device, numbers: int) -> Callable[[], Any]:
    """A step of the optimiser."""
    weight = torch.zeros(numbers, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return call


def run_sae_step(device: torch.device, d_in: int, batch: int, **settings: Any) -> Callable[[], Any]:
    """A step of an SAE in training, with everything that comes with it."""
    from saerl_cli.sae.sweep import built
    from saerl_cli.sae.train import SaeTrainer

    fixed = {"expansion": None, "tokens": 10**9, "batch_size": batch, "resample": "none"}
    config = built(SaeConfig(), settings | fixed)
    trainer = SaeTrainer(d_in, config, device)
    mixed = torch.randn(d_in // 4 + 1, d_in, device=device)
    x: Tensor = torch.randn(batch, d_in // 4 + 1, device=device).relu() @ mixed
    return lambda: trainer.step(x)


def run_cross_entropy(device: torch.device, width: int, vocabulary: int, tokens: int) -> Callable[[], Any]:
    """The head of a model in training, with whole logits, and back."""
    weight = torch.randn(vocabulary, width, device=device, requires_grad=True)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def call() -> None:
        nn.functional.cross_entropy(hidden @ weight.T, labels).backward()
        hidden.grad = weight.grad = None

    return call


def run_reviews(device: torch.device) -> Callable[[], Any]:
    """A thousand reviews of the embedded language, as rows of tokens."""
    from saerl_cli.activations import token_rows
    from saerl_cli.config.groups import WorldConfig
    from saerl_cli.world.cache import planted_documents
    from saerl_cli.world.language import VOCABULARY
    from saerl_cli.world.tokenizer import build_tokenizer

    world, tokenizer = WorldConfig(documents=1000), build_tokenizer(VOCABULARY, 96)
    return lambda: token_rows([" ".join(r.words) for r in planted_documents(world, "train")], tokenizer, 96)


def run_tokenize(device: torch.device, tokenizer: str) -> Callable[[], Any]:
    """A mebibyte of text as token ids, by the model's tokenizer where it is there."""
    from saerl_cli.models import light_tokenizer

    found = light_tokenizer(Path(tokenizer)) if tokenizer else None
    text = "Once upon a time there was a small boat that wanted to see the other side of the lake. " * 12
    return lambda: [found.encode(text).ids if found else text.split() for _ in range(2**20 // len(text))]


RUNS: dict[str, Callable[..., Any]] = {
    "start": started,
    "forward": run_forward,
    "decode": run_decode,
    "score": run_score,
    "logits": run_logits,
    "splice": run_splice,
    "adam": run_adam,
    "sae_step": run_sae_step,
    "cross_entropy": run_cross_entropy,
    "reviews": run_reviews,
    "tokenize": run_tokenize,
}
"""Kinds of pieces that are timed; the others are estimated from the machine's rates."""
