"""The sizes of a language model, without its weights and without a network."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.models import context_size, describe

PYTHIA = {  # layers, width, heads, rows of the embedding; an MLP is four times as wide (arXiv 2304.01373)
    "14m": (6, 128, 4, 50304),
    "31m": (6, 256, 8, 50304),
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
"""Every size of the suite; those trained on deduplicated text have the same shapes."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of every block."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer; numbers of parameters count weights, biases and norms."""

    family: str
    """`model_type` of its config.json."""
    layers: int
    width: int
    hidden: int
    """Width inside the MLP."""
    heads: int
    key_width: int
    """Width of all keys of a token in a layer: less than `width` where queries share keys."""
    vocabulary: int
    context: int
    block: int
    """Parameters of a layer."""
    linears: tuple[Linear, ...]
    """Linear layers of a block."""
    biases: int
    """Biases in the whole model, those of norms included."""
    norm: int
    """Parameters of the last norm."""
    tied: bool
    """The head is the embedding."""

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """Parameters of a head of its own."""
        return 0 if self.tied else self.embedding

    @property
    def trunk(self) -> int:
        """Parameters without the head."""
        return self.embedding + self.layers * self.block + self.norm

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.trunk + self.head

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of a block, a multiplication each for every token."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    def kv_bytes(self, rows: int, tokens: int, size: int) -> int:
        """Keys and values of `rows` sequences of `tokens`, numbers of `size` bytes."""
        return 2 * self.layers * self.key_width * rows * tokens * size


def shape_of(model: ModelConfig) -> tuple[Shape, Any]:
    """A model's sizes, and its description for `resolve_sites`.

    Raises:
        ValueError: a Hub model that is no Pythia and not at hand, or a folder that is no model.
    """
    description = pythia(model.name or "") if model.kind is ModelKind.hub else None
    description = description or describe(model)
    return from_description(description), description


def pythia(name: str) -> SimpleNamespace | None:
    """The keys of a Pythia's config.json that matter here, by its Hub id; None for another model."""
    size = name.rpartition("/")[2].removeprefix("pythia-").removesuffix("-deduped")
    if "pythia-" not in name or size not in PYTHIA:
        return None
    layers, width, heads, vocabulary = PYTHIA[size]
    return SimpleNamespace(
        model_type="gpt_neox", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, vocab_size=vocabulary, max_position_embeddings=2048,
        use_parallel_residual=True, tie_word_embeddings=False,
    )  # fmt: skip


def from_description(config: Any) -> Shape:
    """Sizes from a config.json: by formula for Pythia's architecture, else from the modules without weights."""
    if config.model_type != "gpt_neox":
        return from_modules(config)
    w, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linears = (
        Linear("query_key_value", w, 3 * w),
        Linear("dense", w, w),
        Linear("dense_h_to_4h", w, m),
        Linear("dense_4h_to_h", m, w),
    )
    biases = 2 * w + sum(linear.outputs for linear in linears)  # two norms; one bias an output
    if not getattr(config, "attention_bias", True):
        biases -= 4 * w
    return Shape(
        family="gpt_neox", layers=layers, width=w, hidden=m, heads=config.num_attention_heads, key_width=w,
        vocabulary=config.vocab_size, context=context_size(config),
        block=sum(linear.inputs * linear.outputs for linear in linears) + biases + 2 * w, linears=linears,
        biases=layers * biases + w, norm=2 * w, tied=bool(getattr(config, "tie_word_embeddings", False)),
    )  # fmt: skip


def from_modules(config: Any) -> Shape:
    """Sizes of any architecture from its modules on the meta device.

    Raises:
        ValueError: blocks that are not all alike.
    """
    from torch import nn

    from saerl_cli.models import without_weights

    model = without_weights(config)
    config = model.config.get_text_config()
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    sizes = {sum(p.numel() for p in block.parameters()) for block in (stacks[0] if stacks else [])}
    if len(sizes) != 1:
        raise ValueError(f"the blocks of {config.model_type} are not all alike; saerl plan cannot count them")
    linears = tuple(
        Linear(name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in stacks[0][0].named_modules()
        if isinstance(module, nn.Linear)
    )
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    (block,), rows = sizes, model.get_input_embeddings().num_embeddings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    every = sum(p.numel() for p in model.parameters())
    return Shape(
        family=config.model_type, layers=config.num_hidden_layers, width=config.hidden_size,
        hidden=getattr(config, "intermediate_size", 4 * config.hidden_size), heads=heads, key_width=key_heads * head,
        vocabulary=rows, context=context_size(config), block=block, linears=linears,
        biases=sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias")),
        norm=every - config.num_hidden_layers * block - rows * config.hidden_size * (1 if tied else 2), tied=tied,
    )  # fmt: skip
