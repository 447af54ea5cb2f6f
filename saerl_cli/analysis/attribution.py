"""Attribution of a policy's reward gain to its coefficients: the reward's gradient along the way to the policy.

With all coefficients scaled by alpha, delta = alpha * delta*, alpha = 0 is the reference and alpha = 1 the policy, so

    gain = J(1) - J(0) = sum_i delta*_i  integral_0^1 dJ/ddelta_i (alpha delta*) dalpha

(integrated gradients, Sundararajan, Taly and Yan 2017, of an expected reward). The gradient is the policy gradient,

    dJ/ddelta_i = E sum_t A_t d log p(y_t | y_<t) / d delta_i,   A_t = r(y) - r(y_<=t-1) - b_t

where r(y_<=t-1), the reward of what has been written before token t, and b_t, the mean of r(y) - r(y_<=t-1) over the
*other* completions, are baselines: they do not depend on token t, so the estimate stays unbiased. Every shift of the
splice `pre_activation` counts with its coefficient.

Letters: B completions, T tokens (of prompt and completion), M features at a site, F those not untouched, of all sites.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saerl_cli.adapter import biases, deltas
from saerl_cli.adapter.coefficients.deltas import site_layers
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.adapter.tuner import on_activation
from saerl_cli.data.prompts import Prompt
from saerl_cli.models import output_tensor
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.evaluation.measure import Sampling, generate, log_probabilities
from saerl_cli.rl.policy import Policy
from saerl_cli.run.seeds import derived_seed

AT_ONCE = 30_000_000
"""Numbers, tokens times features, that an attribution holds at once."""

# --- the coefficients of a policy as one vector ----------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a policy that are not untouched, one after the other in the order of the sites."""

    sites: list[str]
    """All sites of the policy."""
    sizes: list[int]
    """Features of each."""
    site: Tensor
    """[F] index into `sites`."""
    feature: Tensor
    """[F] number of the feature at its site."""
    delta: Tensor
    """[F] c - 1."""

    def __len__(self) -> int:
        return len(self.delta)

    def name(self, i: int) -> str:
        """SITE:FEATURE of an entry."""
        return f"{self.sites[int(self.site[i])]}:{int(self.feature[i])}"

    def at(self, site: str) -> Tensor:
        """Which entries are of a site, [F]."""
        return self.site == self.sites.index(site)


def touched(model: Any) -> Coefficients:
    """Collect the coefficients of a model that are not untouched: delta, or the shift of `pre_activation`, is not 0."""
    found, shifts = deltas(model), biases(model)
    places = [
        ((delta != 0) | (shifts[site] != 0) if site in shifts else delta != 0).nonzero()[:, 0]
        for site, delta in found.items()
    ]
    return Coefficients(
        sites=list(found),
        sizes=[len(delta) for delta in found.values()],
        site=torch.cat([torch.full_like(place, number) for number, place in enumerate(places)]),
        feature=torch.cat(places),
        delta=torch.cat([delta[place] for delta, place in zip(found.values(), places, strict=True)]),
    )


@contextmanager
def scaled(model: Any, coefficients: Coefficients, scale: Tensor | float) -> Iterator[None]:
    """Within, every coefficient (and its shift) is multiplied by `scale`, [F] or one number.

    Afterwards they are what they were, to the bit, whatever happened inside.
    """
    layers = site_layers(model)
    parameters = {site: own_parameters(layers[site]) for site in coefficients.sites}
    before = {site: [p.detach().clone() for p in found] for site, found in parameters.items()}
    factors = torch.as_tensor(scale, dtype=torch.float32).expand(len(coefficients))
    try:
        with torch.no_grad():
            for site, found in parameters.items():
                here = coefficients.at(site)
                for parameter in found:
                    features = coefficients.feature[here].to(parameter.device)
                    parameter[features] *= factors[here].to(parameter.device)
        yield
    finally:
        with torch.no_grad():
            for site, found in parameters.items():
                for parameter, value in zip(found, before[site], strict=True):
                    parameter.copy_(value)


