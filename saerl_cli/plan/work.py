"""What a job consists of: pieces of work that can be timed alone, phases made of them, and what each phase holds.

Floating-point operations count a multiplication and an addition as two. A product with a matrix of n numbers takes 2 n
a token forward, as many again for the gradient of its input, and as many for that of its weights.
"""

from dataclasses import dataclass, field
from typing import Any

from saerl_cli.plan.shapes import Shape

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
SAVED = {"none": 0.0, "inputs": 9.125, "weights": 16.125}
"""Numbers that a block of Pythia's keeps for the backward pass, a token and in widths: with frozen weights the inputs
of norms, queries, keys, values, the attention's output and the hidden units; else the inputs of every product too."""
HELD = 13.0
"""Numbers that a block holds at once in a forward pass without gradients, a token and in widths."""
MATRICES = {"none": 1, "inputs": 2, "weights": 3}
FUSED_TOKENS, FUSED_COLUMNS = 4096, 32_768
"""Tokens and vocabulary entries of a tile of TRL's head (`trl.kernels.chunked_logprob`)."""
FUSED_COPIES = {"none": 4.0, "inputs": 8.25, "weights": 8.25}
"""Such tiles that it holds at once on a CPU, temporaries counted; a GPU's kernel works on one in place."""
ATTENTION = {"none": 1, "inputs": 3, "weights": 3}


@dataclass(frozen=True)
class Piece:
    """Some work, timed by `saerl_cli.plan.probe` or estimated from what it computes and moves."""

    kind: str
    """What is done: a function of `saerl_cli.plan.probe`."""
    sizes: tuple[tuple[str, Any], ...]
    """Its arguments."""
    flops: float
    """Floating-point operations in matrix products."""
    bytes: float
    """Read and written at least."""
    calls: float = 0
    """Kernels started, about: what small work on a fast device waits for."""
    dtype: str = "float32"
    """Of the products."""

    @property
    def key(self) -> str:
        """Its name in a file."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.sizes)])


def piece(kind: str, flops: float, moved: float, calls: float, **sizes: Any) -> Piece:
    """A piece of work; its products are computed in the `dtype` among its sizes."""
    return Piece(kind, tuple(sizes.items()), flops, moved, calls, sizes.get("dtype", "float32"))


Work = list[tuple[float, Piece]]
"""How often, and what."""


@dataclass
class Phase:
    """A part of a job."""

    name: str
    count: float
    """How often it comes."""
    work: Work
    """Of one."""
    holds: dict[str, float] = field(default_factory=dict)
    """Bytes beyond those that stay, by what they are."""
    on_host: bool = False
    """They lie in the machine's memory even where the model is on a GPU."""
    on_cpu: dict[str, float] = field(default_factory=dict)
    """Bytes beside these where a CPU computes."""
    on_gpu: dict[str, float] = field(default_factory=dict)
    """And where a GPU does."""

    @property
    def flops(self) -> float:
        """Of one."""
        return sum(times * part.flops for times, part in self.work)


@dataclass
class Estimate:
    """A job before it runs. Bytes and work are those of one process."""

    command: str
    processes: int
    dtype: str
    parameters: dict[str, int]
    """Numbers, by what they are."""
    stays: dict[str, float]
    """Bytes held from beginning to end, by what they are."""
    phases: list[Phase]
    disk: dict[str, float]
    """Bytes written, by what they are."""
    notes: list[str] = field(default_factory=list)
    """What was assumed."""


# --- pieces of a language model -------------------------------------------------------------------------------------


def sizes_of(shape: Shape) -> dict[str, int]:
    """What makes a block of Pythia's architecture as large as the model's."""
    return {"width": shape.width, "hidden": shape.hidden, "heads": shape.heads}


def forward(shape: Shape, layers: float, rows: float, seq: int, dtype: str, grad: str = "none") -> Piece:
    """A pass over [rows, seq] through some layers, without the head.

    Args:
        shape: the model.
        layers: how many.
        rows: sequences.
        seq: tokens each.
        dtype: of the products.
        grad: `none`; `inputs`: and back, weights frozen; `weights`: and back to the weights.
    """
    tokens = rows * seq
    products = 2 * shape.matrices * MATRICES[grad] + 4 * seq * shape.width * ATTENTION[grad]
    moved = SIZE[dtype] * layers * (shape.block * MATRICES[grad] + 2 * HELD * shape.width * tokens * MATRICES[grad])
    sizes = sizes_of(shape) | {"layers": round(layers), "rows": max(1, round(rows)), "seq": seq, "grad": grad}
    return piece("forward", tokens * layers * products, moved, 100 * layers * MATRICES[grad], **sizes, dtype=dtype)


def decode(shape: Shape, rows: int, past: int, dtype: str) -> Piece:
    """One token for each of some rows: all layers with keys and values of `past` tokens, the head, the choice."""
    each = shape.layers * (2 * shape.matrices + 4 * past * shape.width) + 2 * shape.embedding
    moved = SIZE[dtype] * (shape.layers * shape.block + shape.embedding) + shape.kv_bytes(rows, past, SIZE[dtype])
    sizes = sizes_of(shape) | {
        "layers": shape.layers, "rows": rows, "past": past, "vocabulary": shape.vocabulary, "dtype": dtype,
    }  # fmt: skip
    return piece("decode", rows * each, moved + 24 * rows * shape.vocabulary, 100 * shape.layers + 30, **sizes)


