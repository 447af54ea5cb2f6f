"""Training one sparse autoencoder, a batch of activations at a time.

Inputs are scaled by a number s, sqrt(d_in) / mean|x| by default, so that hyperparameters mean the same at every site,
and centred by starting `b_dec` at their mean. The losses are those of `saerl_cli.sae.architectures`.
`SaeTrainer.finish` folds s and the norms into the weights: the SAE that is saved acts on raw activations, with
unit-norm decoder rows. Everything random is drawn from generators seeded by (seed, step), so the state of a trainer is
its tensors alone and resuming is exact.
"""

from collections.abc import Mapping
from math import cos, pi, sqrt

import torch
from torch import Tensor

from saerl_cli.config.sae import (
    Centre,
    Controller,
    DecoderNorm,
    InputScale,
    LrShape,
    SaeConfig,
)
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.sae import dead as revival
from saerl_cli.sae.architectures import parts_of
from saerl_cli.sae.architectures.common import Batch, Outcome, Parameters
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.layout import Scratch
from saerl_cli.sae.optimizers import OPTIMIZERS

FREE_NORM_START = 0.1  # small rows let the first steps choose directions before lengths
MEDIAN_ROUNDS = 100
APPROACHING = 0.9  # the controller waits where L0 is at most so far from its target as at the last decision
BUFFERS = ("scale", "target_scale", "offset", "variance", "factor", "l0_sum", "l0_last", "cut")
COUNTERS = ("silent", "fires", "seen")


