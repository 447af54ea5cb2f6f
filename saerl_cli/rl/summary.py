"""The numbers that a run of `saerl rlhf` ends with."""

import resource
from typing import Any

import torch

from saerl_cli.activations import capture, special_ids, text_mask
from saerl_cli.adapter import deltas, effects, moved
from saerl_cli.config.groups import ModelKind
from saerl_cli.models import resolve_sites
from saerl_cli.rl.build import RlhfSetup
from saerl_cli.rl.evaluation.baselines import behaviour
from saerl_cli.rl.evaluation.measure import cycled, measure
from saerl_cli.rl.outcome import task_numbers, warnings_of
from saerl_cli.rl.policy import Policy
from saerl_cli.rl.rollouts.scoring import is_value_parameter
from saerl_cli.rl.runs import kl_coef
from saerl_cli.rl.training.base import PhasedTrainer
from saerl_cli.sae.describe import top_tokens
from saerl_cli.sae.files import load_sae

TOP_FEATURES = 20
"""Features in summary.json, those whose coefficients write most."""
LABEL_ROWS = 64
"""Held-out rows that name a feature by the token it fires on."""


def summarise(setup: RlhfSetup, trainer: PhasedTrainer, policy: Policy) -> dict[str, Any]:
    """The numbers of summary.json."""
    config = setup.config
    policy.model.eval()
    how = setup.sampling("summary")
    numbers, before, after = measure(
        policy,
        setup.reward,
        cycled(setup.heldout_prompts, config.evaluation.samples),
        setup.heldout_rows,
        how,
        attributes=config.model.kind is ModelKind.planted,
    )
    numbers["behaviour"] = behaviour(policy, setup.reward, before, after, how, kl_coef(setup.run.path))
    sizes = {name: p.numel() for name, p in trainer.trainable()}
    value = sum(size for name, size in sizes.items() if is_value_parameter(name))
    algo = config.algo
    episodes = algo.phases * (algo.rollouts if algo.samples else algo.steps * algo.batch_size)
    numbers |= task_numbers(setup, policy, numbers)
    return {
        "adapter": config.adapter.kind,
        "algo": algo.kind.value,
        "trainable_parameters": sum(sizes.values()) - value,
        "value_parameters": value,
        **numbers,
        **curse_words(numbers),
        "warnings": warnings_of(setup, numbers),
        "phases": algo.phases,
        "steps": trainer.args.max_steps,
        "samples": episodes,
        "seconds": trainer.seconds,
        "samples_per_second": episodes / max(trainer.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "frozen_unchanged": True,  # the run has failed before this when it is not
        **coefficient_statistics(policy.model),
        "top_features": top_features(setup, policy),
    }


def curse_words(numbers: dict[str, Any]) -> dict[str, float]:
    """In the planted language: curse words per completion, their share of all words, and how much of that is gone."""
    if "attributes_before" not in numbers:
        return {}
    found = {}
    for when in ("before", "after"):
        cursing = numbers[f"attributes_{when}"]["cursing"]
        found |= {f"curse_words_{when}": cursing["per_completion"], f"curse_share_{when}": cursing["share"]}
    if found["curse_share_before"] > 0:
        found["curse_removed"] = 1 - found["curse_share_after"] / found["curse_share_before"]
    return found


def coefficient_statistics(model: Any) -> dict[str, float]:
    """How far the coefficients are from untouched, and how many not exactly so (`nonzero`); empty without any."""
    found = deltas(model)
    if not found:
        return {}
    delta = torch.cat(list(found.values()))
    return {
        "nonzero": int((delta != 0).sum()),
        "changed": int(moved(delta).sum()),
        "delta_max": delta.abs().max().item(),
        "delta_norm": delta.norm().item(),
    }


@torch.no_grad()
def top_features(setup: RlhfSetup, policy: Policy) -> list[dict[str, Any]]:
    """List the features that moved, by effect, each labelled with the token it fires most on ("" if it never does).

    Effects and labels are those of the untouched model on held-out text.
    """
    found = deltas(policy.model)
    if not any(bool(moved(delta).any()) for delta in found.values()):
        return []
    tokenizer, rows = setup.loaded.tokenizer, setup.heldout_rows[:LABEL_ROWS]
    sites = resolve_sites(list(setup.saes), setup.loaded.model)
    with policy.reference():
        base = policy.model.get_base_model()
        activations = capture(base, sites, rows.to(base.device))
    text = text_mask(rows, special_ids(tokenizer))  # [n, context]
    listed = []
    for site in sites:
        sae, delta = load_sae(setup.saes[site.name]), found[site.name]
        f = sae.encode(activations[site.name].cpu()[text].to(sae.W_enc.dtype))  # [tokens, d_sae]
        effect = torch.where(moved(delta), effects(delta, f.mean(0), sae.W_dec), -1.0)
        best = effect.topk(min(TOP_FEATURES, len(effect))).indices.tolist()
        features = [i for i in best if effect[i] >= 0]
        for i, tokens in zip(features, top_tokens(f[:, features], rows[text], 1), strict=True):
            row = {"site": site.name, "feature": i, "delta": float(delta[i]), "effect": float(effect[i])}
            listed.append(row | {"label": tokenizer.decode(tokens).strip()})
    return sorted(listed, key=lambda row: -row["effect"])[:TOP_FEATURES]


def peak_memory() -> int:
    """Most memory this process has held, in bytes: the GPU's where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
