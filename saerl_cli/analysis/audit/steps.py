"""The steps of an audit: rank all features, revert, keep only, control, compare, classify.

Each returns a part of a `saerl_cli.rl.results.Audit`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.adapter import moved
from saerl_cli.analysis.attribution import Coefficients, attribute, scaled, touched
from saerl_cli.analysis.audit import classify
from saerl_cli.analysis.audit.agreement import spearman, top_overlap
from saerl_cli.analysis.audit.curves import (
    SHARES,
    coarse_grid,
    control,
    curve,
    grid,
    matched,
    needed,
    only,
    random_order,
)
from saerl_cli.analysis.audit.variants import REFERENCE_DRAWS, Gain, Variants, difference, interaction, ratio
from saerl_cli.config.audit import AuditConfig
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.groups import ModelKind
from saerl_cli.config.reward import RewardConfig
from saerl_cli.config.rlhf import EvaluationConfig
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rl.adapters.selection import select
from saerl_cli.rl.evaluation.measure import Samples, attribute_shares, describe, generate, mean_and_error
from saerl_cli.rl.policy_evaluation import EvaluationSetup, build_evaluation, record_inputs
from saerl_cli.rl.results import AUDIT, AUDIT_VERSION, Audit, read_audit
from saerl_cli.rl.runs import deltas_of, run_config
from saerl_cli.run.directory import Run
from saerl_cli.run.progress import say
from saerl_cli.run.seeds import derived_seed

RANKING, GRADING, NULL, REFERENCE = 21, 22, 23, 24
"""What completions are drawn for: each has random numbers of its own."""
OVERLAP = 100
"""Features a site whose overlap between runs is counted, at most."""

Numbers = dict[str, Any]

# --- the audit -------------------------------------------------------------------------------------------------------


@dataclass
class AuditContext:
    """What every step needs."""

    config: AuditConfig
    bench: EvaluationSetup
    coefficients: Coefficients
    variants: Variants
    attributions: Tensor
    """[prompts, F], on prompts and samples that nothing else uses."""
    order: list[int]
    """All features that moved, the largest mean attribution first."""
    found: classify.Firing

    @property
    def mean(self) -> Tensor:
        """Attribution of every feature, [F]."""
        return self.attributions.double().mean(0)


def prepare(config: AuditConfig, run: Run, device: Any) -> AuditContext:
    """Load the policy, choose prompts, rank its features.

    Results of variants are kept in RUN/variants.jsonl, so that an audit that was killed goes on.
    """
    samples = config.evaluation.samples
    twice = EvaluationConfig(**{**vars(config.evaluation), "samples": 2 * samples})
    evaluating = EvaluateConfig(policy=config.policy, evaluation=twice, launch=config.launch, seed=config.seed)
    bench = build_evaluation(evaluating, device)
    record_inputs(evaluating, run)
    coefficients = touched(bench.policy.model)
    say(f"ranking {len(coefficients):,} features by the reward's gradient at {config.alphas} points")
    attributions = ranked(config, bench, coefficients, samples)
    variants = Variants(
        bench.policy, bench.reward, bench.prompts[samples:], bench.rows, bench.sampling(GRADING), coefficients,
        run.path / "variants.jsonl",
    )  # fmt: skip
    order = attributions.double().mean(0).argsort(descending=True, stable=True).tolist()
    found = classify.firing(bench.policy, coefficients, bench.rows)
    return AuditContext(config, bench, coefficients, variants, attributions, order, found)


def audit(config: AuditConfig, run: Run, device: Any) -> Audit:
    """Audit a policy."""
    context = prepare(config, run, device)
    trained, coefficients = context.bench.trained, context.coefficients
    gain, gain_numbers = gained(context)
    say(f"reverting {min(config.top, len(context.order))} features one by one, {config.pairs} pairs")
    reverts, pairs, shares = reverted(context)
    say("keeping only the first features, and controls")
    curves, carriers = kept(context, gain)
    return Audit(
        version=AUDIT_VERSION,
        policy=str(Path(config.policy)),
        adapter=trained.adapter.kind,
        splice=trained.adapter.splice.value,
        seed=config.seed,
        prompts=config.evaluation.samples,
        features={
            "total": sum(coefficients.sizes),
            "touched": len(coefficients),
            "moved": int(moved(coefficients.delta).sum()),
        },
        gain=gain_numbers,
        completeness=completeness(context, gain),
        reverts=reverts,
        pairs=pairs,
        shares=shares,
        curves=curves,
        needed=carriers,
        side_effects=side_effects(context, gain, carriers["90"]),
        peers=[peer_numbers(context, peer) for peer in config.peers],
        attributions=by_site(context),
    )


def headline(found: Audit) -> Numbers:
    """Pick the numbers of summary.json."""
    gain = found.gain
    numbers: Numbers = {
        key: gain[key] for key in ("gain", "gain_se", "kl", "kl_se", "loss_increase", "loss_increase_se")
    }
    numbers |= {
        "features": found.features["total"],
        **{key: found.features[key] for key in ("touched", "moved")},
    }
    numbers |= {f"n{percent}": entry and entry["n"] for percent, entry in found.needed.items()}
    ninety = found.needed["90"] or {}
    numbers |= {
        f"n90_{key}": ninety.get(key) for key in ("low", "high", "random", "random_se", "matched", "matched_se")
    }
    for group, name in (("by_role", "rewarded"), ("by_place", "on"), ("by_place", "before")):
        if group in found.shares:
            entry = found.shares[group].get(name, {"share": 0.0, "share_se": 0.0})
            numbers |= {f"share_{name}": entry["share"], f"share_{name}_se": entry["share_se"]}
    numbers["agreement"] = [peer["delta"] for peer in found.peers]
    full = found.side_effects["full"]
    numbers |= {key: full[key] for key in ("kl_per_gain", "loss_per_gain", "ratio", "ratio_by_chance") if key in full}
    return numbers | {"policy": found.policy, "adapter": found.adapter, "completeness": found.completeness}


def ranked(config: AuditConfig, bench: EvaluationSetup, coefficients: Coefficients, samples: int) -> Tensor:
    """Attributions of all features on the first prompts, mean over alphas: [prompts, F]."""
    prefixes = config.prefix_rewards
    if prefixes is None:
        prefixes = not any(kind_of(part).slow for part in bench.trained.reward.parts.values())
    total = torch.zeros(samples, len(coefficients))
    how = bench.sampling(RANKING)
    for part in attribute(
        bench.policy, bench.reward, bench.prompts[:samples], coefficients, how, config.alphas, prefixes
    ):
        total += part / config.alphas
    return total


def gained(context: AuditContext) -> tuple[Gain, Numbers]:
    """The policy against its reference on the prompts that grade."""
    one = torch.ones(len(context.coefficients))
    before, after = context.variants.measured(0 * one), context.variants.measured(one)
    seed = context.bench.sampling(REFERENCE).seed
    again = [context.variants.redrawn(0 * one, derived_seed(seed, i)) for i in range(REFERENCE_DRAWS)]
    expected = [sum(draws) / len(draws) for draws in zip(before.rewards, *again, strict=True)]
    gain = Gain(before.rewards, after.rewards, expected)
    numbers: Numbers = {}
    columns = {"reward_reference": expected, "reward": after.rewards, "kl": after.kl or [], "gain": gain.full}
    for name, values in columns.items():
        numbers[name], numbers[f"{name}_se"] = mean_and_error(values)
    words = words_of(context)
    numbers["loss_reference"], numbers["loss"] = (sum(m.losses or []) / sum(words) for m in (before, after))
    numbers["loss_increase"], numbers["loss_increase_se"] = loss_change(context, after.losses, before.losses)
    return gain, numbers


def words_of(context: AuditContext) -> list[float]:
    """Tokens of every held-out row whose loss counts."""
    rows = context.bench.rows
    return ((rows[:, :-1] != rows[0, 0]) | (rows[:, 1:] != rows[0, 0])).sum(1).double().tolist()


def loss_change(
    context: AuditContext, after: Sequence[float] | None, before: Sequence[float] | None
) -> tuple[float, float]:
    """Change of the held-out loss a token, and its standard error over rows."""
    return ratio([x - y for x, y in zip(after or [], before or [], strict=True)], words_of(context))


def completeness(context: AuditContext, gain: Gain) -> Numbers:
    """The sum of all attributions against the gain; they come from different samples."""
    whole, whole_se = mean_and_error(context.attributions.double().sum(1).tolist())
    mean, error = mean_and_error(gain.full)
    numbers = {"attributed": whole, "attributed_se": whole_se}
    return numbers | {"difference": whole - mean, "difference_se": math.hypot(whole_se, error)}


# --- reverting -------------------------------------------------------------------------------------------------------


def reverted(context: AuditContext) -> tuple[list[Numbers], list[Numbers], Numbers]:
    """`reverts`, `pairs` and `shares`: what the first features and those asked for do, and what all of them are."""
    config, order, coefficients = context.config, context.order, context.coefficients
    sizes = dict(zip(coefficients.sites, coefficients.sizes, strict=True))
    wanted = select(config.features, "features", context.bench.trained.adapter.saes, sizes)
    asked = {f"{site}:{feature}" for site, features in wanted.items() for feature in features}
    names = {coefficients.name(i): i for i in order} if asked else {}
    for name in sorted(asked - names.keys()):
        say(f"{name} is untouched: reverting it changes nothing")
    chosen = list(dict.fromkeys([*order[: config.top], *(names[name] for name in sorted(asked & names.keys()))]))
    described, shares = classified(context, chosen)
    one = torch.ones(len(coefficients))
    policy = context.variants.measured(one)
    rows = []
    for i in chosen:
        without = context.variants.measured(one - unit(i, one))
        row: Numbers = {"site": coefficients.sites[int(coefficients.site[i])]}
        row |= {"feature": int(coefficients.feature[i]), "delta": float(coefficients.delta[i])}
        values = context.attributions[:, i].double().tolist()
        row["attribution"], row["attribution_se"] = mean_and_error(values)
        row["share"] = row["attribution"] / (float(context.mean.sum()) or 1.0)
        row["effect"] = float(context.found.effect[i])
        row["reward"], row["reward_se"] = difference(without.rewards, policy.rewards)
        row["kl"], row["kl_se"] = difference(without.kl or [], policy.kl or [])
        row["loss"], row["loss_se"] = loss_change(context, without.losses, policy.losses)
        rows.append(row | described[i])
    pairs = [pair_numbers(context, i, j) for i, j in first_pairs(order[: config.top], config.pairs)]
    return rows, pairs, shares


def pair_numbers(context: AuditContext, i: int, j: int) -> Numbers:
    """What reverting two features, and keeping nothing but two, does beyond doing so with each."""
    one, coefficients = torch.ones(len(context.coefficients)), context.coefficients
    numbers: Numbers = {"first": coefficients.name(i), "second": coefficients.name(j)}
    first, second = unit(i, one), unit(j, one)
    for prefix, start, sign in (("", one, -1), ("kept_", 0 * one, 1)):
        whole = not prefix  # single reverts have been measured in full
        without = context.variants.measured(start).rewards
        one_alone, other_alone = (
            context.variants.measured(start + sign * at).rewards if whole else context.variants.rewards(start + at)
            for at in (first, second)
        )
        both = context.variants.rewards(start + sign * (first + second))
        numbers[f"{prefix}joint"], numbers[f"{prefix}joint_se"] = difference(both, without)
        extra, extra_se = mean_and_error(interaction(without, one_alone, other_alone, both))
        numbers |= {f"{prefix}interaction": extra, f"{prefix}interaction_se": extra_se}
    return numbers


def unit(i: int, like: Tensor) -> Tensor:
    """1 at a place, 0 elsewhere."""
    found = like.new_zeros(len(like))
    found[i] = 1.0
    return found


def first_pairs(order: Sequence[int], count: int) -> list[tuple[int, int]]:
    """So many pairs among the first of an order: those whose later member comes first, first."""
    pairs = sorted(combinations(range(len(order)), 2), key=lambda pair: (pair[1], pair[0]))
    return [(order[i], order[j]) for i, j in pairs[:count]]


# --- what features are -----------------------------------------------------------------------------------------------


def classified(context: AuditContext, chosen: Sequence[int]) -> tuple[dict[int, Numbers], Numbers]:
    """What the chosen features are, and the share of the gain on features of every kind."""
    bench, found, config = context.bench, context.found, context.config
    tokenizer, trained = bench.policy.tokenizer, bench.trained
    rewarded = classify.rewarded_tokens(trained.reward, tokenizer)
    kind = classify.token_kinds(found, tokenizer, rewarded)
    labels: dict[str, Sequence[Any]] = {"kind": kind}
    shares: Numbers = {"by_kind": classify.sums_by(kind, context.attributions, found.effect)}
    if rewarded:
        place = classify.places(found, rewarded)
        shares["by_place"] = classify.sums_by(place, context.attributions, found.effect)
        direction = labels["writes"] = classify.direction_names(
            classify.writes(bench.policy, context.coefficients, rewarded)
        )
        shares["by_direction"] = classify.sums_by(direction, context.attributions, found.effect)
    if trained.model.kind is ModelKind.planted:
        grades = classify.attributes_of(found, tokenizer)
        labels["attribute"] = [name if grade >= config.f1 else "" for name, grade in grades]
        labels["f1"] = [grade for _, grade in grades]
        role = classify.roles(grades, rewarded_attributes(trained.reward), config.f1)
        shares["by_role"] = classify.sums_by(role, context.attributions, found.effect)
        names = [name or "unassigned" for name in labels["attribute"]]
        shares["by_attribute"] = classify.sums_by(names, context.attributions, found.effect)
    fired = classify.fires_on(found, tokenizer, chosen)
    return {i: {"fires_on": fired[i], **{key: values[i] for key, values in labels.items()}} for i in chosen}, shares


def rewarded_attributes(reward: RewardConfig) -> set[str]:
    """Attributes of the planted language that a reward counts."""
    return {part.attribute for part in reward.parts.values() if part.attribute}


# --- keeping only ----------------------------------------------------------------------------------------------------


def kept(context: AuditContext, gain: Gain) -> tuple[dict[str, list[Numbers]], dict[str, Numbers | None]]:
    """`curves` and `needed`: what is left of the gain with the first features alone, without them, and of controls."""
    config, variants, order = context.config, context.variants, context.order
    total, effect = len(order), context.found.effect.tolist()
    points, coarse = grid(total), coarse_grid(total)
    keep = curve(variants, gain, order, points)
    found = {f"{share:.0%}".rstrip("%"): needed(keep, share) for share in SHARES}
    behind = {int(entry["n"]) for entry in found.values() if entry and entry["n"] < total}
    asked = sorted({*coarse, *behind})
    orders = [random_order(total, derived_seed(config.seed, RANKING, number)) for number in range(config.draws)]

    def like(n: int, number: int) -> list[int] | None:
        return matched(effect, order[:n], derived_seed(config.seed, GRADING, n, number))

    def left(kept: Sequence[int], n: int) -> float:
        own = sum(effect[i] for i in order[:n])
        return sum(effect[i] for i in kept) / own if own else 1.0

    curves = {
        "keep": keep,
        "remove": curve(variants, gain, order, sorted({*points[:-1:2], *behind, total}), keep=False),
        "keep_by_effect": curve(
            variants, gain, sorted(range(total), key=lambda i: -effect[i]), [*points[:-1:2], total]
        ),
        "keep_random": control(variants, gain, lambda n, number: orders[number][:n], asked, config.draws),
        "keep_matched": control(variants, gain, like, asked, config.draws),
    }
    for point in curves["keep_matched"]:
        sets = [kept for number in range(config.draws) if (kept := like(point["n"], number)) is not None]
        point["effect_ratio"] = sum(left(kept, point["n"]) for kept in sets) / len(sets)
    for entry in found.values():
        for name, curve_name in (("without", "remove"), ("random", "keep_random"), ("matched", "keep_matched")):
            point = next((p for p in curves[curve_name] if entry and p["n"] == entry["n"]), None)
            if entry and point:
                entry |= {name: point["share"], f"{name}_se": point["share_se"]}
                entry |= {"matched_effect": point["effect_ratio"]} if name == "matched" else {}
    return curves, found


# --- side effects ----------------------------------------------------------------------------------------------------


def side_effects(context: AuditContext, gain: Gain, needed_90: Numbers | None) -> Numbers:
    """What else changed, for the policy and for the fewest features that carry 90 % of its gain."""
    total = len(context.coefficients)
    nothing = torch.zeros(total)
    before, again = written(context, nothing), written(context, nothing, NULL)
    chosen = {"full": torch.ones(total)}
    if needed_90:
        chosen["needed_90"] = only(context.order, needed_90["n"], total)
    found = {name: spent(context, gain, scale, before, written(context, scale)) for name, scale in chosen.items()}
    if context.bench.trained.model.kind is ModelKind.planted:  # the ratio that sampling alone would show
        for entry in found.values():
            entry["ratio_by_chance"] = other_change(context, before, again) / (abs(entry["rewarded_change"]) or 1.0)
    return found


def written(context: AuditContext, scale: Tensor, purpose: int = GRADING) -> Samples:
    """What a variant writes on the prompts that grade, with the random numbers of all variants or others."""
    bench, variants, how = context.bench, context.variants, context.bench.sampling(purpose)
    policy, ids = bench.policy, variants.measured(scale).completion_ids or []
    if purpose != GRADING:
        with scaled(policy.model, context.coefficients, scale):
            settings = (how.max_new_tokens, how.temperature, how.batch_size, how.seed)
            ids = generate(policy.model, variants.prompts, policy.tokenizer, policy.eos_token_ids, *settings)
    return Samples(list(variants.prompts), ids, policy.tokenizer.batch_decode(ids, skip_special_tokens=True), {})


def spent(context: AuditContext, gain: Gain, scale: Tensor, before: Samples, after: Samples) -> Numbers:
    """KL, held-out loss, attributes, length and variety that a variant's gain was bought with."""
    variants = context.variants
    measured, base = variants.measured(scale), variants.measured(torch.zeros_like(scale))
    numbers: Numbers = {}
    gains = gain.over(measured.rewards)
    numbers["gain"], numbers["gain_se"] = mean_and_error(gains)
    numbers["kl"], numbers["kl_se"] = mean_and_error(measured.kl or [])
    numbers["loss_increase"], numbers["loss_increase_se"] = loss_change(context, measured.losses, base.losses)
    per_gain, per_gain_se = ratio(measured.kl or [], gains)
    numbers |= {"kl_per_gain": per_gain, "kl_per_gain_se": per_gain_se}
    numbers |= quotient(numbers, "loss_increase", "gain", "loss_per_gain")
    numbers["length"], numbers["length_se"] = difference(after.lengths, before.lengths)
    ends = context.bench.policy.eos_token_ids
    numbers["distinct_2"] = describe(after, ends)["distinct_2"] - describe(before, ends)["distinct_2"]
    if context.bench.trained.model.kind is ModelKind.planted:
        old, new = attribute_shares(before), attribute_shares(after)
        numbers["attributes"] = {name: new[name]["share"] - old[name]["share"] for name in new}
        rewarded = rewarded_attributes(context.bench.trained.reward)
        numbers["rewarded_change"] = sum(numbers["attributes"][name] for name in rewarded)
        numbers["ratio"] = other_change(context, before, after) / (abs(numbers["rewarded_change"]) or 1.0)
    return numbers


