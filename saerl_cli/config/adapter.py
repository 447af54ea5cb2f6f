"""What RLHF may change."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from saerl_cli.config.groups import refuse_unless

COEFFICIENTS = ("sparse_coeffs", "random_dictionary")
"""The adapters that put coefficients on the features of a dictionary."""


class Splice(Enum):
    """How coefficients enter the forward pass (formulas: `saerl_cli.adapter.layer`)."""

    error_preserving = "error_preserving"
    reconstruct = "reconstruct"
    pre_activation = "pre_activation"


class L1Scale(Enum):
    """What the L1 penalty of a coefficient is multiplied by."""

    plain = "plain"
    """Nothing."""
    effect = "effect"
    """|W_dec_i| * E[f_i]: what the feature writes into the stream, on held-out text of the untouched model."""


@dataclass
class SparsityConfig:
    """What keeps few coefficients away from untouched, and all within bounds."""

    l1: float = 0.0
    """Weight of sum |delta|: a soft threshold of lr * l1 after every optimiser step, which makes exact zeros."""
    l1_scale: L1Scale = L1Scale.plain
    """What `l1` is multiplied by, feature by feature."""
    top_k: int | None = None
    """Coefficients away from untouched at most, over all sites: the largest |delta| after every step."""
    top_k_anneal: float = 0.5
    """Share of training over which the number allowed falls from all to `top_k`, along a cubic (Zhu and Gupta 2017)."""
    hard_concrete: float | None = None
    """Put a hard-concrete gate on every coefficient (Louizos et al. 2018): penalty per gate expected to be open."""
    min_coeff: float | None = None
    """Smallest coefficient c = 1 + delta; 0 keeps features from changing their sign."""
    max_delta: float | None = None
    """Largest |delta|."""

    def __post_init__(self) -> None:
        at = "adapter.sparsity"
        refuse_unless(self.l1 >= 0, f"{at}.l1 must be >= 0, got {self.l1}")
        refuse_unless(
            self.l1 > 0 or self.l1_scale is L1Scale.plain, f"{at}.l1_scale says nothing without {at}.l1; set that too"
        )
        refuse_unless(self.top_k is None or self.top_k >= 1, f"{at}.top_k must be >= 1, got {self.top_k}")
        refuse_unless(0 <= self.top_k_anneal <= 1, f"{at}.top_k_anneal must be in [0, 1], got {self.top_k_anneal}")
        refuse_unless(
            self.hard_concrete is None or self.hard_concrete >= 0,
            f"{at}.hard_concrete must be >= 0, got {self.hard_concrete}",
        )
        refuse_unless(
            self.min_coeff is None or self.min_coeff <= 1,
            f"{at}.min_coeff={self.min_coeff} forbids the untouched coefficient 1; it must be <= 1",
        )
        refuse_unless(self.max_delta is None or self.max_delta > 0, f"{at}.max_delta must be > 0, got {self.max_delta}")


@dataclass
class FeatureChoice:
    """Some features of the SAEs: the union of what its settings name."""

    ids: list[str] | None = None
    """Features by number: SITE:FEATURE or SITE:FIRST-LAST, for instance [mlp_out.1:7,mlp_out.1:20-29]."""
    labels: str | None = None
    """JSON file {SITE: {FEATURE: label}} for `pattern` to look in."""
    pattern: str | None = None
    """Regular expression that occurs in a feature's label, whatever the case (with `labels`)."""
    attributes: list[str] | None = None
    """Attributes of the planted language, whose features summary.json of `saerl train-sae` names."""
    f1: float = 0.8
    """Smallest F1 with which a feature must detect its attribute (with `attributes`), in [0, 1]."""

    def __post_init__(self) -> None:
        refuse_unless(0 <= self.f1 <= 1, f"f1 must be in [0, 1], got {self.f1}")
        refuse_unless(
            (self.labels is None) == (self.pattern is None), "labels and pattern belong together: give both or neither"
        )

    def empty(self) -> bool:
        """Whether it names nothing."""
        return not (self.ids or self.pattern is not None or self.attributes)