def own_parameters(layer: SparseCoeffLayer) -> list[Tensor]:
    """The parameters of a layer's adapter: delta and, where there is one, the shift, each [d_sae]."""
    held: list[Any] = [layer.sparse_coeffs_delta, layer.sparse_coeffs_bias]
    return [modules["default"].weight for modules in held if "default" in modules]


# --- rewards of beginnings -------------------------------------------------------------------------------------------


def advantages(
    reward: Reward, policy: Policy, prompts: Sequence[Prompt], completions: Sequence[list[int]], prefixes: bool
) -> Tensor:
    """A_t of the formula above: [B, longest completion], float64, 0 behind the end of a completion.

    Args:
        reward: scores completions.
        policy: whose tokenizer reads them.
        prompts: of the completions.
        completions: token ids.
        prefixes: whether the beginnings of completions are scored too; otherwise r(y_<t) counts as 0.
    """
    width = max(map(len, completions))
    ahead = torch.zeros(len(completions), width, dtype=torch.float64)  # what is still to be earned at token t
    rows = [(b, t) for b, ids in enumerate(completions) for t in (range(1, len(ids)) if prefixes else [])]
    parts = [(b, completions[b]) for b in range(len(completions))] + [(b, completions[b][:t]) for b, t in rows]
    texts = policy.tokenizer.batch_decode([ids for _, ids in parts], skip_special_tokens=True)
    chosen = [prompts[b] for b, _ in parts]
    scores = reward.score([p.text for p in chosen], texts, [ids for _, ids in parts], [p.answer for p in chosen])[TOTAL]
    for b, ids in enumerate(completions):
        ahead[b, : len(ids)] = scores[b]
    for (b, t), score in zip(rows, scores[len(completions) :], strict=True):
        ahead[b, t] -= score
    return less_the_others(ahead, torch.tensor([len(ids) for ids in completions]))


def less_the_others(ahead: Tensor, lengths: Tensor) -> Tensor:
    """Subtract at every token the mean of all other rows, [B, T] both; tokens behind a row's end, [B], become 0."""
    others = (ahead.sum(0) - ahead) / max(1, len(ahead) - 1)
    return (ahead - others) * (torch.arange(ahead.shape[1]) < lengths[:, None])


# --- the gradient ----------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What one forward pass leaves behind at a site."""

    h: Tensor
    """[B, T, d_in], what the splice reads."""
    zero: Tensor
    """[B, T, d_in], a zero added to what the splice writes: its gradient is that of the site's output."""


