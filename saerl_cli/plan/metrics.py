"""What the metrics of SAEs take, at the end of `saerl train-sae` and in `saerl eval-sae` (`saerl_cli.sae.metrics`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from saerl_cli.activations.forward import FORWARD_TOKENS
from saerl_cli.plan.dictionaries import Dictionary
from saerl_cli.plan.shapes import Shape
from saerl_cli.plan.work import HELD, SIZE, Piece, Work, copied, forward, logits, piece
from saerl_cli.sae.metrics import COSINES_AT_ONCE, LOGITS_AT_ONCE

LOGITS = 6.0
"""Matrices [tokens, vocabulary] at once: two that stay, and what a loss makes on its way."""
TOPK_FEATURES, FEATURES = 3.0, 2.0
"""Matrices [tokens, d_sae] that encoding holds at once."""


@dataclass(frozen=True)
class Reading:
    """SAEs of one model that are measured together."""

    shape: Shape
    saes: Sequence[Dictionary]
    targets: int
    """Sites that are replaced."""
    tokens: float
    """Held-out ones, of this process."""
    length: int
    """Tokens a row."""
    dtype: str

    @property
    def layers(self) -> int:
        """Up to the highest site."""
        return 1 + max(self.shape.layers - 1 if sae.layer is None else sae.layer for sae in self.saes)

    @property
    def chunk(self) -> int:
        """Rows whose activations are read at once."""
        return max(1, FORWARD_TOKENS // self.length)

    @property
    def scored(self) -> int:
        """Rows whose losses are computed at once."""
        return max(1, min(FORWARD_TOKENS, LOGITS_AT_ONCE // self.shape.vocabulary) // self.length)


def metrics(reading: Reading) -> Work:
    """Reconstruction on every token, then losses with a site replaced: by 0, by its mean, by each SAE."""
    shape, length, dtype = reading.shape, reading.length, reading.dtype
    read, scored = reading.chunk * length, reading.scored * length
    passes = reading.tokens / scored * (1 + 2 * reading.targets + len(reading.saes))
    divergences = reading.tokens / scored * (reading.targets + len(reading.saes))
    return [
        (reading.tokens / read, forward(shape, reading.layers, reading.chunk, length, dtype)),
        *((reading.tokens / read, sae.measured(read, "values")) for sae in reading.saes),
        (passes, forward(shape, shape.layers, reading.scored, length, dtype)),
        (passes, logits(shape, scored, dtype)),
        copied(divergences * 4 * 6 * scored * shape.vocabulary),
        *((reading.tokens / scored, sae.measured(scored, "forward")) for sae in reading.saes),
        *((1, cosines(sae.d_sae, sae.d_in)) for sae in reading.saes),
    ]


def cosines(d_sae: int, width: int) -> Piece:
    """Those between all decoder directions."""
    return piece("cosines", 2 * d_sae**2 * width, 8 * d_sae**2, 10 * d_sae / COSINES_AT_ONCE)


def held(reading: Reading) -> dict[str, float]:
    """Bytes: the larger of logits, and of features beside what stays of logits; and a pass through the model."""
    shape, scored = reading.shape, reading.scored * reading.length
    matrix, read = 4.0 * scored * shape.vocabulary, reading.chunk * reading.length
    features = max((TOPK_FEATURES if sae.topk else FEATURES) * 4 * sae.d_sae for sae in reading.saes)
    through = HELD * shape.width * SIZE[reading.dtype]
    dense = max(read * features, 2 * matrix + scored * (features + through))
    if LOGITS * matrix > dense:
        return {"logits": LOGITS * matrix}
    return {"features": dense}