@dataclass
class AdapterConfig:
    """The trainable parameters of RLHF, beside the value head."""

    kind: str = "full"
    """What is trained: `sparse_coeffs`, `full` for every weight, or another option of the group `adapter`."""
    saes: str | None = None
    """Run directory of `saerl train-sae`, RUN/POINT for one point of its sweep, its `sae` folder, or any folder of SAE
    folders (sparse_coeffs, random_dictionary: the shapes and sparsity to imitate)."""
    sites: list[str] | None = None
    """Use only these sites of the folder, all when empty (sparse_coeffs, random_dictionary); the places of the vectors,
    resid_post.* or mlp_hidden.* when empty (steering_vector, neuron_basis)."""
    splice: Splice = Splice.error_preserving
    """How coefficients enter the forward pass (sparse_coeffs, random_dictionary)."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """Sparsity and bounds of the coefficients (sparse_coeffs, random_dictionary)."""
    features: FeatureChoice = field(default_factory=FeatureChoice)
    """Train these features only; all when empty (sparse_coeffs, random_dictionary)."""
    freeze: FeatureChoice = field(default_factory=FeatureChoice)
    """Leave these features untouched (sparse_coeffs, random_dictionary)."""
    d_sae: int | None = None
    """Random directions a site, where no `saes` give the number (random_dictionary)."""
    k: int | None = None
    """Directions that fire on a token, where no `saes` give the number (random_dictionary)."""
    seed: int | None = None
    """Seed of the random directions (random_dictionary); 0 when empty."""
    rank: int | None = None
    """Rank of the updates (lora); 1 when neither it nor `match` is given: enough for RL (Schulman et al. 2025)."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank (lora); 32 when empty (Schulman et al. 2025)."""
    targets: list[str] | None = None
    """Names of the linear layers to adapt, all but the head when empty (lora); PEFT's choice when empty (ia3)."""
    match: int | None = None
    """Choose rank, and layers where `targets` is empty, so that about so many parameters are trained (lora)."""
    lr: float = 1e-4
    """Peak learning rate of AdamW for these parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay; of delta, hence towards the untouched model."""

    def __post_init__(self) -> None:
        refuse_unless(self.lr > 0, f"adapter.lr must be > 0, got {self.lr}")
        refuse_unless(self.weight_decay >= 0, f"adapter.weight_decay must be >= 0, got {self.weight_decay}")
        refuse_foreign(self)
        if self.kind == "sparse_coeffs":
            refuse_unless(
                self.saes is not None,
                "adapter=sparse_coeffs needs adapter.saes=DIR, the run directory of `saerl train-sae` on this model",
            )
        if self.kind == "random_dictionary":
            refuse_unless(
                (self.saes is None) == bool(self.sites and self.d_sae and self.k)
                and (self.saes is None or (self.d_sae, self.k) == (None, None)),
                "adapter=random_dictionary needs either adapter.saes=DIR, SAEs to imitate, or adapter.sites,"
                " adapter.d_sae and adapter.k",
            )
        for name in ("rank", "alpha", "match", "d_sae", "k"):
            value = getattr(self, name)
            refuse_unless(value is None or value > 0, f"adapter.{name} must be > 0, got {value}")
        refuse_unless(self.rank is None or self.match is None, "adapter.match chooses the rank; leave out adapter.rank")
        refuse_biases_and_gates(self)


OWNERS = {
    "saes": COEFFICIENTS,
    "sites": (*COEFFICIENTS, "steering_vector", "neuron_basis"),
    "splice": COEFFICIENTS,
    "sparsity": COEFFICIENTS,
    "features": COEFFICIENTS,
    "freeze": COEFFICIENTS,
    "d_sae": ("random_dictionary",),
    "k": ("random_dictionary",),
    "seed": ("random_dictionary",),
    "rank": ("lora",),
    "alpha": ("lora",),
    "targets": ("lora", "ia3"),
    "match": ("lora",),
}
"""Setting -> the adapters that it belongs to; the others belong to all."""
DEFAULTS: dict[str, Any] = {
    "splice": Splice.error_preserving,
    "sparsity": SparsityConfig(),
    "features": FeatureChoice(),
    "freeze": FeatureChoice(),
}
"""What a setting is when it was not given; None for the others."""


def refuse_foreign(config: AdapterConfig) -> None:
    """`ValueError` naming the settings of another adapter than the one chosen."""
    foreign = [
        name
        for name, kinds in OWNERS.items()
        if config.kind not in kinds and getattr(config, name) != DEFAULTS.get(name)
    ]
    if foreign:
        names = " and ".join(f"adapter.{name}" for name in foreign)
        kinds = " or ".join(f"adapter={kind}" for kind in OWNERS[foreign[0]])
        flag = " (the flag --sparse-coeffs)" if "sparse_coeffs" in OWNERS[foreign[0]] else ""
        verb = "belong" if len(foreign) > 1 else "belongs"
        raise ValueError(f"{names} {verb} to {kinds}{flag}, not to adapter={config.kind}")


def refuse_biases_and_gates(config: AdapterConfig) -> None:
    """`ValueError` for sparsity where coefficients come with biases, and for gates that weight decay would close."""
    refuse_unless(
        config.splice is not Splice.pre_activation or config.sparsity == SparsityConfig(),
        "adapter.sparsity reaches coefficients, not the biases of adapter.splice=pre_activation; choose another splice",
    )
    refuse_unless(
        config.weight_decay == 0 or config.sparsity.hard_concrete is None,
        "adapter.weight_decay would move the gates of adapter.sparsity.hard_concrete; leave one of them out",
    )


def refuse_top_k(sparsity: SparsityConfig, trainable: int) -> None:
    """`ValueError` when more coefficients are allowed than there are."""
    refuse_unless(
        sparsity.top_k is None or sparsity.top_k <= trainable,
        f"adapter.sparsity.top_k={sparsity.top_k} is more than the {trainable} coefficients that may be trained;"
        " lower it or leave it out",
    )
