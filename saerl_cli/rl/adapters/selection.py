"""Which features of the SAEs may be trained, without importing torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saerl_cli.config.adapter import AdapterConfig, FeatureChoice
from saerl_cli.run.files import read_json

Selection = dict[str, set[int]]
"""Site -> features."""


def free_features(adapter: AdapterConfig, sizes: Mapping[str, int]) -> Selection | None:
    """The features that `adapter.features` and `adapter.freeze` leave trainable; None where that is all of them.

    Args:
        adapter: the settings.
        sizes: site -> features of its SAE.

    Raises:
        ValueError: an unknown site, feature, label or attribute, or none that is left.
    """
    if adapter.features.empty() and adapter.freeze.empty():
        return None
    free: Selection = {site: set(range(size)) for site, size in sizes.items()}
    if not adapter.features.empty():
        named = select(adapter.features, "adapter.features", adapter.saes, sizes)
        free = {site: named.get(site, set()) for site in sizes}
    if not adapter.freeze.empty():
        frozen = select(adapter.freeze, "adapter.freeze", adapter.saes, sizes)
        free = {site: features - frozen.get(site, set()) for site, features in free.items()}
    if not any(free.values()):
        raise ValueError("adapter.features and adapter.freeze leave no feature to train")
    return free


def select(choice: FeatureChoice, setting: str, saes: str | None, sizes: Mapping[str, int]) -> Selection:
    """The features that a choice names.

    Raises:
        ValueError: an unknown site, feature, label or attribute.
    """
    found: Selection = {}
    parts = (
        by_number(choice.ids or [], f"{setting}.ids", sizes),
        by_label(choice, setting, sizes) if choice.pattern is not None else {},
        by_attribute(choice, setting, saes, sizes) if choice.attributes else {},
    )
    for part in parts:
        for site, features in part.items():
            found[site] = found.get(site, set()) | features
    return found


def by_number(ids: list[str], setting: str, sizes: Mapping[str, int]) -> Selection:
    """Features given as SITE:FEATURE or SITE:FIRST-LAST.

    Raises:
        ValueError: one that is written otherwise, or that is not there.
    """
    found: Selection = {}
    for text in ids:
        match = re.fullmatch(r"(.+):(\d+)(?:-(\d+))?", text)
        if match is None:
            raise ValueError(f"{setting}: {text!r} is neither SITE:FEATURE nor SITE:FIRST-LAST")
        site, first, last = match[1], int(match[2]), int(match[3] or match[2])
        refuse_unknown(site, last, f"{setting}: {text}", sizes)
        if first > last:
            raise ValueError(f"{setting}: {text}: {first} is larger than {last}; write the smaller number first")
        found[site] = found.get(site, set()) | set(range(first, last + 1))
    return found


def by_label(choice: FeatureChoice, setting: str, sizes: Mapping[str, int]) -> Selection:
    """Features whose label holds the pattern."""
    path = Path(choice.labels or "")
    if not path.is_file():
        raise ValueError(f"{setting}.labels: there is no file {path}")
    try:
        pattern = re.compile(choice.pattern or "", re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{setting}.pattern is no regular expression: {error}") from None
    found: Selection = {}
    for site, labels in labels_of(path).items():
        matching = {feature for feature, label in labels.items() if pattern.search(label)}
        if matching and site in sizes:
            refuse_unknown(site, max(matching), f"{setting}.labels: {path}", sizes)
            found[site] = matching
    if not found:
        raise ValueError(f"{setting}.pattern: no label in {path} matches {choice.pattern!r}")
    return found


def labels_of(path: Path) -> dict[str, dict[int, str]]:
    """A label file: {SITE: {FEATURE: label}}."""
    try:
        return {site: {int(i): str(label) for i, label in labels.items()} for site, labels in read_json(path).items()}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no label file; it must be JSON of the form {{SITE: {{FEATURE: label}}}}") from None


def by_attribute(choice: FeatureChoice, setting: str, saes: str | None, sizes: Mapping[str, int]) -> Selection:
    """The feature that stands best for each attribute at every site, where its F1 suffices.

    Raises:
        ValueError: the SAEs' run graded no attributes, an attribute is unknown, or no feature suffices.
    """
    graded = {site: numbers.get("attributes", {}) for site, numbers in summary_of(saes, setting).items()}
    known = sorted({name for attributes in graded.values() for name in attributes})
    found: Selection = {}
    for name in choice.attributes or []:
        if name not in known:
            raise ValueError(
                f"{setting}.attributes: unknown attribute {name!r}; there are {', '.join(known) or 'none'}"
            )
        best = {site: attributes[name] for site, attributes in graded.items() if name in attributes and site in sizes}
        good = {site: score for site, score in best.items() if score["f1"] >= choice.f1}
        if not good:
            top = max((score["f1"] for score in best.values()), default=0.0)
            raise ValueError(
                f"{setting}.attributes: no feature detects {name} with F1 >= {choice.f1:g}; the best has {top:.2f}"
            )
        for site, score in good.items():
            found.setdefault(site, set()).add(int(score["feature"]))
    return found


def summary_of(saes: str | None, setting: str) -> dict[str, Any]:
    """SAE -> numbers of the run of `saerl train-sae` that the SAEs are from."""
    folder = Path(saes or "")
    for path in (folder / "summary.json", folder.parent / "summary.json"):
        if path.is_file() and isinstance(numbers := read_json(path).get("saes"), dict):
            return numbers
    raise ValueError(
        f"{setting}.attributes needs the run directory of `saerl train-sae` with its summary.json, which {saes} is not"
    )


def refuse_unknown(site: str, feature: int, where: str, sizes: Mapping[str, int]) -> None:
    """`ValueError` for a site without an SAE or a feature beyond its last."""
    if site not in sizes:
        raise ValueError(f"{where}: there is no SAE of {site}; there are {', '.join(sizes)}")
    if feature >= sizes[site]:
        raise ValueError(f"{where}: the SAE of {site} has the features 0 to {sizes[site] - 1}")
