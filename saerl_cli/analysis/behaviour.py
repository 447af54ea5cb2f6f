"""What the files of a run say of its behaviour: proxy against gold reward, share of the gain from one feature.

The detectors themselves are computed when a run ends (`behaviour` and `baselines` in `saerl_cli.rl.evaluation`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from saerl_cli.rl.results import Audit

GOLD = "gold"
"""A reward part with this in its name, weight 0 and not heavy-tailed is what the reward stands for."""


def gold_parts(settings: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a run's reward that say what it stands for, with the factor of each in the gold reward.

    Those of weight 0, which are measured and not learned from (held out), or called gold; else, where a heavy-tailed
    error was injected, all parts but that one. Empty where nothing is held out.

    Args:
        settings: of training, {dotted key: value}.
    """
    names = list(dict.fromkeys(key.split(".")[2] for key in settings if key.startswith("reward.parts.")))
    weight = {name: float(settings.get(f"reward.parts.{name}.weight", 1.0)) for name in names}
    kind = {name: settings.get(f"reward.parts.{name}.kind") for name in names}
    held_out = [name for name in names if weight[name] == 0 or GOLD in name.lower()]
    if held_out and len(held_out) < len(names):
        return {name: weight[name] or 1.0 for name in held_out}
    errors = [name for name in names if kind[name] == "heavy"]
    return {name: weight[name] for name in names if name not in errors} if errors else {}


def proxy_and_gold(lines: Sequence[Mapping[str, Any]], gold: Mapping[str, float]) -> list[dict[str, float]]:
    """{step, kl, proxy, gold} of every logged phase that has them.

    Args:
        lines: of metrics.jsonl.
        gold: `gold_parts`.
    """
    keys = {f"reward/{name}": factor for name, factor in gold.items()}
    return [
        {
            "step": line["step"],
            "kl": line.get("kl", 0.0),
            "proxy": line["reward"],
            "gold": sum(factor * line[key] for key, factor in keys.items()),
        }
        for line in lines
        if keys and "reward" in line and all(key in line for key in keys)
    ]


def one_feature(audit: Audit) -> dict[str, Any] | None:
    """The feature that carries most of an audited policy's gain: {site, feature, share, share_se}; None if unknown.

    `share` is the reward lost when its coefficient is reverted, divided by the gain.
    """
    gain = audit.gain.get("gain")
    reverts = [line for line in audit.reverts if isinstance(line.get("reward"), int | float)]
    if not gain or not reverts:
        return None
    top = min(reverts, key=lambda line: line["reward"] / gain)
    error = top.get("reward_se")
    share = {"share": -top["reward"] / gain, "share_se": None if error is None else abs(error / gain)}
    return {"site": top.get("site"), "feature": top.get("feature"), **share}