@contextmanager
def watching(model: Any) -> Iterator[dict[str, Watched]]:
    """Within, every forward pass records `Watched` by site, with gradients switched on from there."""
    found: dict[str, Watched] = {}
    handles = []
    for site, layer in site_layers(model).items():

        def read(module: Any, args: Any, output: Any, site: str = site) -> None:
            h = output_tensor(output)
            found[site] = Watched(h.detach(), torch.zeros_like(h).requires_grad_(True))

        def add(module: Any, args: Any, output: Any, site: str = site) -> Any:
            return on_activation(output, lambda h: h + found[site].zero)

        handles += [layer.base_layer.register_forward_hook(read), layer.register_forward_hook(add)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tangent(layer: SparseCoeffLayer, h: Tensor) -> Tensor:
    """How fast the activations that a splice decodes change with alpha, at the layer's present coefficients.

    The caller multiplies the first of these by delta*, and divides the second, whose delta and d are the present ones,
    by alpha:

        error_preserving, reconstruct   f(h)
        pre_activation                  [f' != 0] (delta pre + d)

    h: [n, d_in] -> [n, d_sae].
    """
    sae = layer.sae
    x = h.to(sae.W_dec.dtype)
    if layer.kind != "pre_activation":
        return sae.encode(x)
    total = layer.total(["default"])
    assert total is not None
    delta, shift = total
    assert shift is not None
    pre = sae.pre_activations(x)
    return (delta * pre + shift) * (sae.activate((1 + delta) * pre + shift) != 0)


@torch.no_grad()
def site_attributions(layer: SparseCoeffLayer, seen: Watched, gradient: Tensor, features: Tensor) -> Tensor:
    """Sum over tokens of each feature's tangent times the gradient along its direction: [B, features], float64.

    Args:
        layer: of the site.
        seen: its pass.
        gradient: of the site's output, [B, T, d_in].
        features: [F here] numbers of the features.
    """
    directions = layer.sae.W_dec[features]  # [F here, d_in]
    found = []
    at_once = max(1, AT_ONCE // (gradient.shape[1] * layer.sae.d_sae))
    for h, g in zip(seen.h.split(at_once), gradient.split(at_once), strict=True):
        moves = tangent(layer, h.flatten(0, 1))[:, features].view(*h.shape[:2], -1)  # [b, T, F here]
        along = g.to(directions.dtype) @ directions.T  # [b, T, F here]
        found.append((moves * along).sum(1, dtype=torch.float64).cpu())
    return torch.cat(found)


def pass_attributions(
    policy: Policy,
    coefficients: Coefficients,
    alpha: float,
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    weights: Tensor,
    temperature: float,
) -> Tensor:
    """delta*_i times the gradient of `sum_t weights_t log p(y_t)` at the model's present coefficients: [B, F], float64.

    Args:
        policy: its coefficients already scaled by alpha.
        coefficients: those of alpha = 1.
        alpha: > 0.
        prompts: of the completions.
        completions: token ids.
        weights: [B, T], on the CPU.
        temperature: of sampling.
    """
    with watching(policy.model) as seen, torch.enable_grad():
        logp, tokens, mask = log_probabilities(
            policy.model, prompts, completions, policy.tokenizer.pad_token_id, temperature
        )
        chosen = logp.gather(-1, tokens[..., None]).squeeze(-1)  # [B, T]
        loss = (chosen * mask * weights[:, : mask.shape[1]].to(chosen)).sum()  # rows do not mix: one gradient each
        gradients = torch.autograd.grad(loss, [watched.zero for watched in seen.values()])
    result = torch.zeros(len(prompts), len(coefficients), dtype=torch.float64)
    layers = site_layers(policy.model)
    for (site, watched), gradient in zip(seen.items(), gradients, strict=True):
        here, layer = coefficients.at(site), layers[site]
        features = coefficients.feature[here].to(gradient.device)
        found = site_attributions(layer, watched, gradient, features)
        unit = 1 / alpha if layer.kind == "pre_activation" else coefficients.delta[here].double()
        result[:, here] = found * unit
    return result


def attribute(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    coefficients: Coefficients,
    how: Sampling,
    alphas: int,
    prefixes: bool,
) -> Iterator[Tensor]:
    """Attributions at each of the midpoints alpha = (k + 1/2) / alphas: [prompts, F], float32, one after the other.

    Their mean over alphas, then over prompts, is the attribution; its sum over features is the gain, up to noise.
    """
    for number in range(alphas):
        alpha = (number + 0.5) / alphas
        seed = derived_seed(how.seed, number)
        with scaled(policy.model, coefficients, alpha):
            completions = generate(
                policy.model, prompts, policy.tokenizer, policy.eos_token_ids, how.max_new_tokens, how.temperature,
                how.batch_size, seed,
            )  # fmt: skip
            weights = advantages(reward, policy, prompts, completions, prefixes)
            found = []
            for start in range(0, len(prompts), BACKWARD_ROWS):
                part = slice(start, start + BACKWARD_ROWS)
                found.append(
                    pass_attributions(
                        policy, coefficients, alpha, prompts[part], completions[part], weights[part], how.temperature
                    )
                )
        yield torch.cat(found).float()


BACKWARD_ROWS = 32
"""Completions whose gradients are computed at once."""
