"""Numbers of a card from runs: `python collect.py CARD COMPARISON TRAINING ...` writes results.json, curves and figure.

CARD: folder of the card. COMPARISON: a run of `saerl compare`. TRAINING: runs of `saerl rlhf`, or folders of them.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

HARDWARE = "2 cores of an AMD EPYC (virtual machine), 24 GB, no GPU (not measured on GPU)"
CONFIG = ("adapter.kind", "adapter.lr", "adapter.sites", "adapter.splice", "algo.kind", "algo.kl_coef", "algo.phases")
SUMMARY = (
    *("trainable_parameters", "reward_before", "reward_after", "reward_se", "kl", "kl_se", "kl_exact", "kl_exact_se"),
    *("nll_heldout_before", "nll_heldout_after", "seconds", "frozen_unchanged", "changed", "nonzero", "curse_removed"),
)


def main(card: Path, comparison: Path, training: list[Path]) -> None:
    """Write the card's numbers."""
    compared = read(comparison / "summary.json")
    runs = [file.parent for folder in training for file in sorted(folder.rglob("run.json"))]
    records = [(path, read(path / "run.json")) for path in runs]
    records = [(path, record) for path, record in records if record["job"] == "rlhf"]
    if any(record["status"] != "completed" for _, record in records):
        raise SystemExit("unfinished: " + ", ".join(str(p) for p, r in records if r["status"] != "completed"))
    first = records[0][1]
    file = card / "results.json"
    results = {
        "status": read(file)["status"] if file.is_file() else "to be judged",  # of the claim, written by hand
        "hardware": HARDWARE,
        "versions": first["versions"],
        "commit": sorted({record["git_commit"] for _, record in records}),
        "runs": [{"name": path.name, "seed": record["seed"], **numbers(path)} for path, record in records],
        "comparison": {
            "methods": {name: named(m) for name, m in compared["methods"].items()},
            "table": compared["table"],
        },
    }
    card.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (card / "curves.csv").write_text((comparison / "figure.csv").read_text())
    (card / "frontier.svg").write_text((comparison / "figure.svg").read_text())
    with (comparison / "table.csv").open() as file:
        print(*("  ".join(row) for row in csv.reader(file)), sep="\n")


def numbers(path: Path) -> dict[str, Any]:
    """Settings that make a method, and what came out."""
    from omegaconf import OmegaConf

    from saerl_cli.run.directory import Run

    summary = read(path / "summary.json")
    plain: Any = OmegaConf.to_container(Run(path).settings)
    chosen = {key: plain[key.split(".")[0]].get(key.split(".")[1]) for key in CONFIG}
    return chosen | {key: summary[key] for key in SUMMARY if key in summary}


def named(method: dict[str, Any]) -> dict[str, Any]:
    """A method of the comparison, its runs by name: folders of a machine say nothing elsewhere."""
    return method | {"runs": [Path(path).name for path in method["runs"]]}


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
