"""`saerl features`: what features are, and what RLHF did to those of a policy.

features.json     {features: [...], sites: {SITE: {...}}, deltas: {SITE: [...]}}
labels.json       {SITE: {FEATURE: label}}: edit it and hand it back as labels=FILE or adapter.features.labels=FILE
densities.safetensors    share of tokens on which each feature fires, [d_sae] by site
neuronpedia/      files in Neuronpedia's batch format, where asked for
features.html, histograms.csv    as `saerl_cli.report.features` draws them
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.analysis.features.plan import plan_of
from saerl_cli.config.features import ExplainConfig, FeaturesConfig
from saerl_cli.config.groups import DataKind
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import context_size, describe, known_sha256
from saerl_cli.run.directory import Run
from saerl_cli.run.files import write_json, write_safetensors
from saerl_cli.run.progress import say
from saerl_cli.sae.evaluate import check_place

if TYPE_CHECKING:
    from saerl_cli.analysis.features.find import FeatureResults


def check(config: FeaturesConfig) -> None:
    """Refuse what cannot work, before anything is written and without loading weights.

    Raises:
        ValueError: one line saying what is wrong.
    """
    plan = plan_of(config)
    if config.labels is not None:
        from saerl_cli.analysis.features.labels import read_labels

        read_labels(config.labels, plan.sizes)
    check_explainer(config.explain)
    description = describe(plan.model)
    row_length(plan.data, context_size(description))
    sha256 = known_sha256(plan.model)
    for folder in plan.saes.values():
        check_place(folder, description, sha256)
    if plan.data.kind is not DataKind.hub:
        documents(plan.data, plan.model, "heldout")


def check_explainer(config: ExplainConfig) -> None:
    """Refuse a model folder that is not there.

    Raises:
        ValueError: one line saying what is wrong.
    """
    if config.on and config.endpoint is None and not Path(str(config.model)).is_dir():
        raise ValueError(
            f"explain.model={config.model} is no folder of a local model; for a service write explain.endpoint=ADDRESS"
        )


def work(config: FeaturesConfig, run: Run) -> None:
    """Describe the features, print the table, write the files."""
    import torch

    from saerl_cli.analysis.features.find import find
    from saerl_cli.report.features import notes, print_table, write_page

    device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    found = find(config, device)
    run.update(inputs=found.inputs)
    write_files(found, config, run.path)
    write_page(found, config, run.path)
    run.summary(summary(found, config))
    print_table(found.features)
    for line in notes(found):
        say(line)


def write_files(found: "FeatureResults", config: FeaturesConfig, folder: Path) -> None:
    """Write everything but summary.json and the page."""
    deltas = {site: [round(float(d), 6) for d in delta] for site, delta in found.context.deltas.items()}
    densities = {site: census.density.float().cpu() for site, census in found.context.censuses.items()}
    kept = [{key: value for key, value in one.items() if key != "neuronpedia"} for one in found.features]
    write_json(folder / "features.json", {"features": kept, "sites": found.sites, "deltas": deltas})
    write_json(folder / "labels.json", found.labels)
    write_safetensors(folder / "densities.safetensors", densities)
    if config.neuronpedia:
        from saerl_cli.analysis.features.neuronpedia import write_batches

        data, rows = found.context.plan.data, found.context.text.rows
        facts = {
            "model_id": Path(found.inputs["model"]["name"]).name,
            "sae_set": "saerl",
            "dataset": data.name or data.path or data.kind.value,
            "prompts": len(rows),
            "tokens_in_prompt": rows.shape[1],
        }
        write_batches(folder / "neuronpedia", found.features, found.sites, facts)


def summary(found: "FeatureResults", config: FeaturesConfig) -> dict[str, Any]:
    """The numbers of summary.json."""
    keys = ("site", "feature", "label", "label_from", "delta", "effect", "density", "attribute", "f1", "auroc")
    scored = [one["explanation"]["score"] for one in found.features if "score" in one.get("explanation", {})]
    numbers: dict[str, Any] = {
        "features": len(found.features),
        "silent": sum(one["peak"] <= 0 for one in found.features),
        "tokens": next(iter(found.sites.values()))["tokens"],
        "policy": config.policy,
        "saes": config.saes,
        "sites": found.sites,
        "top_features": [{key: one[key] for key in keys if key in one} for one in found.features[:100]],
    }
    return numbers | ({"explanation_score": sum(scored) / len(scored)} if scored else {})
