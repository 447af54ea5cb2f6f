"""Metrics of SAEs as a table, figures and one self-contained page.

table.csv      a line an SAE and a control, a column a metric
figures/       SVG, and the numbers drawn as CSV
report.html    table and figures
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.report import figures
from saerl_cli.report.html import render
from saerl_cli.report.text import aligned, cell
from saerl_cli.run.directory import versions
from saerl_cli.run.files import write_text
from saerl_cli.sae.evaluate import SaeResults

COLUMNS = (
    ("site", "site", "{}"),
    ("architecture", "architecture", "{}"),
    ("width", "d_sae", "{:,}"),
    ("L0", "l0", "{:.1f}"),
    ("FVU", "fvu", "{:.4f}"),
    ("CE recovered", "ce_recovered", "{:.3f}"),
    ("KL", "kl_spliced", "{:.4f}"),
    ("dead", "dead_heldout", "{:.1%}"),
    ("gamma", "gamma", "{:.3f}"),
)
"""Heading, key of the metrics, format."""
WORDS = 3
"""The first columns hold words."""

Metrics = dict[str, dict[str, Any]]
"""Metrics by name of an SAE, or of a control."""


def write_results(found: SaeResults, folder: Path, config: EvalSaeConfig) -> None:
    """Write table.csv, figures/ and report.html into a folder."""
    everything = found.saes | found.controls
    plain = [
        {"name": name, **{key: value for key, value in metrics.items() if not isinstance(value, dict | list)}}
        for name, metrics in everything.items()
    ]
    figures.write_csv(folder / "table.csv", plain)
    out = folder / "figures"
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(found)
    for name, figure in drawn.items():
        write_text(out / f"{name}.svg", figures.svg(figure))
    figures.write_csv(out / "l0_fvu.csv", points(everything, "fvu"))
    figures.write_csv(out / "l0_ce_recovered.csv", points(comparable(everything), "ce_recovered"))
    figures.write_csv(out / "density.csv", density_rows(found.saes))
    shown = content(found, config) | {
        "fvu": figures.svg(drawn["l0_fvu"]),
        "recovered": figures.svg(drawn["l0_ce_recovered"]),
        "density": figures.svg(drawn["density"]),
    }
    write_text(folder / "report.html", render("saes.html", **shown))


# --- tables ----------------------------------------------------------------------------------------------------------


def table(rows: Metrics) -> list[list[str]]:
    """A heading and a line an SAE, as text."""
    lines = [["SAE", *(heading for heading, _, _ in COLUMNS)]]
    for name, metrics in rows.items():
        transcodes = metrics.get("target", metrics.get("site")) != metrics.get("site")
        shown = metrics | ({"site": f"{metrics['site']} > {metrics['target']}"} if transcodes else {})
        lines.append([name, *(cell(shown, key, form) for _, key, form in COLUMNS)])
    return lines


def print_tables(found: SaeResults) -> None:
    """Print the SAEs, then their controls."""
    print(aligned(table(found.saes), WORDS), flush=True)
    if found.controls:
        print("\n" + aligned(table(found.controls), WORDS), flush=True)


def warnings(saes: Metrics, controls: Metrics) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    for name, metrics in saes.items():
        if not metrics["beats_mean"]:
            found.append(f"{name}: FVU {metrics['fvu']:.3f} >= 1, so that it is worse than the mean of all activations")
        if metrics["trivial"]:
            found.append(
                f"{name}: {metrics['site']} sees the current token alone (parallel residual), so its SAE is trivially"
                " good and no evidence"
            )
        found += [f"{name}: {line}" for line in unconvincing(metrics, name, controls)]
    return found


def unconvincing(metrics: Mapping[str, Any], name: str, controls: Metrics) -> list[str]:
    """Where a control does as well as the SAE, two standard errors allowed."""
    random, real, shuffled = (controls.get(f"{name}/{kind}") for kind in ("random", "real", "shuffled"))
    found = []
    if random is not None and not_below(metrics, random, "fvu"):
        found.append(
            f"random directions reconstruct as well (FVU {random['fvu']:.3f} at L0 {random['l0']:.1f}, the SAE"
            f" {metrics['fvu']:.3f} at {metrics['l0']:.1f})"
        )
    if real is not None and shuffled is not None and not_below(real, shuffled, "fvu"):
        found.append(
            f"its like on shuffled weights reconstructs as well (FVU {shuffled['fvu']:.3f}, on real ones"
            f" {real['fvu']:.3f}), so that its FVU is no sign that features were found"
        )
    return found


def not_below(metrics: Mapping[str, Any], control: Mapping[str, Any], key: str) -> bool:
    """Whether a number is not smaller than that of a control by more than two standard errors of the difference."""
    error = (metrics.get(f"{key}_se", 0.0) ** 2 + control.get(f"{key}_se", 0.0) ** 2) ** 0.5
    return metrics[key] > control[key] - 2 * error


def probe_table(probes: Mapping[str, Any]) -> list[list[str]]:
    """Mean accuracy and AUROC over labels of every SAE, and of the raw activations of every site."""
    sizes = {"1": "1 feature", "2": "2 features", "5": "5 features", "all": "all"}
    lines = [["probed", "", "", *(f"{text}: {key}" for text in sizes.values() for key in ("accuracy", "AUROC"))]]
    named = {**probes.get("saes", {}), **{f"{s} (raw)": p for s, p in probes.get("activations", {}).items()}}
    for name, results in named.items():
        mean = [results["mean"].get(size) for size in sizes]
        numbers = [f"{m[key]:.3f}" if m else "–" for m in mean for key in ("accuracy", "auroc")]
        lines.append([name, "", "", *numbers])
    return [[line[0], *line[WORDS:]] for line in lines]


def label_tables(probes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every probed thing a table of its labels."""
    tables = []
    for name, results in {**probes.get("saes", {}), **probes.get("activations", {})}.items():
        lines = []
        for label in probes["labels"]:
            sizes = results[label]
            best = ", ".join(map(str, sizes["5"]["features"]))
            lines.append([label, best, *(cell(sizes[size], "auroc", "{:.3f}") for size in sizes)])
        headings = ["label", "features", *results["mean"]]
        tables.append({"name": name, "lines": [headings, *lines]})
    return tables


