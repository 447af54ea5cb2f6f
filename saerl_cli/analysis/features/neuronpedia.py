"""Features as files that Neuronpedia imports: its batch format, as SAEDashboard writes it.

neuronpedia/SITE/batch-N.json   {model_id, layer, sae_set, sae_id_suffix, features: [...]}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saerl_cli.run.files import write_json

AT_ONCE = 128
"""Features a file."""
TABLE = 10
"""Rows of a table of logits."""
FROM_TABLES = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "vector",
)


def write_batches(
    folder: Path, features: Sequence[Mapping[str, Any]], sites: Mapping[str, Any], facts: Mapping[str, Any]
) -> list[Path]:
    """Write the files of every site; features need what `Depth.dashboards` keeps.

    Args:
        folder: `neuronpedia` of the run.
        features: described.
        sites: site -> {layer, ...}.
        facts: `model_id`, `sae_set`, `dataset`, `prompts` and `tokens_in_prompt`.
    """
    written = []
    for site, about in sites.items():
        own = [one for one in features if one["site"] == site]
        for number, first in enumerate(range(0, len(own), AT_ONCE)):
            path = folder / site / f"batch-{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, batch(own[first : first + AT_ONCE], site, about, facts))
            written.append(path)
    return written


def batch(
    features: Sequence[Mapping[str, Any]], site: str, about: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """One file."""
    layer = about["layer"]
    return {
        "model_id": facts["model_id"],
        "layer": site if layer is None else layer,
        "sae_set": facts["sae_set"],
        "sae_id_suffix": None,
        "features": [feature(one, facts) for one in features],
    }


def feature(one: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One feature in its keys."""
    edges, heights = one["histogram"]["edges"], one["histogram"]["tokens"]
    return {
        "feature_index": one["feature"],
        **{key: one["neuronpedia"][key] for key in FROM_TABLES},
        "neg_str": one["suppresses"][:TABLE],
        "neg_values": one["suppresses_by"][:TABLE],
        "pos_str": one["promotes"][:TABLE],
        "pos_values": one["promotes_by"][:TABLE],
        "frac_nonzero": one["density"],
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)],
        "freq_hist_data_bar_heights": heights,
        "n_prompts_total": facts["prompts"],
        "n_tokens_in_prompt": facts["tokens_in_prompt"],
        "dataset": facts["dataset"],
        "decoder_weights_dist": [],
        "activations": activations(one),
    }


def activations(one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Contexts in its keys: the strongest as the bin (-1, peak, -1), then those of each quantile with its share."""
    found = []
    for context in one["contexts"]:
        values = [value for _, value in context]
        found.append(example(context, values.index(max(values)), -1, one["peak"], -1))
    share = 1 / max(1, len(one["quantiles"]))
    for part in one["quantiles"]:
        placed = zip(part["contexts"], part["at"], strict=True)
        found += [example(context, at, part["from"], part["to"], share) for context, at in placed]
    return found


def example(context: Sequence[tuple[str, float]], at: int, low: float, high: float, share: float) -> dict[str, Any]:
    """One context, shown for its token `at`."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "qualifying_token_index": at,
        "tokens": [token for token, _ in context],
        "values": [value for _, value in context],
    }
