"""An audit as files, figures, a table and a few sentences.

reverts.csv         a line a feature that was reverted
attribution.csv     what attribution.svg and .png show beside reverts.csv
keep_only.csv       what keep_only.svg and .png show
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saerl_cli.report import figures
from saerl_cli.report.text import aligned
from saerl_cli.rl.results import Audit

COLUMNS = (
    ("attributed", "attribution", "{:.3f}"),
    ("reverted: reward", "reward", "{:+.3f}"),
    ("KL, nats", "kl", "{:+.3f}"),
    ("held-out loss", "loss", "{:+.4f}"),
)
"""Heading, key, format; each with its standard error."""
TITLES = {
    "by_role": "by the attribute that features detect",
    "by_place": "by where features fire: on rewarded tokens, before one",
    "by_kind": "by the tokens on which features fire",
}
"""Shares that are drawn: key -> words."""

Numbers = dict[str, Any]


def write_figures(folder: Path, found: Audit) -> None:
    """keep_only and attribution as SVG and PNG, and the numbers drawn as CSV."""
    curves, shares = found.curves, found.shares
    figures.save(figures.keep_only(curves, found.needed), folder / "keep_only")
    figures.write_csv(
        folder / "keep_only.csv", [{"curve": name, **p} for name, points in curves.items() for p in points]
    )
    rows = [
        {**row, "name": name_of(row), "label": " ".join(row["fires_on"][:3]), "rewarded": row["kind"] == "rewarded"}
        for row in found.reverts
    ]
    drawn = {title: shares[key] for key, title in TITLES.items() if key in shares}
    figures.save(figures.attributions(rows, drawn), folder / "attribution")
    plain = [{**row, "fires_on": " ".join(row["fires_on"])} for row in found.reverts]
    figures.write_csv(folder / "reverts.csv", plain)
    groups = [{"group": group, "name": n, **entry} for group, names in shares.items() for n, entry in names.items()]
    figures.write_csv(folder / "attribution.csv", groups)


# --- words -----------------------------------------------------------------------------------------------------------


def name_of(row: Numbers) -> str:
    """SITE:FEATURE."""
    return f"{row['site']}:{row['feature']}"


def print_table(found: Audit) -> None:
    """Print a line a feature that was reverted."""
    print(aligned(table(found), words=2), flush=True)


def table(found: Audit) -> list[list[str]]:
    """A heading and a line a feature that was reverted."""
    lines = [["feature", "fires on", "delta", *(heading for heading, _, _ in COLUMNS)]]
    for row in found.reverts:
        cells = [
            f"{form.format(row[key])} ± {form.replace('+', '').format(row[f'{key}_se'])}" for _, key, form in COLUMNS
        ]
        lines.append([name_of(row), " ".join(row["fires_on"][:3]), f"{row['delta']:+.2f}", *cells])
    return lines


def finding(found: Audit) -> Iterator[str]:
    """What was found, in plain sentences."""
    gain, moved = found.gain, found.features["moved"]
    if abs(gain["gain"]) < 2 * gain["gain_se"]:
        yield (
            f"WARNING: the gain, {gain['gain']:.3f} ± {gain['gain_se']:.3f}, is not told apart from none: shares of it"
            " say nothing; raise evaluation.samples"
        )
        return
    ninety = found.needed["90"]
    if ninety is None:
        yield f"no number of first features carries 90 % of the gain of {gain['gain']:.3f} ± {gain['gain_se']:.3f}"
    else:
        like = f"as many others that have {ninety.get('matched_effect', 1):.0%} of their effect"
        controls = [
            f"{words} {ninety[name]:.0%} ± {ninety[f'{name}_se']:.0%}"
            for name, words in (("random", "as many at random"), ("matched", like), ("without", "all but these"))
            if name in ninety
        ]
        among = f"{ninety['n']:,} of {found.features['total']:,} features ({moved:,} moved)"
        yield (
            f"{among} carry 90 % of the gain of {gain['gain']:.3f} ± {gain['gain_se']:.3f}"
            + (f"; {', '.join(controls)} (± a standard error)" if controls else "")
        )
    role = found.shares.get("by_role", {}).get("rewarded")
    if role:
        share = f"{role['share']:.1%} ± {role['share_se']:.1%}"
        yield (
            f"{share} of the gain is attributed to {role['features']:,} features of"
            f" the rewarded attribute, which have {role['effect_share']:.1%} of the effect"
        )
    yield from redundancy(found)
    yield spending(found.side_effects["full"])
    for peer in found.peers:
        overlap = sum(s["top_overlap"] for s in peer["sites"].values()) / len(peer["sites"])
        expected = sum(s["top_expected"] for s in peer["sites"].values()) / len(peer["sites"])
        yield (
            f"{peer['policy']}: rank correlation of delta {shown(peer['delta'])}, {overlap:.0%} of the largest shared"
            f" ({expected:.0%} by chance)"
        )


def redundancy(found: Audit) -> Iterator[str]:
    """How much of the gain is lost when single features are reverted, and when those behind 90 % of it are."""
    gain = found.gain["gain"]
    worst = min(found.reverts, key=lambda row: row["reward"] * (1 if gain > 0 else -1))
    lost, error = -worst["reward"] / gain, worst["reward_se"] / abs(gain)
    yield f"reverting a single feature costs {lost:.0%} ± {error:.0%} of the gain at most ({name_of(worst)})"


def spending(full: Numbers) -> str:
    """What else the policy changed."""
    spent = (
        f"a unit of reward costs {full['kl_per_gain']:.2f} nats of KL and {full['loss_per_gain']:+.3f} of held-out loss"
    )
    if not full.get("rewarded_change"):
        return spent
    return (
        f"{spent}; attributes that are not rewarded change {full['ratio']:.1f} times as much as the rewarded one,"
        f" {full['ratio_by_chance']:.1f} times by chance"
    )


def shown(value: float | None) -> str:
    """A correlation, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"