def stability_table(pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for every two SAEs of a site."""

    def against_chance(pair: Mapping[str, Any], key: str) -> str:
        return f"{pair[key]:.3f} ({pair[f'{key}_random']:.3f})" if key in pair else "–"

    return [
        ["SAE", "other", "site", "seeds", "mean max cosine", "matched cosine", "pairs above 0.7"],
        *(
            [
                *pair["saes"],
                pair["site"],
                seeds(pair),
                *(against_chance(pair, key) for key in ("mmcs", "matched", "shared")),
            ]
            for pair in pairs
        ),
    ]


def seeds(pair: Mapping[str, Any]) -> str:
    """The seeds of two SAEs; one that is not recorded is a question mark."""
    first, second = ("?" if seed is None else str(seed) for seed in pair["seeds"])
    return f"{first}, {second}" + (" (same start)" if first == second != "?" else "")


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(found: SaeResults) -> dict[str, Any]:
    """Figure name -> matplotlib figure."""
    everything = found.saes | found.controls
    return {
        "l0_fvu": figures.sae_frontier(points(everything, "fvu"), "FVU", log=True),
        "l0_ce_recovered": figures.sae_frontier(
            points(comparable(everything), "ce_recovered"), "CE recovered", log=False
        ),
        "density": figures.densities({name: metrics["density"] for name, metrics in found.saes.items()}),
    }


def points(rows: Metrics, key: str) -> list[dict[str, Any]]:
    """One metric over L0; a control is shown at the site of its SAE, wherever it was measured."""
    widths = {metrics["d_sae"] for metrics in rows.values()}
    return [
        {
            "name": name,
            "site": rows[metrics.get("of", name)]["site"],
            "group": metrics["architecture"] + (f" {metrics['d_sae']:,}" if len(widths) > 1 else ""),
            "control": metrics.get("control"),
            "l0": metrics["l0"],
            "l0_se": metrics.get("l0_se"),
            "value": metrics[key],
            "value_se": metrics.get(f"{key}_se"),
        }
        for name, metrics in rows.items()
    ]


def comparable(rows: Metrics) -> Metrics:
    """Without those on shuffled weights, whose losses are another model's."""
    return {name: metrics for name, metrics in rows.items() if metrics.get("control") != "shuffled"}


def density_rows(saes: Metrics) -> list[dict[str, Any]]:
    """The bars of the density figure."""
    return [
        {"name": name, "log10_from": low, "log10_to": high, "features": count}
        for name, metrics in saes.items()
        for low, high, count in zip(
            metrics["density"]["log10_edges"],
            metrics["density"]["log10_edges"][1:],
            metrics["density"]["features"],
            strict=False,
        )
    ]


# --- page ------------------------------------------------------------------------------------------------------------


def content(found: SaeResults, config: EvalSaeConfig) -> dict[str, Any]:
    """What the template shows beside the figures; all of it is escaped there."""
    tokens = max(metrics["tokens_heldout"] for metrics in found.saes.values())
    number = len(found.saes)
    probes = found.probes
    examples = probes.get("examples", {})
    return {
        "title": "What these SAEs are worth" if number > 1 else f"What the SAE {next(iter(found.saes))} is worth",
        "lead": f"{number} SAE{'s' * (number > 1)} of {found.inputs['model']['name']} on {tokens:,} held-out tokens.",
        "warnings": warnings(found.saes, found.controls),
        "words": WORDS,
        "numbers": table(found.saes),
        "controls": table(found.controls),
        "control_tokens": f"{config.control_tokens:,}",
        "probes": probe_table(probes),
        "probes_caption": f"Mean over {len(probes.get('labels', {}))} labels of logistic regressions on the features"
        f" that differ most, fitted on {examples.get('train', 0):,} {probes.get('kind', '')} and judged on"
        f" {examples.get('test', 0):,} others. Raw: dimensions of the activations instead of features."
        + (f" Left out as too rare: {', '.join(probes['left_out'])}." if probes.get("left_out") else ""),
        "labels": label_tables(probes) if probes else [],
        "stability": stability_table(found.stability),
        "provenance": [
            ["SAE", "folder", "sha256"],
            *([name, sae["path"], sae["sha256"][:16]] for name, sae in found.inputs["sae"].items()),
        ],
        "model": f"Model: {found.inputs['model']['name']}, sha256 {found.inputs['model']['sha256'][:16]}.",
        "footer": f"Written by saerl {versions().get('saerl', '')} from summary.json of this folder.",
    }
