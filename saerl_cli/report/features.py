"""Features as a table, files and one self-contained page.

features.html     a card a feature
histograms.csv    a line a bin of every feature's activations
"""

from collections.abc import Mapping, Sequence
from math import log1p
from pathlib import Path
from typing import Any

from saerl_cli.analysis.features.find import FeatureResults
from saerl_cli.config.features import FeaturesConfig
from saerl_cli.report import figures
from saerl_cli.report.html import render
from saerl_cli.report.text import aligned
from saerl_cli.run.directory import versions
from saerl_cli.run.files import write_text

MOST_CARDS = 400
"""Features on the page; all are in features.json."""
MOST_LETTERS = 44
"""Of a label in the table."""
HISTOGRAM = (220, 44)
"""Width and height of the drawings on a card."""


def write_page(found: FeatureResults, config: FeaturesConfig, folder: Path) -> None:
    """Write features.html and histograms.csv."""
    write_text(folder / "features.html", page(found, config))
    figures.write_csv(folder / "histograms.csv", histogram_rows(found.features))


def print_table(features: Sequence[Mapping[str, Any]]) -> None:
    """Print a line a feature."""
    print(aligned(table(features), words=3), flush=True)


def histogram_rows(features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a bin."""
    return [
        {"site": one["site"], "feature": one["feature"], "from": low, "to": high, "tokens": tokens}
        for one in features
        for low, high, tokens in zip(
            one["histogram"]["edges"], one["histogram"]["edges"][1:], one["histogram"]["tokens"], strict=False
        )
    ]


# --- the terminal ----------------------------------------------------------------------------------------------------


def table(features: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A heading and a line a feature; columns that no feature has are left out."""
    columns = [
        ("site", lambda one: one["site"] + ("*" if one["trivial"] else "")),
        ("feature", lambda one: str(one["feature"])),
        ("label", lambda one: shortened(one["label"])),
        ("c", lambda one: f"{1 + one['delta']:.2f}" if "delta" in one else None),
        ("effect", lambda one: f"{one['effect']:.3f}"),
        ("density", lambda one: f"{one['density']:.2%}"),
        ("attribute", lambda one: one.get("attribute")),
        ("F1", lambda one: number(one.get("f1"))),
        ("AUROC", lambda one: number(one.get("auroc"))),
        ("promotes", lambda one: one["output"]["promotes"]["attribute"] if "output" in one else None),
        ("AUROC", lambda one: number(one["output"]["promotes"]["auroc"]) if "output" in one else None),
        ("detection", lambda one: detection(one)),
    ]
    cells = [(heading, [form(one) for one in features]) for heading, form in columns]
    cells = [(heading, column) for heading, column in cells if any(cell is not None for cell in column)]
    lines = zip(*([cell or "–" for cell in column] for _, column in cells), strict=True)
    return [[heading for heading, _ in cells], *map(list, lines)]


def number(value: float | None) -> str | None:
    """Two decimals."""
    return None if value is None else f"{value:.2f}"


def detection(one: Mapping[str, Any]) -> str | None:
    """How well the explanation predicts, with its standard error."""
    found = one.get("explanation", {})
    return f"{found['score']:.2f} ± {found['score_se']:.2f}" if "score" in found else None


def shortened(label: str) -> str:
    """A label that fits into the table."""
    label = " ".join(label.split())
    return label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + "…"


def notes(found: FeatureResults) -> list[str]:
    """What a reader must know before believing the table."""
    lines = []
    trivial = [site for site, about in found.sites.items() if about["trivial"]]
    if trivial:
        lines.append(f"* {', '.join(trivial)} sees the current token alone (parallel residual): no evidence")
    silent = sum(one["peak"] <= 0 for one in found.features)
    if silent:
        lines.append(f"{silent} of {len(found.features)} features never fire on these tokens; read more with tokens=N")
    explained = [one["explanation"] for one in found.features if "judged" in one.get("explanation", {})]
    unread = sum(one["unread"] for one in explained)
    if unread:
        asked = unread + sum(one["judged"] for one in explained)
        lines.append(
            f"{unread} of {asked} contexts were not judged: {explained[0]['model']} did not answer with zeros and ones;"
            " do not trust its explanations"
        )
    if not found.features:
        lines.append("no coefficient has moved, so there is nothing to describe; name features with ids=[SITE:FEATURE]")
    return lines


# --- the page --------------------------------------------------------------------------------------------------------


def page(found: FeatureResults, config: FeaturesConfig) -> str:
    """features.html; everything that a model or a text wrote is escaped by the template."""
    shown = found.features[:MOST_CARDS]
    tokens = next(iter(found.sites.values()))["tokens"]
    everything = sum(about["d_sae"] for about in found.sites.values())
    lead = f"{len(found.features):,} features of {everything:,}, on {tokens:,} held-out tokens read by"
    lead += f" {found.inputs['model']['name']}."
    return render(
        "features.html",
        title=f"Features that {Path(config.policy).name} moved" if config.policy else "Features",
        lead=lead,
        notes=notes(found),
        left_out=len(found.features) - len(shown),
        cards=[card(one) for one in shown],
        sites=found.sites,
        inputs=found.inputs,
        gap_of=gap_of,
        footer=f"Written by saerl {versions().get('saerl', '')} from features.json of this folder.",
    )


def card(one: Mapping[str, Any]) -> dict[str, Any]:
    """A feature with its drawings."""
    values = [value for context in one["contexts"] for _, value in context]
    samples = one.get("samples", {})
    for name in ("before", "after"):
        values += [value for context in samples.get(f"contexts_{name}", []) for _, value in context]
    paired = one.get("heldout", {}).get("contexts", [])
    values += [value for context in paired for _, *both in context for value in both]
    return {
        **one,
        "most": max(values, default=0.0) or 1.0,
        "bars": bars(one["histogram"]["tokens"]),
        "curve": curve(one.get("coefficient", [])),
        "before_contexts": [[(token, x) for token, x, _ in context] for context in paired],
        "after_contexts": [[(token, y) for token, _, y in context] for context in paired],
    }


def gap_of(context: Sequence[tuple[str, float]]) -> str:
    """What stands between the tokens of a context: nothing where some bring a space of their own."""
    return "" if any(token[:1].isspace() for token, _ in context) else " "


def bars(counts: Sequence[int]) -> str:
    """An SVG path of a histogram, heights logarithmic: log(1 + count)."""
    width, height = HISTOGRAM
    tallest = log1p(max(counts, default=0))
    if tallest == 0:
        return ""
    step = width / len(counts)
    return "".join(
        f"M{i * step:.1f} {height}v{-height * log1p(count) / tallest:.1f}h{step - 0.6:.1f}V{height}z"
        for i, count in enumerate(counts)
        if count
    )


def curve(path: Sequence[Sequence[float]]) -> dict[str, Any]:
    """An SVG polyline of a coefficient over training, the height of c = 1, and the last point."""
    if len(path) < 2:
        return {}
    width, height = HISTOGRAM
    steps, values = [p[0] for p in path], [p[1] for p in path]
    low, high = min(1.0, *values), max(1.0, *values)
    room = (high - low) * 0.08 or 0.1
    low, high = low - room, high + room

    def x(step: float) -> float:
        return (step - steps[0]) / max(steps[-1] - steps[0], 1) * width

    def y(value: float) -> float:
        return (high - value) / (high - low) * height

    return {
        "points": " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in path),
        "one": round(y(1.0), 1),
        "last": round(y(values[-1]), 1),
        "steps": int(steps[-1]),
    }
