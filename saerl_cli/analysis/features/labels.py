"""Labels of features: by the tokens they fire on, by hand, from a file {SITE: {FEATURE: label}}."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saerl_cli.rl.adapters.selection import labels_of

SHARE, MOST = 0.1, 3
"""A token names a feature where it has so much of its summed activation; so many do at most."""

Labels = dict[str, dict[int, str]]
"""Site -> feature -> label."""


def token_label(described: Mapping[str, Any]) -> str:
    """What a feature fires on and promotes: `this · the → damn · bloody`; `many: …` where no token stands out."""
    tokens = described["fires_on"]
    if not tokens:
        return f"never fires on {described['tokens']:,} tokens"
    names = [token for token, share in zip(tokens, described["mass"], strict=True) if share >= SHARE][:MOST]
    fires = " · ".join(names) if names else f"many: {' · '.join(tokens[:MOST])}"
    return f"{fires} → {' · '.join(described['promotes'][:MOST])}"


def read_labels(path: Path | str, sizes: Mapping[str, int]) -> Labels:
    """A label file, whose sites and features exist.

    Raises:
        ValueError: no such file, another form, an unknown site or feature.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"labels: there is no file {path}")
    labels = labels_of(path)
    for site, own in labels.items():
        if site in sizes and own and not 0 <= min(own) <= max(own) < sizes[site]:
            worst = max(own) if max(own) >= sizes[site] else min(own)
            raise ValueError(f"labels: {path} names {site}:{worst}, but its features are 0 to {sizes[site] - 1}")
    if labels and not set(labels) & set(sizes):
        raise ValueError(f"labels: {path} names none of the sites {', '.join(sizes)}, only {', '.join(labels)}")
    return labels


def put_labels(described: Sequence[dict[str, Any]], imported: Mapping[str, Mapping[int, str]]) -> None:
    """Give every feature its `label` and `label_from`: `file` before `model` before `tokens`."""
    for one in described:
        by_hand = imported.get(one["site"], {}).get(one["feature"])
        explained = (one.get("explanation") or {}).get("text")
        if by_hand is not None:
            one |= {"label": by_hand, "label_from": "file"}
        elif explained:
            one |= {"label": explained, "label_from": "model"}
        else:
            one |= {"label": token_label(one), "label_from": "tokens"}


def as_file(described: Sequence[Mapping[str, Any]], imported: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    """labels.json: the labels of these features, and those imported for others, by site and number."""
    found: Labels = {site: dict(own) for site, own in imported.items()}
    for one in described:
        found.setdefault(one["site"], {})[one["feature"]] = one["label"]
    return {site: {str(i): own[i] for i in sorted(own)} for site, own in found.items()}
