"""Published losses of sparse autoencoders, plainly: dense, differentiated by autograd, nothing shared with saerl.

Parameters lie a feature a row, as in training: `encoder` [d_sae, d_in], `b_enc` [d_sae] (b_gate of a gated SAE),
`decoder` [d_sae, d_out], `b_dec` [d_out], `threshold` [d_sae] (jumprelu), `r_mag` and `b_mag` [d_sae] (gated). Without
`encoder` the SAE is tied. Every loss is a function of (params, x [n, d_in], y [n, d_out], settings) and returns
(loss, f [n, d_sae], x_hat [n, d_out]); an autoencoder has y = x, a transcoder has y != x and a constant `centre`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Result = tuple[Tensor, Tensor, Tensor]


@dataclass
class Settings:
    """What the losses depend on beside parameters and data; coefficients are those of the canonical form."""

    decoder_norm: str = "free"  # unit, renormalised: row norms are 1 and weigh nothing
    centre: Tensor | None = None  # subtracted from the input instead of b_dec (transcoder), [d_in]
    k: int = 4
    prefixes: tuple[float, ...] = (0.25, 0.5, 1.0)
    l1: float = 0.5
    l0: float = 0.3
    penalty: str = "step"
    tanh_scale: float = 4.0
    target_l0: float = 5.0
    bandwidth: float = 0.5
    ste_to_input: bool = True
    preact: float = 0.0
    auxk: float = 0.0
    auxk_unit: str = "relative"  # residual, plain: what the weight is divided by
    auxk_latents: int | None = None  # d_in / 2 when None
    dead: Tensor | None = None  # [d_sae], bool


# --- what the losses have in common ----------------------------------------------------------------------------------


def pre_activations(params: Params, x: Tensor, s: Settings) -> Tensor:
    """(x - b_dec) W_enc + b_enc, or (x - centre) W_enc + b_enc: [n, d_sae]."""
    encoder = params.get("encoder", params["decoder"])
    origin = params["b_dec"] if s.centre is None else s.centre
    return (x - origin) @ encoder.T + params["b_enc"]


def norms(params: Params, s: Settings) -> Tensor:
    """What a feature weighs in penalties and selection: |W_dec_i| where it is free, else 1; [d_sae]."""
    if s.decoder_norm == "free":
        return params["decoder"].square().sum(1).sqrt()
    return torch.ones_like(params["b_enc"])


def squared_error(y: Tensor, x_hat: Tensor) -> Tensor:
    """Summed over dimensions, averaged over tokens."""
    return (y - x_hat).square().sum(1).mean()


def variance(y: Tensor) -> Tensor:
    """Mean squared distance from the mean."""
    return (y - y.mean(0)).square().sum(1).mean()


def decode(params: Params, f: Tensor) -> Tensor:
    """f W_dec + b_dec: [n, d_out]."""
    return f @ params["decoder"] + params["b_dec"]


def auxk_loss(params: Params, pre: Tensor, x: Tensor, y: Tensor, x_hat: Tensor, s: Settings) -> Tensor:
    """Dead features reconstruct the error of the others (Gao et al. 2024), their raw pre-activations as codes.

    Both losses are relative to the variance of their target, hence V / V_res; the variances are constants. With
    `auxk_unit` residual the main one is not (dictionary_learning), with plain neither is (SAELens).
    """
    if s.auxk == 0 or s.dead is None or not s.dead.any():
        return torch.zeros(())
    k = min(s.auxk_latents or x.shape[1] // 2, int(s.dead.sum()))
    keep = torch.zeros_like(pre)
    for t, row in enumerate((pre * norms(params, s)).detach()):
        candidates = row.masked_fill(~s.dead, -torch.inf)
        keep[t, candidates.argsort(descending=True)[:k]] = 1
    residual = (y - x_hat).detach()
    guess = (pre * keep) @ params["decoder"]
    ratio = {
        "relative": variance(y.detach()) / variance(residual),
        "residual": 1 / variance(residual),
        "plain": 1.0,
    }[s.auxk_unit]
    return s.auxk * ratio * squared_error(residual, guess)


# --- relu ------------------------------------------------------------------------------------------------------------


def relu_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """Squared error + L1 of f |W_dec| (Anthropic, April 2024), or of f at unit norm (Bricken et al. 2023)."""
    f = pre_activations(params, x, s).relu()
    x_hat = decode(params, f)
    l1 = (f * norms(params, s)).sum(1).mean()
    return squared_error(y, x_hat) + s.l1 * l1, f, x_hat


# --- topk, batchtopk, matryoshka -------------------------------------------------------------------------------------


def topk_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """The k largest z |W_dec| of a token are kept, then ReLU (Gao et al. 2024; SAELens for free norms)."""
    pre = pre_activations(params, x, s)
    order = (pre * norms(params, s)).detach().argsort(dim=1, descending=True)
    keep = torch.zeros_like(pre)
    for t in range(len(x)):
        keep[t, order[t, : s.k]] = 1
    f = pre.relu() * keep
    x_hat = decode(params, f)
    return squared_error(y, x_hat) + auxk_loss(params, pre, x, y, x_hat, s), f, x_hat


def batch_codes(params: Params, pre: Tensor, s: Settings) -> Tensor:
    """ReLU, and the k n largest f |W_dec| of the n tokens are kept (Bussmann et al. 2024): [n, d_sae]."""
    f = pre.relu()
    flat = (f * norms(params, s)).detach().flatten()
    keep = torch.zeros_like(flat)
    keep[flat.argsort(descending=True)[: s.k * len(pre)]] = 1
    return f * keep.reshape(f.shape)


def batchtopk_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """Squared error of the BatchTopK codes."""
    pre = pre_activations(params, x, s)
    f = batch_codes(params, pre, s)
    x_hat = decode(params, f)
    return squared_error(y, x_hat) + auxk_loss(params, pre, x, y, x_hat, s), f, x_hat


def matryoshka_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """Sum of the squared errors of prefixes of the BatchTopK codes (Bussmann et al. 2025; summed as SAELens does)."""
    pre = pre_activations(params, x, s)
    f = batch_codes(params, pre, s)
    loss = torch.zeros(())
    for share in s.prefixes:
        m = round(share * f.shape[1])
        loss = loss + squared_error(y, f[:, :m] @ params["decoder"][:m] + params["b_dec"])
    x_hat = decode(params, f)
    return loss + auxk_loss(params, pre, x, y, x_hat, s), f, x_hat


# --- jumprelu --------------------------------------------------------------------------------------------------------


class Jump(torch.autograd.Function):
    """z 1[z > theta], or 1[z > theta] itself, with the rectangle kernel as the derivative of the step.

    d(step)/d(theta) = -K((z - theta) / eps) / eps with K(u) = 1 where |u| < 1/2, and d(z step)/d(theta) is theta times
    that (Rajamanoharan et al. 2024b); with `to_input` z gets the opposite (Anthropic, January 2025).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float, to_input: bool, times_z: bool) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.settings = (eps, to_input, times_z)
        step = torch.where(z > theta, 1.0, 0.0).to(z.dtype)
        return z * step if times_z else step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, theta = ctx.saved_tensors
        eps, to_input, times_z = ctx.settings
        inside = torch.where(((z - theta) / eps).abs() < 0.5, 1.0, 0.0).to(z.dtype)
        height = (theta if times_z else torch.ones_like(theta)) * inside / eps
        to_z = torch.where(z > theta, 1.0, 0.0).to(z.dtype) if times_z else torch.zeros_like(z)
        if to_input:
            to_z = to_z + height
        return grads[0] * to_z, -(grads[0] * height).sum(0), None, None, None


