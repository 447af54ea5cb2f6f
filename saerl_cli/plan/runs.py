"""What the probe times: real layers, SAEs, heads, optimisers and solvers with random weights, by kind of piece."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.config.sae import SaeConfig
from saerl_cli.plan.work import FUSED_COLUMNS

IMPORTS = {
    "eval": "saerl_cli.report.saes, saerl_cli.sae.metrics, saerl_cli.sae.probe, saerl_cli.sae.stability",
    "lm": "saerl_cli.jobs.train_lm, saerl_cli.planted.train",
    "sae": "saerl_cli.jobs.train_sae, saerl_cli.sae.train, saerl_cli.sae.results, saerl_cli.sae.metrics",
    "rl": "saerl_cli.rl.build, saerl_cli.jobs.rlhf, saerl_cli.rl.summary",
}
"""What a worker imports."""

BEGIN = """
import accelerate, torch, transformers, {modules}
accelerate.Accelerator(cpu=True)
model = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
"""
"""What every worker does before it works: imports, and a first pass forward and back."""
PEAK = """
import pathlib, resource
status = pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.is_file() else []
held = [line.split()[1] for line in lines if line.startswith("VmHWM")]
print(held[0] if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
"""A worker tells its peak memory, kibibytes. Not by `ru_maxrss`, which is at least what its parent held when it was
started: that parent has timed other pieces."""


def started(modules: str) -> dict[str, float]:
    """CPU seconds and resident bytes of a process that begins; `command` is the one that reads the words."""
    worker = ["-c", BEGIN.format(modules=IMPORTS.get(modules)) + PEAK]
    words = ["-m", "saerl_cli.cli", "rlhf", "--cfg", "job"] if modules == "command" else worker
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds} | (
        {} if modules == "command" else {"resident_bytes": 1024 * float(done.stdout.split()[-1])}
    )


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

    from saerl_cli.rl.rollouts.sampling import choose

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
    from saerl_cli.config.algo import LOGITS_HELD
    from saerl_cli.rl.rollouts.scoring import FrozenHead

    kind = getattr(torch, dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(kind).requires_grad_(grad == "weights")
    hidden = torch.randn(tokens, width, device=device, dtype=kind).requires_grad_(grad != "none")
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def call() -> None:
        if grad == "weights":  # a tile at a time, computed again on the way back
            for part in hidden.split(max(16, LOGITS_HELD // vocabulary)):
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


def run_fused(
    device: torch.device, width: int, vocabulary: int, tokens: int, grad: str, outputs: str, dtype: str
) -> Callable[[], Any]:
    """TRL's head."""
    from trl.kernels import ChunkedLogProbFunction

    kind, asked = getattr(torch, dtype), tuple(filter(None, outputs.split(",")))
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(kind).requires_grad_(grad == "weights")
    hidden = torch.randn(tokens, width, device=device, dtype=kind).requires_grad_(grad != "none")
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def call() -> None:
        with torch.set_grad_enabled(grad != "none"):
            logp: Any = ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, FUSED_COLUMNS, None, 1.0, ("log_probs", *asked)
            )
            if grad != "none":
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
    from saerl_cli.adapter.coefficients.active_features import active_features
    from saerl_cli.adapter.coefficients.splice import splice

    sae, x = random_sae(device, d_in, d_sae, k, topk, tokens)
    delta = torch.full((d_sae,), 0.01, device=device).requires_grad_(how != "encode")
    x = x.requires_grad_(how == "back")
    codes = active_features(sae, x) if how == "known" else None

    def call() -> None:
        with torch.set_grad_enabled(how != "encode"):
            out = splice(sae, x, "error_preserving", delta, active=codes)
            if how != "encode":
                out.backward(torch.ones_like(out))
        x.grad = delta.grad = None

    return call


def random_sae(device: torch.device, d_in: int, d_sae: int, k: int, topk: bool, tokens: int) -> tuple[Any, Tensor]:
    """An SAE with random directions of which about k fire, and what it reads."""
    from saerl_cli.sae.autoencoder import SAE

    sae = SAE(d_in, d_sae, "topk" if topk else "standard", k if topk else None).to(device)
    sae.W_dec.data.copy_(nn.functional.normalize(torch.randn(d_sae, d_in)))
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    x = torch.randn(tokens, d_in, device=device)
    if not topk:  # a bias that leaves about k features active
        pre = sae.pre_activations(x[:64]).flatten()
        sae.b_enc.data.fill_(-float(pre.kthvalue(max(1, round((1 - k / d_sae) * len(pre)))).values))
    return sae, x


def run_dictionary(
    device: torch.device, d_in: int, d_sae: int, k: int, topk: bool, tokens: int, how: str
) -> Callable[[], Any]:
    """An SAE by itself."""
    from saerl_cli.sae.metrics import token_values

    sae, x = random_sae(device, d_in, d_sae, k, topk, tokens)
    does: dict[str, Callable[[], Any]] = {
        "encode": lambda: sae.encode(x),
        "forward": lambda: sae(x),
        "values": lambda: token_values(sae, x),
    }

    @torch.no_grad()
    def call() -> None:
        does[how]()

    return call


def run_newton(device: torch.device, labels: int, rows: int, columns: int) -> Callable[[], Any]:
    """Logistic regressions on few columns."""
    from saerl_cli.sae.probe import newton

    x, truth = labelled(labels, rows, columns)
    each = x.expand(labels, rows, columns).contiguous()
    return lambda: newton(each, truth.T)


def run_lbfgs(device: torch.device, labels: int, rows: int, columns: int, steps: int) -> Callable[[], Any]:
    """Logistic regressions on many columns: some iterations."""
    from saerl_cli.sae.probe import lbfgs

    x, truth = labelled(labels, rows, columns)
    return lambda: lbfgs(x, truth, steps=steps)


def labelled(labels: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Standardised columns, float64 [rows, columns], and labels [rows, labels] that they nearly tell."""
    x = torch.randn(rows, columns, dtype=torch.float64)
    score = x @ torch.randn(columns, labels, dtype=torch.float64) / columns**0.5
    return x, score + 0.3 * torch.randn(rows, labels, dtype=torch.float64) > 1.0


def run_matching(device: torch.device, width: int) -> Callable[[], Any]:
    """The pairing of the directions of two SAEs."""
    from scipy.optimize import linear_sum_assignment

    a, b = (nn.functional.normalize(torch.randn(width, 64), dim=-1) for _ in range(2))
    cosines = (a @ b.T).numpy()
    return lambda: linear_sum_assignment(cosines, True)


def run_figures(device: torch.device) -> Callable[[], Any]:
    """Three figures as SVG, like those of a report on SAEs."""
    from io import BytesIO

    from matplotlib.figure import Figure

    def call() -> None:
        for _ in range(3):
            figure = Figure(figsize=(6, 4))
            axes = figure.add_subplot(xscale="log", yscale="log", xlabel="L0", ylabel="FVU")
            axes.errorbar([2.0, 8.0, 32.0], [0.3, 0.1, 0.05], yerr=0.01, label="SAE")
            axes.legend()
            figure.savefig(BytesIO(), format="svg")

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


def run_likelihood(
    device: torch.device, width: int, vocabulary: int, rows: int, seq: int, grad: str, dtype: str
) -> Callable[[], Any]:
    """The weighted likelihood of whole sequences (`saerl_cli.rl.training.regression`)."""
    kind = getattr(torch, dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=kind).requires_grad_(grad == "weights")
    hidden = torch.randn(rows, seq, width, device=device, dtype=kind, requires_grad=True)
    labels = torch.zeros(rows, seq - 1, dtype=torch.long, device=device)

    def call() -> None:
        logits = (hidden @ weight.T)[:, :-1].float() / 1.0
        nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1).mean().backward()
        hidden.grad = weight.grad = None

    return call


def run_pairs(device: torch.device) -> Callable[[], Any]:
    """A hundred preference pairs of the planted language, as token ids."""
    from saerl_cli.config.groups import ModelConfig
    from saerl_cli.config.pairs import PairsConfig
    from saerl_cli.data.pairs import read_pairs
    from saerl_cli.planted.language import VOCABULARY
    from saerl_cli.planted.tokenizer import build_tokenizer
    from saerl_cli.rl.training.examples import pair_row

    config, tokenizer = PairsConfig(count=100), build_tokenizer(VOCABULARY, 96)
    return lambda: [pair_row(pair, tokenizer) for pair in read_pairs(config, ModelConfig(), "train")]


def run_reviews(device: torch.device) -> Callable[[], Any]:
    """A thousand reviews of the planted language, as rows of tokens."""
    from saerl_cli.activations import token_rows
    from saerl_cli.config.groups import PlantedConfig
    from saerl_cli.planted.documents import planted_documents
    from saerl_cli.planted.language import VOCABULARY
    from saerl_cli.planted.tokenizer import build_tokenizer

    planted, tokenizer = PlantedConfig(documents=1000), build_tokenizer(VOCABULARY, 96)
    return lambda: token_rows([" ".join(r.words) for r in planted_documents(planted, "train")], tokenizer, 96)


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
    "fused": run_fused,
    "logits": run_logits,
    "splice": run_splice,
    "dictionary": run_dictionary,
    "newton": run_newton,
    "lbfgs": run_lbfgs,
    "matching": run_matching,
    "figures": run_figures,
    "adam": run_adam,
    "sae_step": run_sae_step,
    "cross_entropy": run_cross_entropy,
    "likelihood": run_likelihood,
    "pairs": run_pairs,
    "reviews": run_reviews,
    "tokenize": run_tokenize,
}
"""Kinds of pieces that are timed; the others are estimated from the machine's rates."""