def score(shape: Shape, tokens: float, dtype: str, grad: str) -> Piece:
    """Log-probabilities of some tokens, [tokens, vocabulary] a tile at a time, and back as far as `grad` says."""
    times = {"none": 1, "inputs": 2, "weights": 4}[grad]
    numbers = tokens * shape.vocabulary
    sizes = {"width": shape.width, "vocabulary": shape.vocabulary, "tokens": max(1, round(tokens)), "grad": grad}
    return piece(
        "score", 2 * times * numbers * shape.width, SIZE[dtype] * shape.embedding + 24 * times * numbers,
        15 * times, **sizes, dtype=dtype,
    )  # fmt: skip


def fused(shape: Shape, tokens: float, dtype: str, grad: str, outputs: str) -> Piece:
    """What TRL's head does in the place of `score` where weights are trained, and in sft and dpo whatever is trained.

    On a CPU it scores every position and computes the logits again on the way back.

    Args:
        shape: the model.
        tokens: positions.
        dtype: of the products.
        grad: how far gradients go.
        outputs: what it is asked for beside log-probabilities, with commas between.
    """
    times = {"none": 1, "inputs": 3, "weights": 4}[grad]
    numbers = tokens * shape.vocabulary
    sizes = {"width": shape.width, "vocabulary": shape.vocabulary, "tokens": max(1, round(tokens)), "grad": grad}
    return piece(
        "fused", 2 * times * numbers * shape.width, SIZE[dtype] * shape.embedding + 40 * times * numbers,
        30 * times, **sizes, outputs=outputs, dtype=dtype,
    )  # fmt: skip


def fused_bytes(shape: Shape, tokens: float, dtype: str, grad: str) -> tuple[float, float]:
    """What TRL's head holds on a CPU, and on a GPU, where the tile is as wide as it may be; bytes."""
    rows = min(tokens, FUSED_TOKENS)
    touched = rows * min(shape.vocabulary, FUSED_COLUMNS)
    return (SIZE[dtype] + 4 * (FUSED_COPIES[grad] - 1)) * touched, 1.0 * SIZE[dtype] * rows * FUSED_COLUMNS


def logits(shape: Shape, tokens: float, dtype: str) -> Piece:
    """Whole distributions, [tokens, vocabulary]."""
    numbers = tokens * shape.vocabulary
    sizes = {"width": shape.width, "vocabulary": shape.vocabulary, "tokens": max(1, round(tokens)), "dtype": dtype}
    return piece("logits", 2 * numbers * shape.width, 24 * numbers, 8, **sizes)


# --- others ---------------------------------------------------------------------------------------------------------


def splice(d_in: int, d_sae: int, k: int, topk: bool, tokens: float, how: str) -> Piece:
    """An SAE's coefficients on [tokens, d_in].

    Args:
        d_in: width of the site.
        d_sae: features.
        k: active ones a token, about.
        topk: how they are chosen.
        tokens: how many.
        how: `encode`: forward; `known`: with its codes, and back to the coefficients; `first`: encoded, and back to
            the coefficients; `back`: and to what is encoded.
    """
    few, all_of_them = 2 * k * d_in, 2 * d_in * d_sae
    flops = {
        "encode": all_of_them + few, "known": 3 * few, "first": all_of_them + 3 * few, "back": all_of_them + 4 * few,
    }[how]  # fmt: skip
    moved = 4 * (2 * d_in * d_sae + tokens * (3 * d_sae + 4 * k * d_in))
    sizes = {"d_in": d_in, "d_sae": d_sae, "k": k, "topk": topk, "tokens": max(1, round(tokens)), "how": how}
    return piece("splice", tokens * flops, moved, 20, **sizes)


def dictionary(d_in: int, d_sae: int, k: int, topk: bool, tokens: float, how: str) -> Piece:
    """An SAE by itself on [tokens, d_in], dense.

    Args:
        d_in: width of the site.
        d_sae: features.
        k: active ones a token, about.
        topk: how they are chosen.
        tokens: how many.
        how: `encode`; `forward`: and decode; `values`: and compare with what went in (`saerl_cli.sae.metrics`).
    """
    flops = tokens * 2 * d_in * d_sae * (1 if how == "encode" else 2)
    moved = 4 * (2 * d_in * d_sae + tokens * 4 * d_sae + tokens * (40 if how == "values" else 3) * d_in)
    sizes = {"d_in": d_in, "d_sae": d_sae, "k": k, "topk": topk, "tokens": max(1, round(tokens)), "how": how}
    return piece("dictionary", flops, moved, 40, **sizes)


def adam(numbers: float) -> Piece:
    """A step of fused Adam, and the norm of the gradient."""
    return piece("adam", 0, 32 * numbers, 20, numbers=max(1, round(numbers)))


def start(modules: str) -> Piece:
    """A process that imports what a job needs: `sae`, `rl` or `lm`."""
    return piece("start", 0, 0, 500_000, modules=modules)


def small(count: float) -> tuple[float, Piece]:
    """Python around so many small operations on tensors."""
    return count, piece("small", 0, 0, 1)


def copied(moved: float) -> tuple[float, Piece]:
    """Memory read and written, in units of a mebibyte."""
    return moved / 2**20, piece("copy", 0, 2**20, 0)