def jumprelu_penalty(f: Tensor, step: Tensor, norm: Tensor, s: Settings) -> Tensor:
    """What firing costs; `step` [n, d_sae] is 1 where a feature fires."""
    l0 = step.sum(1)
    if s.penalty == "step":
        return s.l0 * l0.mean()
    if s.penalty == "tanh":
        return s.l0 * torch.tanh(s.tanh_scale * f * norm).sum(1).mean()
    if s.penalty == "target":
        return s.l0 * (l0.mean() / s.target_l0 - 1) ** 2
    assert s.penalty == "quadratic"
    return s.l0 * (l0 / s.target_l0 - 1).square().mean()


def jumprelu_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """Squared error + penalty + what pulls dead features over their thresholds (Anthropic, January 2025)."""
    z, theta, norm = pre_activations(params, x, s), params["threshold"], norms(params, s)
    f = Jump.apply(z, theta, s.bandwidth, s.ste_to_input, True)
    step = Jump.apply(z, theta, s.bandwidth, s.ste_to_input, False)
    assert isinstance(f, Tensor) and isinstance(step, Tensor)
    x_hat = decode(params, f)
    loss = squared_error(y, x_hat) + jumprelu_penalty(f, step, norm, s)
    if s.preact and s.dead is not None:
        loss = loss + s.preact * ((theta - z).relu() * norm * s.dead).sum(1).mean()
    return loss, f, x_hat


# --- gated -----------------------------------------------------------------------------------------------------------


def gated_loss(params: Params, x: Tensor, y: Tensor, s: Settings) -> Result:
    """Squared error + L1 of the gate + error of the gate's own reconstruction by a frozen decoder (2024a)."""
    encoder = params.get("encoder", params["decoder"])
    origin = params["b_dec"] if s.centre is None else s.centre
    gate = pre_activations(params, x, s)
    magnitude = (x - origin) @ (encoder * params["r_mag"].exp()[:, None]).T + params["b_mag"]
    f = torch.where(gate > 0, magnitude.relu(), 0.0)
    x_hat = decode(params, f)
    opened = gate.relu()
    by_gate = opened @ params["decoder"].detach() + params["b_dec"].detach()
    l1 = (opened * norms(params, s)).sum(1).mean()
    return squared_error(y, x_hat) + s.l1 * l1 + squared_error(y, by_gate), f, x_hat


LOSS = {
    "relu": relu_loss,
    "topk": topk_loss,
    "batchtopk": batchtopk_loss,
    "matryoshka": matryoshka_loss,
    "jumprelu": jumprelu_loss,
    "gated": gated_loss,
}


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(architecture: str, params: Params, x: Tensor, y: Tensor, s: Settings) -> tuple[Result, Params]:
    """The loss and what the optimiser is given; at `decoder_norm=unit` the part along a decoder row is removed."""
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in params.items()}
    loss, f, x_hat = LOSS[architecture](leaves, x, y, s)
    names = list(leaves)
    found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
    grads = {
        name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in zip(names, found, strict=True)
    }
    if s.decoder_norm == "unit":
        rows = params["decoder"] / params["decoder"].square().sum(1, keepdim=True).sqrt()
        grads["decoder"] = grads["decoder"] - (grads["decoder"] * rows).sum(1, keepdim=True) * rows
    return (loss.detach(), f.detach(), x_hat.detach()), grads