def quotient(numbers: Numbers, top: str, bottom: str, name: str) -> Numbers:
    """One number divided by another that was measured apart from it, with its standard error."""
    a, b = numbers[top], numbers[bottom]
    if b == 0:
        return {name: 0.0, f"{name}_se": 0.0}
    return {name: a / b, f"{name}_se": math.hypot(numbers[f"{top}_se"] / b, a * numbers[f"{bottom}_se"] / b**2)}


def other_change(context: AuditContext, before: Samples, after: Samples) -> float:
    """Summed absolute change of the shares of words that carry attributes which are not rewarded."""
    rewarded = rewarded_attributes(context.bench.trained.reward)
    old, new = attribute_shares(before), attribute_shares(after)
    names = [name for name in old if name not in rewarded and not name.startswith("after_")]
    return sum(abs(new[name]["share"] - old[name]["share"]) for name in names)


# --- other runs ------------------------------------------------------------------------------------------------------


def peer_numbers(context: AuditContext, peer: str) -> Numbers:
    """How far a peer's coefficients, and its attributions where it has been audited, agree with the policy's."""
    own, other = (deltas_of(path, run_config(path)) for path in (context.config.policy, peer))
    sites: Numbers = {}
    for site, delta in own.items():
        k = min(OVERLAP, len(delta) // 10 or 1)
        sites[site] = {"delta": spearman(delta, other[site]), "top": k}
        sites[site] |= {"top_overlap": top_overlap(delta, other[site], k), "top_expected": k / len(delta)}
    numbers: Numbers = {"policy": str(Path(peer)), "seed": run_config(peer).seed, "sites": sites}
    numbers["delta"] = spearman(*(torch.cat([values[site] for site in own]) for values in (own, other)))
    file = Path(peer) / AUDIT
    audited = read_audit(file) if file.is_file() else Audit()
    if audited.version == AUDIT_VERSION:
        theirs = torch.cat([torch.tensor(audited.attributions[site]) for site in own])
        ours = torch.cat([torch.tensor(row) for row in by_site(context).values()])
        numbers |= {"attribution": spearman(ours, theirs), "attribution_top": top_overlap(ours, theirs, OVERLAP)}
    return numbers


def by_site(context: AuditContext) -> dict[str, list[float]]:
    """Attribution of every feature by site, to four digits; untouched features have none, which is 0."""
    coefficients, found = context.coefficients, {}
    for site, size in zip(coefficients.sites, coefficients.sizes, strict=True):
        row, here = [0.0] * size, coefficients.at(site)
        for feature, value in zip(coefficients.feature[here].tolist(), context.mean[here].tolist(), strict=True):
            row[feature] = float(f"{value:.4g}")
        found[site] = row
    return found
