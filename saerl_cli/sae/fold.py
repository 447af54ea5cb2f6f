"""Between the scaled inputs of training and the raw activations on which a saved SAE acts."""

from typing import TYPE_CHECKING

import torch

from saerl_cli.config.sae import Architecture
from saerl_cli.sae.architectures.common import Parameters
from saerl_cli.sae.autoencoder import SAE

if TYPE_CHECKING:
    from saerl_cli.sae.train import SaeTrainer


def folded(p: Parameters, trainer: "SaeTrainer") -> SAE:
    """The SAE for raw activations that equals parameters acting on scaled ones.

    x^ = (f D + b_dec) / s_out with f = act(W (s x - c) + b_enc), so f_raw = f |D| / s_out; for an autoencoder s_out = s
    and c = b_dec, and the scale cancels in W. BatchTopK keeps z |D| >= cut. A gated feature fires where z > 0 and its
    magnitude M = x_c W e^r + b_mag > 0, hence where M > max(0, b_mag - e^r b_enc): it is a JumpReLU of M.
    """
    architecture, s = trainer.config.architecture, trainer.target_scale
    names = {Architecture.relu: "standard", Architecture.topk: "topk"}
    k = trainer.config.k if architecture is Architecture.topk else None
    d_out = trainer.d_out if trainer.transcoder else None
    sae = SAE(trainer.d_in, trainer.d_sae, names.get(architecture, "jumprelu"), k, d_out).to(s.device)
    norm = p["decoder"].norm(dim=-1).clamp_min(1e-12)  # [d_sae]
    encoder, bias, threshold = p["encoder"], p["b_enc"], torch.zeros_like(norm)
    if architecture is Architecture.jumprelu:
        threshold = p["threshold"] * norm
    elif architecture in (Architecture.batchtopk, Architecture.matryoshka):
        # kept were scores >= cut, and what is saved keeps those above its threshold
        threshold = torch.nextafter(trainer.cut, torch.zeros_like(trainer.cut)).expand_as(norm)
    elif architecture is Architecture.gated:
        stretch = p["r_mag"].exp()
        threshold = (p["b_mag"] - stretch * p["b_enc"]).clamp_min(0) * norm
        encoder, bias = encoder * stretch[:, None], p["b_mag"]
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
    p, s, architecture = trainer.p, trainer.target_scale, trainer.config.architecture
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
    p["b_enc"].copy_(bias)
    if architecture is Architecture.jumprelu:
        p["threshold"].copy_(threshold)
    if architecture is Architecture.gated:  # pre > threshold, and the magnitude is pre itself
        p["b_mag"].copy_(bias)
        p["b_enc"].copy_(bias - threshold)