class SaeTrainer:
    """One SAE in training: parameters, optimiser, counters.

    The parameters are held a feature a row, `encoder` [d_sae, d_in] and `decoder` [d_sae, d_out], and act on scaled
    inputs.

    Args:
        d_in: width of the activations.
        config: settings; training takes `config.steps()` steps.
        device: where the parameters live.
        group: the processes that share each batch.
        name: used in error messages, and the site of the SAE that comes out.
        d_out: width of what a transcoder predicts; None for an autoencoder.
        start: an SAE to begin with.
        scratch: memory to share with trainers that take turns with this one.
    """

    def __init__(
        self,
        d_in: int,
        config: SaeConfig,
        device: torch.device | str = "cpu",
        group: ProcessGroup = ONE_PROCESS,
        name: str = "SAE",
        d_out: int | None = None,
        start: SAE | None = None,
        scratch: Scratch | None = None,
    ):
        self.config, self.name, self.group = config, name, group
        self.scratch = scratch or Scratch()
        self.architecture = parts_of(config.architecture)
        self.d_in, self.d_sae, self.d_out = d_in, config.width(d_in), d_out or d_in
        self.transcoder = d_out is not None
        self.start = check_shape(start, self) if start is not None else None
        self.steps, self.step_number = config.steps(), 0
        self.p = _initial(config, d_in, self.d_sae, d_out, device)
        self.p |= self.architecture.further_parameters(config, self.d_sae, torch.device(device))
        self.firing = revival.Firing(self.d_sae, config, device)
        self.scale = torch.ones((), device=device)
        self.target_scale = torch.ones((), device=device)
        self.offset = torch.zeros(d_in, device=device)  # a transcoder's inputs are centred by a constant
        self.variance = torch.ones((), device=device)  # of the scaled targets of the first batch
        self.factor = torch.ones((), dtype=torch.float64)  # what the controller multiplies the penalty's weight by
        self.l0_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the steps since its last decision
        self.l0_last = torch.zeros((), dtype=torch.float64)  # its mean at that decision
        self.cut = torch.zeros((), device=device)  # smallest z |D| that BatchTopK kept last
        self.optimizer = OPTIMIZERS[config.optimizer](self.parameters(), config)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that step, by name; a tied encoder is the decoder, a `b_dec` that is off stays 0."""
        fixed = {"encoder"} if self.config.tied else set()
        fixed |= {"b_dec"} if self.config.centre is Centre.off else set()
        return {name: tensor for name, tensor in self.p.items() if name not in fixed}

    def parameters(self) -> list[Tensor]:
        """The tensors of `trainable`."""
        return list(self.trainable().values())

    # --- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self, x: Tensor, target: Tensor | None = None, positions: Tensor | None = None, measure: bool = False
    ) -> dict[str, float] | None:
        """One optimiser step.

        Args:
            x: raw activations [n, d_in]; with several processes, this process's share of the batch.
            target: what a transcoder predicts from them, [n, d_out].
            positions: place of each row in the whole batch of `config.batch_size`, [n]; needed with several processes.
            measure: return metrics of the batch. Training is the same with and without.

        Raises:
            ValueError: activations or gradients are NaN or infinite.
        """
        total = int(self.group.all_reduce(torch.tensor(len(x), device=x.device)))
        if total == 0:
            raise ValueError(
                f"step {self.step_number + 1}: no activation is left of the batch; raise activations.outlier_norm"
            )
        x = x.float()
        y = x if target is None else target.float()
        if self.step_number == 0:
            self._begin(x, y, total)
        x = x * self.scale
        y = x if target is None else y * self.target_scale
        batch = self._batch(x, y, total)
        weight = self.weight()
        outcome = self.backward(batch, weight)
        norm = self._clip(batch)
        lr = self.learning_rate()
        self.optimizer.step(lr)
        self._constrain()
        self.firing.update(self.group.all_reduce(outcome.fires), total)
        self._control(outcome, total)
        metrics = None
        if measure:
            metrics = self._metrics(y, outcome, total) | {"weight": weight, "grad_norm": norm, "lr": lr}
        if revival.due(self.config, self.step_number):
            self._resample(batch, outcome.error, positions)
        if outcome.cut is not None:
            if self.step_number + 1 == self.steps:  # the cut of the final weights
                outcome = self.architecture.loss(self.p, self._batch(x, y, total), self.config, weight)
            assert outcome.cut is not None
            self.cut.copy_(outcome.cut)
        self.step_number += 1
        return metrics

    def _batch(self, x: Tensor, y: Tensor, total: int) -> Batch:
        centre = self.offset if self.transcoder else self.p["b_dec"]
        return Batch(x - centre, y, total, self.firing.dead(), self.group, self.scratch)

    def _begin(self, x: Tensor, y: Tensor, total: int) -> None:
        """Scale and centre from the first batch."""
        self.scale.copy_(self._scale(x, total))
        self.target_scale.copy_(self._scale(y, total) if self.transcoder else self.scale)
        mean = self.group.all_reduce(y.sum(0)) / total * self.target_scale
        squares = self.group.all_reduce((y * self.target_scale).square().sum()) / total
        self.variance.copy_(squares - mean.square().sum())
        if self.transcoder:
            self.offset.copy_(self.group.all_reduce(x.sum(0)) / total * self.scale)
        if self.start is not None:
            copy_start(self.start, self)
        elif self.config.centre is Centre.mean:
            self.p["b_dec"].copy_(mean)
        elif self.config.centre is Centre.median:
            self.p["b_dec"].copy_(self._median(y * self.target_scale, mean, total))

    def _scale(self, x: Tensor, total: int) -> Tensor:
        if self.config.scale is InputScale.none:
            return torch.ones_like(self.scale)
        rms = self.config.scale is InputScale.rms
        size = self.group.all_reduce((x.square() if rms else x.norm(dim=-1)).sum()) / total
        if not (size > 0 and size.isfinite()):
            raise ValueError(f"{self.name}: the activations of the first batch are all zero, NaN or infinite")
        return size.rsqrt() if rms else sqrt(x.shape[-1]) / size

    def _median(self, y: Tensor, guess: Tensor, total: int) -> Tensor:
        """Geometric median of all rows [n, d] (Weiszfeld's iteration)."""
        for _ in range(MEDIAN_ROUNDS):
            weights = 1 / (y - guess).norm(dim=-1, keepdim=True).clamp_min(1e-6)
            guess = self.group.all_reduce((y * weights).sum(0)) / self.group.all_reduce(weights.sum())
        return guess

    def backward(self, batch: Batch, weight: float) -> Outcome:
        """Set the gradients of all trainable parameters, summed over processes.

        Args:
            batch: scaled and centred.
            weight: of the sparsity penalty.
        """
        outcome = self.architecture.loss(self.p, batch, self.config, weight)
        gradients = outcome.gradients
        if not self.transcoder:  # b_dec is subtracted from the inputs: one matrix-vector product over the batch's sum
            gradients["b_dec"] = gradients["b_dec"] - outcome.into_encoder @ self.p["encoder"]
        if self.config.tied:
            gradients["decoder"] = gradients["decoder"] + gradients["encoder"]
        for name, parameter in self.trainable().items():
            parameter.grad = self.group.all_reduce(gradients[name])
        if self.config.decoder_norm is DecoderNorm.unit:  # a step along a row would only be undone
            grad, rows = self.p["decoder"].grad, self.p["decoder"]
            assert grad is not None
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
        return outcome

    def _constrain(self) -> None:
        if self.config.decoder_norm is not DecoderNorm.free:
            self.p["decoder"] /= self.p["decoder"].norm(dim=-1, keepdim=True)
        if "threshold" in self.p:
            self.p["threshold"].clamp_(min=0)

    def _clip(self, batch: Batch) -> float:
        limit = self.config.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters(), float("inf") if limit is None else limit))
        if norm == norm and norm != float("inf"):
            return norm
        if not (batch.x.isfinite().all() and batch.y.isfinite().all()):
            raise ValueError(f"step {self.step_number + 1}: activations at {self.name} are NaN or infinite")
        raise ValueError(f"step {self.step_number + 1}: the gradient of the SAE at {self.name} is {norm}; lower sae.lr")

    # --- schedules ---------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Of the coming step: up, constant, down to 0."""
        done, rest = self.step_number + 1, self.steps - self.step_number
        rise = done / max(self.config.in_steps(self.config.lr_warmup), 1)
        fall = rest / max(self.config.in_steps(self.config.lr_decay), 1)
        share = max(0.0, min(1.0, rise, fall))
        if self.config.lr_shape is LrShape.cosine:
            share = (1 - cos(pi * share)) / 2
        return self.config.peak_lr(self.d_in) * share

    def weight(self) -> float:
        """Of the sparsity penalty in the coming step."""
        config = self.config
        peak = self.architecture.penalty_weight(config, self.d_out, float(self.variance))
        rise = (self.step_number + 1) / max(config.in_steps(config.l1_warmup), 1)
        return peak * min(1.0, rise) * float(self.factor)

    def _control(self, outcome: Outcome, total: int) -> None:
        """Raise or lower the penalty's weight by the mean L0 since the last decision (2023 recipe).

        Unlike that recipe it waits while L0 is already on its way, without which the weight grows without bound.
        """
        config = self.config
        if config.controller is Controller.fixed:
            return
        self.l0_sum += self.group.all_reduce(outcome.fires.sum()) / total
        done = self.step_number + 1
        if done % config.control_every:
            return
        target = config.target_l0 or 0
        off, last = float(self.l0_sum) / config.control_every - target, float(self.l0_last) - target
        self.l0_sum.zero_()
        self.l0_last.fill_(off + target)
        approaching = off * last > 0 and abs(off) < APPROACHING * abs(last)
        acting = done * config.batch_size > config.control_after_tokens and not approaching
        if acting and abs(off) > config.control_band:
            self.factor *= config.control_factor if off > 0 else 2 - config.control_factor

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _metrics(self, y: Tensor, outcome: Outcome, total: int) -> dict[str, float]:
        """Of this batch, over all processes; the error and the variance are those of the batch."""
        y64, fired = y.double(), outcome.fires.sum().double()
        parts = torch.stack(
            [outcome.error.double().square().sum(), y64.square().sum(), fired, outcome.penalty.double()]
        )
        squared_error, squared, active, penalty = self.group.all_reduce(parts).tolist()
        variance = squared - float(self.group.all_reduce(y64.sum(0)).square().sum()) / total
        return {
            "fvu": squared_error / max(variance, 1e-30),
            "l0": active / total,
            "penalty": penalty / total,
            "dead": float(self.firing.dead().double().mean()),
        }

    # --- dead features -----------------------------------------------------------------------------------------------

    def _resample(self, batch: Batch, error: Tensor, positions: Tensor | None) -> None:
        """Replace dead features; no other feature changes, and the optimiser forgets the replaced ones."""
        rare = self.firing.rare()
        dead = rare.nonzero()[:, 0]
        if len(dead) == 0:
            self.firing.looked(dead)
            return
        x, y, loss = batch.x, batch.y - self.p["b_dec"], error.square().sum(-1)
        if positions is not None:  # the batch of all processes, in the order that one process sees
            x, y, loss = (self._whole(part, positions) for part in (x, y, loss))
        rows = revival.replacements(self.config, self.p, dead, ~rare, x, y, loss, self.step_number)
        rows |= self.architecture.further_parameters(self.config, len(dead), x.device)
        for name, parameter in self.trainable().items():
            if name in rows:
                parameter[dead] = rows[name]
                self.optimizer.forget(parameter, dead)
        self.firing.looked(dead)

    def _whole(self, share: Tensor, positions: Tensor) -> Tensor:
        whole = share.new_zeros(self.config.batch_size, *share.shape[1:])
        whole[positions] = share
        return self.group.all_reduce(whole)

    # --- state and result --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resumed trainer needs."""
        tensors = {name: tensor.detach() for name, tensor in self.p.items()}
        tensors |= {name: getattr(self, name) for name in BUFFERS}
        tensors |= {name: getattr(self.firing, name) for name in COUNTERS}
        tensors["step"] = torch.tensor(self.step_number)
        for name, parameter in self.trainable().items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        if self.config.tied:  # one tensor under two names is written once
            del tensors["encoder"]
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`, to the bit."""
        for name, tensor in self.p.items():
            if name in tensors:
                tensor.copy_(tensors[name])
        for name in BUFFERS:
            getattr(self, name).copy_(tensors[name])
        for name in COUNTERS:
            getattr(self.firing, name).copy_(tensors[name])
        self.step_number = int(tensors["step"])
        for name, parameter in self.trainable().items():
            prefix = f"optimizer.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value.clone().to(parameter.device if value.ndim else "cpu")
                for key, value in tensors.items()
                if key.startswith(prefix)
            }

    @torch.no_grad()
    def finish(self) -> SAE:
        """The SAE for raw activations: scales and decoder norms folded into the weights."""
        trainable = self.trainable()
        p = {n: self.optimizer.result(trainable[n]) if n in trainable else t for n, t in self.p.items()}
        if self.config.tied:
            p["encoder"] = p["decoder"]
        return folded(p, self)


def _initial(config: SaeConfig, d_in: int, d_sae: int, d_out: int | None, device: torch.device | str) -> Parameters:
    """Random directions; an autoencoder's encoder starts as its decoder."""
    generator = torch.Generator().manual_seed(config.seed)
    norm = config.decoder_start or (FREE_NORM_START if config.decoder_norm is DecoderNorm.free else 1.0)

    def directions(width: int) -> Tensor:
        rows = torch.randn(d_sae, width, generator=generator).to(device)
        return rows * (norm / rows.norm(dim=-1, keepdim=True))

    decoder = directions(d_out or d_in)
    encoder = directions(d_in) if d_out else decoder if config.tied else decoder.clone()
    zeros = torch.zeros(d_sae, device=device)
    return {"encoder": encoder, "b_enc": zeros, "decoder": decoder, "b_dec": torch.zeros(d_out or d_in, device=device)}


def folded(p: Parameters, trainer: "SaeTrainer") -> SAE:
    """The SAE for raw activations that equals parameters acting on scaled ones.

    x^ = (f D + b_dec) / s_out with f = act(W (s x - c) + b_enc), so f_raw = f |D| / s_out; for an autoencoder s_out = s
    and c = b_dec, and the scale cancels in W. What the architecture folds comes first.
    """
    s, parts = trainer.target_scale, trainer.architecture
    k = trainer.config.k if parts.SAVED_AS == "topk" else None
    d_out = trainer.d_out if trainer.transcoder else None
    sae = SAE(trainer.d_in, trainer.d_sae, parts.SAVED_AS, k, d_out).to(s.device)
    norm = p["decoder"].norm(dim=-1).clamp_min(1e-12)  # [d_sae]
    encoder, bias, threshold = parts.fold(p, trainer.cut)
    if trainer.transcoder:
        bias = bias - encoder @ trainer.offset
        encoder = encoder * (trainer.scale / s)
    sae.W_enc.copy_((encoder * norm[:, None]).T)
    sae.b_enc.copy_(bias * norm / s)
    sae.W_dec.copy_(p["decoder"] / norm[:, None])
    sae.b_dec.copy_(p["b_dec"] / s)
    if sae.threshold is not None:
        sae.threshold.copy_(threshold / s)
    sae.site = trainer.name
    return sae


def check_shape(start: SAE, trainer: "SaeTrainer") -> SAE:
    """Refuse an SAE to begin with that has another shape."""
    shape = (start.d_in, start.d_sae, start.d_out if start.transcoder else None)
    wanted = (trainer.d_in, trainer.d_sae, trainer.d_out if trainer.transcoder else None)
    if shape != wanted:
        raise ValueError(
            f"sae.init_from has d_in, d_sae, d_out = {shape}, but the SAE at {trainer.name} is to have {wanted};"
            f" write sae.expansion=null sae.d_sae={start.d_sae}"
        )
    return start


def copy_start(start: SAE, trainer: "SaeTrainer") -> None:
    """Begin with a saved SAE, whose weights act on raw activations: the inverse of `folded`."""
    p, s = trainer.p, trainer.target_scale
    norm = start.W_dec.norm(dim=-1).clamp_min(1e-12).to(s.device)
    raw = {name: tensor.to(s.device) for name, tensor in start.state_dict().items()}
    threshold = raw.get("threshold", torch.zeros_like(norm)) * norm * s
    encoder, bias = raw["W_enc"].T * norm[:, None], raw["b_enc"] * norm * s
    if trainer.transcoder:
        encoder = encoder * (s / trainer.scale)
        bias = bias + encoder @ trainer.offset
    p["encoder"].copy_(encoder)
    p["decoder"].copy_(raw["W_dec"] / norm[:, None])
    p["b_dec"].copy_(raw["b_dec"] * s)
    for name, tensor in trainer.architecture.unfold(bias, threshold).items():
        p[name].copy_(tensor)
