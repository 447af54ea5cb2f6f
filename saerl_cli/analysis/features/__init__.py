"""What features are, and what RLHF did to them.

    source = Source(loaded.model, site, sae)                 where features are read
    text = heldout_text(data, model, loaded, 50_000)
    census = take_census(source, text)                       every feature: density, mean, peak
    describe_features(source, loaded, text, census, [7, 8])  a dictionary a feature

`describe_run` does it for the features that a run of `saerl rlhf` moved.
"""

from saerl_cli.analysis.features.attributes import aurocs, f1_scores, input_side, output_side
from saerl_cli.analysis.features.describe import Depth, describe_features, heldout_text
from saerl_cli.analysis.features.directions import extreme_tokens, final_norm, logit_effect, nearest, to_residual
from saerl_cli.analysis.features.labels import put_labels, read_labels, token_label
from saerl_cli.analysis.features.moved import coefficient_paths, describe_run, features_file, strongest
from saerl_cli.analysis.features.stream import Census, Source, Text, collect, take_census

__all__ = [
    "Census",
    "Depth",
    "Source",
    "Text",
    "aurocs",
    "coefficient_paths",
    "collect",
    "describe_features",
    "describe_run",
    "extreme_tokens",
    "f1_scores",
    "features_file",
    "final_norm",
    "heldout_text",
    "input_side",
    "logit_effect",
    "nearest",
    "output_side",
    "put_labels",
    "read_labels",
    "strongest",
    "take_census",
    "to_residual",
    "token_label",
]
