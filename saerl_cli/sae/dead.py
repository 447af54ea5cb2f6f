"""Dead features: which they are, and re-initialising them.

A feature is dead when it has not fired for `dead_after_tokens`, or on less than `dead_below_rate` of the tokens since
features were last looked at. `fired` means an activation above 0, never a choice with value 0.
"""

from math import sqrt

import torch
from torch import Tensor

from saerl_cli.config.sae import Resample, SaeConfig
from saerl_cli.sae.architectures.common import Parameters


class Firing:
    """Counters of when and how often features fire, in tokens.

    Attributes:
        silent: tokens since each feature last fired, [d_sae].
        fires: tokens on which it fired since the last look, [d_sae].
        seen: tokens since the last look.
    """

    def __init__(self, d_sae: int, config: SaeConfig, device: torch.device | str):
        self.config = config
        self.silent = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.fires = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.seen = torch.zeros((), dtype=torch.long)

    def update(self, fires: Tensor, tokens: int) -> None:
        """Count a batch of all processes."""
        self.silent += tokens
        self.silent[fires > 0] = 0
        self.fires += fires
        self.seen += tokens

    def dead(self) -> Tensor:
        """Silent for `dead_after_tokens`: bool [d_sae]."""
        return self.silent >= self.config.dead_after_tokens

    def rare(self) -> Tensor:
        """Dead, or firing too rarely since the last look: bool [d_sae]."""
        return self.dead() | (self.fires < self.config.dead_below_rate * int(self.seen))

    def looked(self, replaced: Tensor) -> None:
        """Begin to count anew; features that were replaced [m] are as good as fresh."""
        self.silent[replaced] = 0
        self.fires.zero_()
        self.seen.zero_()


def due(config: SaeConfig, step: int) -> bool:
    """Whether dead features are replaced after step number `step` (from 0)."""
    if config.resample is Resample.none:
        return False
    before, after = ((n * config.batch_size) // config.resample_every_tokens for n in (step, step + 1))
    last = min(config.steps() - config.in_steps(config.lr_decay), config.in_steps(config.resample_until))
    return after > before and step + 1 <= last


def replacements(
    config: SaeConfig, p: Parameters, dead: Tensor, alive: Tensor, x: Tensor, y: Tensor, loss: Tensor, step: int
) -> Parameters:
    """New rows for dead features [m], the same in every process.

    `loss`: inputs drawn with probability proportional to the squared loss; the decoder row is the centred target,
    normalised, the encoder row the centred input at `resample_norm` of the mean norm of those alive (Bricken et al.
    2023). `random`: directions without a preference, the encoder Kaiming-uniform over d_sae as in Nanda's and
    Newhouse and Bashkansky's code (2023).

    Args:
        config: settings.
        p: the parameters.
        dead: features to replace, [m].
        alive: bool [d_sae].
        x: centred inputs of the whole batch, [n, d_in].
        y: centred targets of the whole batch, [n, d_out].
        loss: squared error of each token, [n].
        step: seeds the draw.
    """
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + step)
    decoder_norm, encoder_norm = typical_norms(p, alive)
    if config.resample is Resample.random:
        d_sae, d_in = p["encoder"].shape
        encoder = torch.rand(len(dead), d_in, generator=generator).mul_(2).sub_(1).mul_(sqrt(6 / d_sae))
        decoder = torch.randn(len(dead), p["decoder"].shape[1], generator=generator)
        encoder, decoder = encoder.to(x.device), normalised(decoder.to(x.device))
    else:
        weights = loss.square().double().cpu()
        drawn = torch.multinomial(weights, len(dead), replacement=len(dead) > len(x), generator=generator).to(x.device)
        encoder = normalised(x[drawn]) * (encoder_norm * config.resample_norm)
        decoder = normalised(y[drawn])
    return {"encoder": encoder, "decoder": decoder * decoder_norm, "b_enc": encoder.new_zeros(len(dead))}


def typical_norms(p: Parameters, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Mean norm of the decoder and encoder rows that are alive; of all where none is."""
    chosen = alive if alive.any() else ~alive
    return p["decoder"][chosen].norm(dim=-1).mean(), p["encoder"][chosen].norm(dim=-1).mean()


def normalised(rows: Tensor) -> Tensor:
    """Rows of norm 1, [m, d]."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
