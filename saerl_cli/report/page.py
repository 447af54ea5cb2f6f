"""`saerl report`: one self-contained HTML page of runs, its figures and their data beside it.

report.html          everything, inline; no network
figures/*.svg, .csv  what the page draws, without interaction, and the numbers
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_cli.report.collect import RunFiles, collect
from saerl_cli.report.content import DETECTORS, FEW, content
from saerl_cli.report.html import WEB, render
from saerl_cli.report.panels import frontiers
from saerl_cli.run.directory import shown
from saerl_cli.run.files import write_text

SCRIPTS = ("tables.js", "charts.js", "page.js")
"""In the order in which they need each other."""


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and its figures.

    Args:
        paths: run directories of any command, or folders that hold some.
        out: the file; `report.html` in the first folder when empty.

    Returns:
        The file written. Figures go to `figures/` beside it, as SVG with their data as CSV.

    Raises:
        ValueError: a folder that is not there or holds no run.
    """
    runs = collect(paths)
    out = out or paths[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [str(shown(path)) for path in paths]
    command = shlex.join(["saerl", "report", *words, "--out", str(shown(out))])
    data = content(runs, frontiers(runs), command)
    data["figures"] = save_figures(out.parent / "figures", data, runs)
    write_text(out, page(data))
    return out


def page(data: dict[str, Any]) -> str:
    """The page as text. What a model wrote is in the JSON only, whose `<` cannot end the script that holds it."""
    scripts = "\n".join((WEB / name).read_text("utf-8") for name in SCRIPTS)
    return render("page.html", **data, js=scripts, json=embedded(data))


def embedded(data: Any) -> str:
    """JSON that can stand in a <script>: no character of it is special to HTML."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- figures ---------------------------------------------------------------------------------------------------------


def save_figures(folder: Path, data: dict[str, Any], runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Every figure as SVG and its data as CSV, tables as CSV; what was written, by figure."""
    from saerl_cli.report import figures

    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, list[str]] = {}

    def save(key: str, name: str, figure: Any, rows: list[dict[str, Any]]) -> None:
        if figure is not None:
            write_text(folder / f"{name}.svg", figures.svg(figure))
        figures.write_csv(folder / f"{name}.csv", rows)
        written[key] = [f"figures/{name}.{end}" for end in (("svg",) if figure is not None else ()) + ("csv",)]

    if any(run.metrics for run in runs):
        rows = [{"run": run.name, "group": run.group, "seed": run.seed, **line} for run in runs for line in run.metrics]
        save("curves", "curves", figures.curves_of(data["curves"]["series"]), rows)
    for i, panel in enumerate(data["frontiers"]):
        save(f"frontier-{i}", "frontier" if i == 0 else f"frontier-{i + 1}", figures.panel(panel), panel_rows(panel))
    for part in data["features"]:
        columns = zip(part["site"], part["feature"], part["delta"], strict=True)
        rows = [{"site": part["sites"][s], "feature": f, "delta": d} for s, f, d in columns]
        drawn = len(data["features"]) <= FEW
        ranks = figures.coefficient_ranks(deltas_of(part)) if drawn else None
        save(f"features-{part['run']}", f"features-{slug(part['run'])}", ranks, rows)
    for part in data["audits"]:
        rows = [{"curve": name, **point} for name, points in part["curves"].items() for point in points]
        save(f"audit-{part['run']}", f"audit-{slug(part['run'])}", figures.keep_curves(part["curves"]), rows)
        figures.write_csv(folder / f"audit-{slug(part['run'])}-reverts.csv", [flat_row(r) for r in part["reverts"]])
    for part in data["gold"]:
        columns = [part[key] for key in ("step", "kl", "proxy", "gold")]
        rows = [{"step": a, "kl": b, "proxy": c, "gold": d} for a, b, c, d in zip(*columns, strict=True)]
        save(f"gold-{part['run']}", f"gold-{slug(part['run'])}", figures.proxy_against_gold(part), rows)
    if data["behaviour"]:
        save("behaviour", "behaviour", None, [behaviour_row(part) for part in data["behaviour"]])
    if data["numbers"]["rows"]:
        save("numbers", "numbers", None, [numbers_row(data["numbers"], row) for row in data["numbers"]["rows"]])
    return written


def slug(name: str) -> str:
    """A run's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def deltas_of(part: dict[str, Any]) -> dict[str, list[float]]:
    """Site -> the deltas that moved."""
    found: dict[str, list[float]] = {site: [] for site in part["sites"]}
    for site, delta in zip(part["site"], part["delta"], strict=True):
        found[part["sites"][site]].append(delta or 0.0)
    return {site: values for site, values in found.items() if values}


def panel_rows(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """What a frontier shows, a line a point."""
    rows = [
        {"what": s["run"], "group": s["group"], "seed": s["seed"], **p} for s in panel["series"] for p in s["points"]
    ]
    rows += [{"what": f"{m['group']} (mean)", **point} for m in panel["means"] for point in m["points"]]
    return rows + [
        {"what": name, **point}
        for name in ("optimum", "pooled_optimum", "best_of_n")
        for point in panel.get(name) or []
    ]


def flat_row(line: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as CSV takes it."""
    return {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in line.items()}


def behaviour_row(part: dict[str, Any]) -> dict[str, Any]:
    """Detectors of a run, before and after, and its constants."""
    row: dict[str, Any] = {"run": part["run"], "beaten": part["beaten"]}
    for (_, key, _, _), (before, after) in zip(DETECTORS, part["cells"], strict=True):
        row |= {f"{key}_before": before, f"{key}_after": after}
    for name in ("best", "string", "token", "empty"):
        constant = (part["baselines"] or {}).get(name) or {}
        row |= {f"{name}_{key}": constant.get(key) for key in ("text", "reward", "difference", "kl", "near")}
    return row


def numbers_row(table: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of numbers."""
    cells = {}
    for column, (value, half, before) in zip(table["columns"], row["cells"], strict=True):
        cells |= {f"{column['label']}, untouched model": before} if before is not None else {}
        cells |= {column["label"]: value, **({f"{column['label']}, half of 95 %": half} if half is not None else {})}
    return {key: row[key] for key in ("run", "group", "status", "measured", "beaten")} | cells
