"""A language model whose activations are known by hand: the first dimension of a token's activation is its id."""

from pathlib import Path

import torch
from torch import nn

from saerl_cli.activations import ActivationStream
from saerl_cli.models import Loaded, Site

LOW = Site("low", "low", None, "module", 3)
HIGH = Site("high", "high", None, "module", 2)
BOTH = [LOW, HIGH]
SPECIAL = [0]
VOCABULARY = 400


class Toy(nn.Module):
    """low = (id, 1, 0), high = (id, -2)."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        ids = torch.arange(VOCABULARY, dtype=torch.float32)
        self.embed = nn.Embedding.from_pretrained(torch.stack([ids, torch.ones_like(ids), torch.zeros_like(ids)], 1))
        self.low, self.high, self.head = nn.Identity(), nn.Linear(3, 2, bias=False), nn.Identity()
        self.high.weight.data = torch.tensor([[1.0, 0, 0], [0, -2, 0]])
        self.passes = 0

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        self.passes += 1
        return self.head(self.high(self.low(self.embed(input_ids))))


def numbered_rows(tokens: int = 350, context: int = 9) -> torch.Tensor:
    """Rows of the ids 1 to `tokens`, each once, a separator first; the last row filled up with separators."""
    body = context - 1
    rows = torch.zeros(-(-tokens // body), context, dtype=torch.long)
    flat = torch.zeros(len(rows) * body, dtype=torch.long)
    flat[:tokens] = torch.arange(1, tokens + 1)
    rows[:, 1:] = flat.view(-1, body)
    return rows


def toy_loaded(model: nn.Module | None = None, sha256: str = "0") -> Loaded:
    """The toy as a loaded model, without a tokenizer."""
    return Loaded(model or Toy(), None, "toy", None, sha256, 512, Path("nowhere"))


def toy_stream(model: nn.Module | None = None, rows: torch.Tensor | None = None, **settings) -> ActivationStream:
    """A stream of the toy: batches of 16, buffers of 64."""
    settings = {"batch_size": 16, "buffer_tokens": 64} | settings
    return ActivationStream(
        model or Toy(), numbered_rows() if rows is None else rows, settings.pop("sites", BOTH), SPECIAL, **settings
    )


def ids(batch: dict[str, torch.Tensor]) -> list[int]:
    """The tokens of a batch."""
    return batch["low"][:, 0].int().tolist()
