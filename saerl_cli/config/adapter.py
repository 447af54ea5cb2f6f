"""What RLHF may change."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.settings import check_settings, setting

COEFFICIENTS = ("sparse_coeffs", "random_dictionary")
"""The adapters that put coefficients on the features of a dictionary."""
MOVED = 1e-3
"""A coefficient has moved where |delta| = |c - 1| exceeds this: the one meaning of the word in every number, table and
page. Being exactly untouched (`nonzero` counts the others) tells little, since Adam shifts every coefficient that ever
had a gradient by up to the learning rate; a change of a thousandth of what a feature writes is below anything that
reward or KL show, and a larger bound would hide features that write much."""


class Splice(Enum):
    """How coefficients enter the forward pass (formulas: `saerl_cli.adapter.coefficients.splice`)."""

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

    l1: float = setting(0.0, ">= 0")
    """Weight of sum |delta|: a soft threshold of lr * l1 after every optimiser step, which makes exact zeros."""
    l1_scale: L1Scale = setting(L1Scale.plain, l1=True)
    """What `l1` is multiplied by, feature by feature."""
    top_k: int | None = setting(None, ">= 1")
    """Coefficients away from untouched at most, over all sites: the largest |delta| after every step."""
    top_k_anneal: float = setting(0.5, "in [0, 1]", top_k=True)
    """Share of training over which the number allowed falls from all to `top_k`, along a cubic (Zhu and Gupta 2017)."""
    hard_concrete: float | None = setting(None, ">= 0")
    """Put a hard-concrete gate on every coefficient (Louizos et al. 2018): penalty per gate expected to be open."""
    min_coeff: float | None = None
    """Smallest coefficient c = 1 + delta; 0 keeps features from changing their sign."""
    max_delta: float | None = setting(None, "> 0")
    """Largest |delta|."""

    def __post_init__(self) -> None:
        check_settings(self, "adapter.sparsity")
        refuse_unless(
            self.min_coeff is None or self.min_coeff <= 1,
            f"adapter.sparsity.min_coeff={self.min_coeff} forbids the untouched coefficient 1; it must be <= 1",
        )


@dataclass
class FeatureChoice:
    """Some features of the SAEs: the union of what its settings name."""

    ids: list[str] | None = None
    """Features by number: SITE:FEATURE or SITE:FIRST-LAST, for instance [mlp_out.1:7,mlp_out.1:20-29]."""
    labels: str | None = None
    """JSON file {SITE: {FEATURE: label}} for `pattern` to look in."""
    pattern: str | None = None
    """Regular expression that occurs in a feature's label, whatever the case; goes with `labels`."""
    attributes: list[str] | None = None
    """Attributes of the planted language, whose features summary.json of `saerl train-sae` names."""
    f1: float = setting(0.8, "in [0, 1]", attributes=True)
    """Smallest F1 with which a feature must detect its attribute."""

    def __post_init__(self) -> None:
        check_settings(self)
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
    saes: str | None = setting(None, kind=COEFFICIENTS)
    """Run directory of `saerl train-sae`, RUN/POINT for one point of its sweep, its `sae` folder, or any folder of SAE
    folders; for random_dictionary those whose shapes and sparsity it imitates."""
    sites: list[str] | None = setting(None, kind=(*COEFFICIENTS, "steering_vector", "neuron_basis"))
    """Use only these sites of the folder, all when empty; the places of the vectors, resid_post.* (steering_vector) or
    mlp_hidden.* (neuron_basis) when empty."""
    splice: Splice = setting(Splice.error_preserving, kind=COEFFICIENTS)
    """How coefficients enter the forward pass."""
    sparsity: SparsityConfig = setting(
        SparsityConfig, kind=COEFFICIENTS, splice=(Splice.error_preserving, Splice.reconstruct)
    )
    """Sparsity and bounds of the coefficients, which the biases of splice=pre_activation are not."""
    features: FeatureChoice = setting(FeatureChoice, kind=COEFFICIENTS)
    """Train these features only; all when empty."""
    freeze: FeatureChoice = setting(FeatureChoice, kind=COEFFICIENTS)
    """Leave these features untouched."""
    d_sae: int | None = setting(None, "> 0", kind="random_dictionary")
    """Random directions a site, where no `saes` give the number."""
    k: int | None = setting(None, "> 0", kind="random_dictionary")
    """Directions that fire on a token, where no `saes` give the number."""
    seed: int | None = setting(None, kind="random_dictionary")
    """Seed of the random directions; 0 when empty."""
    rank: int | None = setting(None, "> 0", kind="lora")
    """Rank of the updates; 1 when neither it nor `match` is given: enough for RL (Schulman et al. 2025)."""
    alpha: float | None = setting(None, "> 0", kind="lora")
    """Updates are scaled by alpha / rank; 32 when empty (Schulman et al. 2025)."""
    targets: list[str] | None = setting(None, kind=("lora", "ia3"))
    """Names of the linear layers to adapt; when empty all but the head (lora), PEFT's choice (ia3)."""
    match: int | None = setting(None, "> 0", kind="lora")
    """Choose rank, and layers where `targets` is empty, so that about so many parameters are trained."""
    lr: float = setting(1e-4, "> 0")
    """Peak learning rate of AdamW for these parameters."""
    weight_decay: float = setting(0.0, ">= 0")
    """Decoupled weight decay; of delta, hence towards the untouched model."""

    def __post_init__(self) -> None:
        check_settings(self, "adapter")
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
        refuse_unless(self.rank is None or self.match is None, "adapter.match chooses the rank; leave out adapter.rank")
        refuse_unless(
            self.weight_decay == 0 or self.sparsity.hard_concrete is None,
            "adapter.weight_decay would move the gates of adapter.sparsity.hard_concrete; leave one of them out",
        )


def refuse_top_k(sparsity: SparsityConfig, trainable: int) -> None:
    """`ValueError` when more coefficients are allowed than there are."""
    refuse_unless(
        sparsity.top_k is None or sparsity.top_k <= trainable,
        f"adapter.sparsity.top_k={sparsity.top_k} is more than the {trainable} coefficients that may be trained;"
        " lower it or leave it out",
    )
