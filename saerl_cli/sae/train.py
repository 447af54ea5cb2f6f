"""Training sparse autoencoders on batches of activations.

Inputs are scaled by s = sqrt(d_in) / mean|x|, so that hyperparameters mean the same at every site, and centred by
starting `b_dec` at their mean. On scaled inputs, with D rows of the decoder and n tokens a batch,

    topk       loss = 1/n sum |x - x^|^2                            features chosen by z_i |D_i|, norms free
    relu       loss = 1/n sum (|x - x^|^2 + l1 sum_i f_i |D_i|)     norms free          (Anthropic, April 2024)
    relu_unit  loss = 1/n sum (|x - x^|^2 + l1 sum_i f_i)           |D_i| = 1 always    (2023)

`SaeTrainer.finish` folds s and the norms into the weights: the SAE that is saved acts on raw activations, with
unit-norm decoder rows. Everything random is drawn from generators seeded by (seed, step), so the state of a trainer is
its tensors alone and resuming is exact.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import sqrt
from typing import overload

import torch
from torch import Tensor

from saerl_cli.config.sae import Architecture, DecoderNorm, Resample, SaeConfig
from saerl_cli.sae import sparse
from saerl_cli.sae.autoencoder import SAE

PARAMETERS = ("encoder", "b_enc", "decoder", "b_dec")
FREE_NORM_START = 0.1  # small rows let the first steps choose directions before lengths
RESAMPLED_NORM = 0.2  # of a new encoder row, relative to the mean of those alive (Bricken et al. 2023)
Reduce = Callable[[Tensor], Tensor]


class SaeTrainer:
    """One SAE in training: parameters, Adam, dead-feature counters.

    The parameters are held a feature a row, `encoder` and `decoder` [d_sae, d_in], and act on scaled inputs.

    Args:
        d_in: width of the activations.
        config: settings; training takes `config.tokens // config.batch_size` steps.
        device: where the parameters live.
        reduce: sums a tensor over all processes; the identity for one process.
        name: used in error messages.
    """

    def __init__(
        self,
        d_in: int,
        config: SaeConfig,
        device: torch.device | str = "cpu",
        reduce: Reduce = lambda tensor: tensor,
        name: str = "SAE",
    ):
        self.config, self.reduce, self.name = config, reduce, name
        self.d_in, self.d_sae = d_in, config.width(d_in)
        self.steps = config.tokens // config.batch_size
        self.step_number = 0
        self.unit_norm = config.decoder_norm is not DecoderNorm.free
        rows = torch.randn(self.d_sae, d_in, generator=torch.Generator().manual_seed(config.seed)).to(device)
        rows /= rows.norm(dim=-1, keepdim=True)
        self.decoder = rows * (1.0 if self.unit_norm else FREE_NORM_START)
        self.encoder = self.decoder.clone()
        self.b_enc = torch.zeros(self.d_sae, device=device)
        self.b_dec = torch.zeros(d_in, device=device)
        self.silent = torch.zeros(self.d_sae, dtype=torch.long, device=device)  # tokens since a feature last fired
        self.scale = torch.ones((), device=device)
        # eps far below any gradient; the fused kernel is eight times faster than the default on a CPU
        self.optimizer = torch.optim.Adam(self.parameters(), lr=config.lr, fused=True)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """The four tensors in the order of `PARAMETERS`."""
        return [getattr(self, name) for name in PARAMETERS]

    # --- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, x: Tensor, positions: Tensor | None = None, measure: bool = False) -> dict[str, float] | None:
        """One optimiser step.

        Args:
            x: raw activations [n, d_in]; with several processes, this process's share of the batch.
            positions: place of each row in the whole batch of `config.batch_size`, [n]; needed with several processes.
            measure: return metrics of the batch. Training is the same with and without.

        Raises:
            ValueError: the gradient is NaN or infinite.
        """
        total = int(self.reduce(torch.tensor(len(x), device=x.device)))
        x = x.float()
        if self.step_number == 0:
            self._start(x, total)
        x = x * self.scale
        error, fired, active, penalty = self._backward(x, total)
        norm = self._clip()
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.unit_norm:
            self.decoder /= self.decoder.norm(dim=-1, keepdim=True)
        self.silent += total
        self.silent[self.reduce(fired.long()) > 0] = 0
        metrics = self._metrics(x, error, active, penalty, total, norm, lr) if measure else None
        if self._resampling_due():
            self._resample(x, error, positions)
        self.step_number += 1
        return metrics

    def _start(self, x: Tensor, total: int) -> None:
        """Scale and centre from the first batch."""
        mean_norm = self.reduce(x.norm(dim=-1).sum()) / total
        if not mean_norm > 0:
            raise ValueError(f"{self.name}: the activations of the first batch are all zero or not finite")
        self.scale.copy_(sqrt(self.d_in) / mean_norm)
        self.b_dec.copy_(self.reduce(x.sum(0)) / total * self.scale)

    def _backward(self, x: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Set the gradients; returns error [n, d_in], which features fired [d_sae], how often any did, the L1 term."""
        if self.config.architecture is Architecture.topk:
            values, indices = sparse.select(x, *self.parameters(), k=self.config.k)
            error = sparse.reconstruct(values, indices, self.decoder, self.b_dec) - x
            grads = sparse.gradients(x, values, indices, error, self.encoder, self.decoder, self.b_dec, total)
            active = values > 0
            fired = torch.zeros_like(self.silent, dtype=torch.bool)
            fired[indices[active]] = True
            penalty = torch.zeros((), device=x.device)
        else:
            with torch.enable_grad():
                pre = torch.addmm(self.b_enc - self.b_dec @ self.encoder.T, x, self.encoder.T)  # [n, d_sae]
                f = pre.relu()
                error = f @ self.decoder + self.b_dec - x
                penalty = f.sum() if self.unit_norm else f.sum(0) @ self.decoder.norm(dim=-1)
                loss = (error.square().sum() + self._l1() * penalty) / total
            grads = torch.autograd.grad(loss, self.parameters())
            error, active = error.detach(), f > 0
            fired = active.any(0)
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = self.reduce(grad)
        if self.unit_norm:  # a step along a row would only be undone by the normalisation
            grad = self.decoder.grad
            assert grad is not None
            grad -= (grad * self.decoder).sum(-1, keepdim=True) * self.decoder
        return error, fired, active.sum(), penalty.detach()

    def _clip(self) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.max_grad_norm or float("inf")))
        if norm != norm or norm == float("inf"):
            raise ValueError(f"step {self.step_number}: the gradient of the SAE at {self.name} is {norm}; lower sae.lr")
        return norm

    def _learning_rate(self) -> float:
        done, rest = self.step_number + 1, self.steps - self.step_number
        rise = done / max(self.config.lr_warmup * self.steps, 1)
        fall = rest / max(self.config.lr_decay * self.steps, 1)
        return self.config.lr * max(0.0, min(1.0, rise, fall))

    def _l1(self) -> float:
        return self.config.l1 * min(1.0, (self.step_number + 1) / max(self.config.l1_warmup * self.steps, 1))

    def _metrics(
        self, x: Tensor, error: Tensor, active: Tensor, penalty: Tensor, total: int, norm: float, lr: float
    ) -> dict[str, float]:
        """Of this batch, over all processes; the error and the variance are those of the batch."""
        x64 = x.double()
        parts = torch.stack([error.double().square().sum(), x64.square().sum(), active.double(), penalty.double()])
        squared_error, squared, active_total, l1_total = self.reduce(parts).tolist()
        variance = squared - float(self.reduce(x64.sum(0)).square().sum()) / total
        return {
            "fvu": squared_error / max(variance, 1e-30),
            "l0": active_total / total,
            "l1": l1_total / total,
            "dead": float((self.silent >= self.config.dead_after_tokens).sum()) / self.d_sae,
            "grad_norm": norm,
            "lr": lr,
        }

    # --- dead features -----------------------------------------------------------------------------------------------

    def _resampling_due(self) -> bool:
        config, done = self.config, self.step_number + 1
        before, after = ((n * config.batch_size) // config.resample_every_tokens for n in (done - 1, done))
        return config.resample is Resample.loss and after > before and done <= (1 - config.lr_decay) * self.steps

    @torch.no_grad()
    def _resample(self, x: Tensor, error: Tensor, positions: Tensor | None) -> None:
        """Point dead features at inputs drawn with probability proportional to the squared loss (Bricken et al. 2023).

        A dead feature's decoder row becomes a centred, normalised input, its encoder row the same at a fraction of the
        mean norm of those alive, its bias 0, and Adam forgets it. No other feature changes.
        """
        dead = (self.silent >= self.config.dead_after_tokens).nonzero()[:, 0]
        if len(dead) == 0:
            return
        if positions is not None:  # the batch of all processes, in the order that one process sees
            whole = x.new_zeros(2, self.config.batch_size, self.d_in)
            whole[:, positions] = torch.stack([x, error])
            x, error = self.reduce(whole)
        loss = error.square().sum(-1)
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.step_number)
        weights = loss.square().double().cpu()
        drawn = torch.multinomial(weights, len(dead), replacement=len(dead) > len(x), generator=generator)
        rows = x[drawn.to(x.device)] - self.b_dec
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        alive = self.silent < self.config.dead_after_tokens
        if alive.any():
            decoder_norm, encoder_norm = (m[alive].norm(dim=-1).mean() for m in (self.decoder, self.encoder))
        else:
            decoder_norm = encoder_norm = torch.tensor(1.0 if self.unit_norm else FREE_NORM_START)
        self.decoder[dead] = rows * (1.0 if self.unit_norm else decoder_norm)
        self.encoder[dead] = rows * encoder_norm * RESAMPLED_NORM
        self.b_enc[dead] = 0
        for parameter in self.parameters()[:3]:
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][moment][dead] = 0
        self.silent[dead] = 0

    # --- state and result --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed trainer needs."""
        tensors = {name: getattr(self, name).detach() for name in (*PARAMETERS, "silent", "scale")}
        tensors["step"] = torch.tensor(self.step_number)
        for name, parameter in zip(PARAMETERS, self.parameters(), strict=True):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`, to the bit."""
        for name in (*PARAMETERS, "silent", "scale"):
            getattr(self, name).copy_(tensors[name])
        self.step_number = int(tensors["step"])
        for name, parameter in zip(PARAMETERS, self.parameters(), strict=True):
            prefix = f"adam.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value.clone().to(parameter.device if value.ndim else "cpu")
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    @torch.no_grad()
    def finish(self) -> SAE:
        """The SAE for raw activations: scale and decoder norms folded into the weights."""
        topk = self.config.architecture is Architecture.topk
        sae = SAE(self.d_in, self.d_sae, "topk" if topk else "standard", self.config.k if topk else None)
        norm = self.decoder.norm(dim=-1).clamp_min(1e-12)  # [d_sae]
        # f_raw = f |D| / s, because x^ = (f D + b_dec) / s; the scale cancels in the encoder.
        sae.W_enc.copy_((self.encoder * norm[:, None]).T)
        sae.b_enc.copy_(self.b_enc * norm / self.scale)
        sae.W_dec.copy_(self.decoder / norm[:, None])
        sae.b_dec.copy_(self.b_dec / self.scale)
        sae.site = self.name
        return sae


Batch = Tensor | Mapping[str, Tensor]


def training(
    batches: Iterable[Batch], trainers: Mapping[str, SaeTrainer], log_every: int = 100
) -> Iterator[tuple[int, dict[str, dict[str, float]] | None]]:
    """Train on every batch until the longest trainer is done; yields (steps done, metrics or None) after each step.

    Args:
        batches: tensors [n, d_in] for all trainers, or a dict of them by trainer name.
        trainers: by name; those that are done already are left alone.
        log_every: metrics are measured on the first, every `log_every`-th and the last step.

    Raises:
        ValueError: the batches end too early.
    """
    last = max(trainer.steps for trainer in trainers.values())
    first = min(trainer.step_number for trainer in trainers.values())
    done = first
    for batch in islice(batches, last - first):
        measure = done == 0 or (done + 1) % log_every == 0 or done + 1 == last
        metrics = {}
        for name, trainer in trainers.items():
            if trainer.step_number < trainer.steps:
                x = batch if isinstance(batch, Tensor) else batch[name]
                metrics[name] = trainer.step(x, getattr(batches, "positions", None), measure)
        done += 1
        yield done, metrics if measure else None
    if done < last:
        raise ValueError(f"the activations ended after {done} of {last} batches; lower sae.tokens or give more text")


@overload
def train_saes(batches: Iterable[Batch], configs: Sequence[SaeConfig]) -> list[SAE]: ...
@overload
def train_saes(batches: Iterable[Batch], configs: Mapping[str, SaeConfig]) -> dict[str, SAE]: ...
def train_saes(
    batches: Iterable[Batch], configs: Sequence[SaeConfig] | Mapping[str, SaeConfig]
) -> list[SAE] | dict[str, SAE]:
    """Train several SAEs in one pass over activations.

    Args:
        batches: any iterable of activations [n, d_in] (all SAEs see the same) or of dicts site -> [n, d_in].
        configs: a list of settings, or settings by site.

    Returns:
        SAEs for raw activations: a list, or a dict by site, as `configs`.
    """
    named = dict(configs) if isinstance(configs, Mapping) else {str(i): c for i, c in enumerate(configs)}
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("there are no activations to train on")

    def rest() -> Iterator[Batch]:
        yield first
        yield from iterator

    widths = {name: (first if isinstance(first, Tensor) else first[name]).shape[-1] for name in named}
    trainers = {name: SaeTrainer(widths[name], config, name=name) for name, config in named.items()}
    for _ in training(rest(), trainers, log_every=10**9):
        pass
    finished = {name: trainer.finish() for name, trainer in trainers.items()}
    return finished if isinstance(configs, Mapping) else list(finished.values())
