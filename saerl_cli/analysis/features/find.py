"""Features that are asked for, or that a policy moved, described and compared before and after RLHF."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from saerl_cli.adapter.files import read_deltas
from saerl_cli.analysis.features.describe import Depth, describe_features, heldout_text
from saerl_cli.analysis.features.explain import explain_all
from saerl_cli.analysis.features.labels import as_file, put_labels, read_labels
from saerl_cli.analysis.features.moved import (
    coefficient_paths,
    completions_text,
    put_deltas,
    put_heldout,
    put_samples,
    strongest,
)
from saerl_cli.analysis.features.plan import Plan, plan_of
from saerl_cli.analysis.features.stream import Census, Source, Text, take_census
from saerl_cli.config.features import FeaturesConfig
from saerl_cli.config.groups import ModelKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.prompts import choose_prompts
from saerl_cli.models import Loaded, load_model, resolve_sites
from saerl_cli.rl.evaluation.measure import cycled, generate
from saerl_cli.rl.policy import adapter_policy
from saerl_cli.rl.runs import policy_folder
from saerl_cli.run.progress import say
from saerl_cli.sae.files import check_sae, load_sae, sae_sha256
from saerl_cli.sae.metrics import density


@dataclass
class FeatureContext:
    """What features are read with."""

    config: FeaturesConfig
    plan: Plan
    loaded: Loaded
    text: Text
    sources: dict[str, Source]
    """By site."""
    censuses: dict[str, Census]
    """By site."""
    deltas: dict[str, Tensor]
    """Site -> delta of every feature, [d_sae]; empty without a policy."""


@dataclass
class FeatureResults:
    """All that is known of some features, as plain data but for the densities."""

    features: list[dict[str, Any]]
    """What `describe_features` says of each, in the order of their effect or as asked for."""
    sites: dict[str, dict[str, Any]]
    """Site -> the SAE and how often its features fire."""
    labels: dict[str, Any]
    """For labels.json."""
    inputs: dict[str, Any]
    """The model, the SAEs and the policy by hash."""
    context: FeatureContext


def find(config: FeaturesConfig, device: Any) -> FeatureResults:
    """Load the model and its SAEs, read the text, describe the features.

    Raises:
        ValueError: what `check` could not see without loading the model.
    """
    context = build_context(config, device)
    features = described(context)
    explain_all(features, config.explain, device)
    imported = read_labels(config.labels, context.plan.sizes) if config.labels is not None else {}
    put_labels(features, imported)
    for one in features:
        one["contexts"] = one["contexts"][: config.contexts]
        for key in ("drawn", "silent"):  # what the explainer was judged by
            one.pop(key, None)
    if context.plan.trained is not None:
        before_and_after(context, context.plan.trained, features)
    loaded, saes = context.loaded, context.plan.saes
    inputs = {
        "model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256},
        "sae": {name: {"path": str(path), "sha256": sae_sha256(path)} for name, path in saes.items()},
        "policy": config.policy,
    }
    facts = {name: site_facts(source, context.censuses[name]) for name, source in context.sources.items()}
    return FeatureResults(features, facts, as_file(features, imported), inputs, context)


def build_context(config: FeaturesConfig, device: Any) -> FeatureContext:
    """Load the model and the SAEs, and count what every feature does."""
    plan = plan_of(config)
    loaded = load_model(plan.model, device)
    sources = {}
    for name, folder in plan.saes.items():
        check_sae(folder, model_sha256=loaded.sha256)
        site = replace(resolve_sites([name], loaded.model)[0], name=name)
        sources[name] = Source(loaded.model, site, load_sae(folder).to(device))
    text = heldout_text(plan.data, plan.model, loaded, config.tokens)
    say(f"reading {text.tokens:,} held-out tokens for {sum(plan.sizes.values()):,} features")
    censuses = {name: take_census(source, text) for name, source in sources.items()}
    deltas = read_deltas(policy_folder(str(config.policy), plan.trained)) if plan.trained else {}
    return FeatureContext(
        config, plan, loaded, text, sources, censuses, {n: d for n, d in deltas.items() if n in sources}
    )


def described(context: FeatureContext) -> list[dict[str, Any]]:
    """The dictionaries of the features chosen, of a policy with their coefficients."""
    config, explain = context.config, context.config.explain
    depth = Depth(
        contexts=max(config.contexts, explain.shown if explain.on else 0),
        quantiles=config.quantiles,
        silent=explain.judged if explain.on else 0,
        seed=config.seed,
        attributes=context.plan.model.kind is ModelKind.planted,
        dashboards=config.neuronpedia,
    )
    chosen = choose(context)
    say(f"describing {sum(map(len, chosen.values())):,} of them")
    features = []
    for name, ids in chosen.items():
        source, census = context.sources[name], context.censuses[name]
        features += describe_features(source, context.loaded, context.text, census, ids, depth)
    if context.plan.trained is not None:
        paths = coefficient_paths(str(config.policy), context.plan.trained, context.deltas)
        put_deltas(features, context.deltas, paths)
        if config.ids is None:
            features.sort(key=lambda one: -one["effect"])
    return features


def choose(context: FeatureContext) -> dict[str, list[int]]:
    """Choose features by site: those asked for; of a policy those that moved; those that write most first."""
    config, ids = context.config, context.plan.ids
    if ids is not None:
        return {site: sorted(ids[site]) for site in context.sources if site in ids}
    if context.plan.trained is not None:
        return strongest(context.sources, context.censuses, context.deltas, config.count)
    chosen = {}
    for name, source in context.sources.items():
        effect = context.censuses[name].mean * source.sae.W_dec.norm(dim=-1)
        chosen[name] = effect.topk(min(config.count, len(effect))).indices.tolist()
    return chosen


def before_and_after(context: FeatureContext, trained: RlhfConfig, features: list[dict[str, Any]]) -> None:
    """What the policy makes of the features: on the same text, and in completions of its own."""
    config, loaded = context.config, context.loaded
    policy = adapter_policy(loaded, policy_folder(str(config.policy), trained), trained.adapter.splice)
    put_heldout(features, policy, context.sources, context.text)
    if config.samples == 0:
        return
    say(f"sampling {config.samples} completions from the policy and from its reference")
    _, unseen = choose_prompts(trained, policy.tokenizer, policy.context_size)
    prompts = cycled(unseen, config.samples)
    how = (policy.tokenizer, policy.eos_token_ids, trained.algo.max_new_tokens, trained.algo.temperature, 64)
    with policy.reference() as reference:
        before = generate(reference, prompts, *how, config.seed)
    after = generate(policy.model, prompts, *how, config.seed)
    texts = completions_text(prompts, before, policy.tokenizer), completions_text(prompts, after, policy.tokenizer)
    put_samples(features, policy, context.sources, *texts, max(1, config.contexts // 2))


def site_facts(source: Source, census: Census) -> dict[str, Any]:
    """An SAE and how often its features fire."""
    rate = census.density
    return {
        "trivial": source.site.trivial,
        "layer": source.site.layer,
        "d_sae": source.sae.d_sae,
        "d_in": source.sae.d_in,
        "tokens": census.tokens,
        "l0": float(rate.sum()),
        "dead": float((rate == 0).double().mean()),
        "density": density(rate),
    }
