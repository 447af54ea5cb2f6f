"""What runs leave for other commands to read, typed: audits, and the points of a frontier. Imports no torch.

`X_se` is the standard error of X, `X_half` half its 95 % interval; rewards are in the reward's own unit.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from saerl_cli.run.files import read_json, write_json

AUDIT = "audit.json"
AUDIT_VERSION = 1

Numbers = dict[str, Any]


@dataclass
class Audit:
    """What `saerl audit` found of a policy: RUN/audit.json."""

    version: int = 0
    policy: str = ""
    """The run."""
    adapter: str = ""
    splice: str = ""
    seed: int = 0
    prompts: int = 0
    """So many answered by every variant."""
    features: Numbers = field(default_factory=dict)
    """total: coefficients; touched: those not exactly 1; moved: those further from 1 than `MOVED`."""
    gain: Numbers = field(default_factory=dict)
    """reward_reference (over several draws), reward, gain (`Gain.over`), kl (nats a completion), loss_reference, loss,
    loss_increase (nats a token), with _se."""
    completeness: Numbers = field(default_factory=dict)
    """attributed: sum of all attributions; difference: that minus the gain; with _se."""
    reverts: list[Numbers] = field(default_factory=list)
    """A line a feature that was reverted: site, feature, delta, attribution, attribution_se, share, effect; reward, kl,
    loss: change when it is reverted, with _se; fires_on, attribute, f1, kind."""
    pairs: list[Numbers] = field(default_factory=list)
    """first, second; joint: change when both are reverted; interaction: minus the sum of the two alone; kept_joint,
    kept_interaction: the same when they are all that is kept, against the reference."""
    shares: dict[str, Numbers] = field(default_factory=dict)
    """by_kind, by_place, by_direction, by_role, by_attribute: name -> features, attribution, share, effect_share.
    Sums by the tokens that features fire on, by whether those are rewarded or come before a rewarded one, by whether
    features write towards or away from rewarded ones, by the attribute they detect."""
    curves: dict[str, list[Numbers]] = field(default_factory=dict)
    """keep, remove, keep_by_effect, keep_random, keep_matched: {n, gain, share, share_se}, what is left of the gain if
    the first n are kept, removed, ...; controls also have `spread`, the standard deviation over draws, matched ones
    `effect_ratio`, their effect over that of the kept."""
    needed: dict[str, Numbers | None] = field(default_factory=dict)
    """"50", "90", "99": the fewest first features, of those numbers tried, that carry so many per cent of the gain: n;
    low, high: the same for the ends of 95 % intervals (high may be null); without: the share left without them; random,
    matched: with as many control features (matched_effect: their effect over that of the first). Null: none do."""
    side_effects: dict[str, Numbers] = field(default_factory=dict)
    """full, needed_90: gain, kl, loss_increase, kl_per_gain, loss_per_gain, length, distinct_2: changes; with a planted
    model attributes {name: change of its share of all words}, rewarded_change, ratio: summed |change| of other
    attributes over that of the rewarded, ratio_by_chance: with the reference sampled twice."""
    peers: list[Numbers] = field(default_factory=list)
    """policy, seed, delta: Spearman correlation over all features; sites: {SITE: {delta, top: k, top_overlap,
    top_expected: of the k largest |delta|}}; of a peer that was audited too, attribution: Spearman correlation,
    attribution_top: overlap of the 100 largest."""
    attributions: dict[str, list[float]] = field(default_factory=dict)
    """SITE -> attribution of every feature, to four digits."""


def write_audit(folder: Path, audit: Audit) -> None:
    """Write FOLDER/audit.json."""
    write_json(folder / AUDIT, asdict(audit))


def read_audit(file: Path) -> Audit:
    """Read an audit.json; what another version left out is empty, what it has besides is passed over.

    Raises:
        ValueError: it is no JSON object.
    """
    return known(Audit, read_json(file), file)


@dataclass
class Point:
    """A policy on the frontier of reward against KL: an entry of `frontier` in the summary.json of `saerl evaluate`."""

    step: int
    """Of training."""
    reward: float
    reward_se: float
    gain: float
    """Over the reference on the same prompts."""
    gain_se: float
    kl_exact: float
    """Sequence KL from the reference: of every next-token distribution along completions, summed, nats a completion."""
    kl_exact_se: float
    kl: float | None = None
    """The same by the k1 estimate."""
    kl_se: float | None = None
    length: float | None = None
    """Tokens of a completion."""
    ended: float | None = None
    """Share of completions with an end token."""
    nll_heldout: float | None = None
    """Held-out loss, nats a token."""
    factor: float | None = None
    """What was learned is multiplied by this; None: whole."""
    changed: int | None = None
    """Coefficients that moved."""
    nonzero: int | None = None
    """Coefficients not exactly 1."""
    delta_max: float | None = None
    delta_norm: float | None = None
    efficiency: float | None = None
    """Gain as a share of the KL-optimal policy's at the same KL."""
    efficiency_se: float | None = None
    efficiency_bound: float | None = None
    """The same against the limit with pooled prompts, which is too high."""
    efficiency_bound_se: float | None = None


def known(kind: Any, values: Any, where: Path | str) -> Any:
    """Build a dataclass from the keys that it knows.

    Raises:
        ValueError: values that are no mapping, or lack a key that it must have.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is not what this version of saerl writes")
    names = {f.name for f in fields(kind)}
    try:
        return kind(**{key: value for key, value in values.items() if key in names})
    except TypeError as error:
        raise ValueError(f"{where} is not what this version of saerl writes ({error})") from None
