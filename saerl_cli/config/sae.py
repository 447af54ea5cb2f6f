"""Settings of one sparse autoencoder: its form, its sparsity, its dead features, its optimiser.

A preset is an option of the config group `sae` (`conf/sae/*.yaml`). Which settings belong to which architecture is
checked, so that a setting that would do nothing is refused.
"""

from dataclasses import dataclass, field, fields
from enum import Enum

from saerl_cli.config.groups import refuse_unless


class Architecture(Enum):
    """The autoencoder and its loss (formulas: `saerl_cli.sae.train`)."""

    topk = "topk"
    """The k largest pre-activations of a token are kept (Gao et al. 2024)."""
    batchtopk = "batchtopk"
    """The k·n largest of a batch of n tokens are kept; saved as JumpReLU (Bussmann et al. 2024)."""
    matryoshka = "matryoshka"
    """BatchTopK whose prefixes reconstruct too (Bussmann et al. 2025)."""
    relu = "relu"
    """ReLU with L1 (2023; with free decoder norms Anthropic, April 2024)."""
    jumprelu = "jumprelu"
    """A learned threshold a feature (Rajamanoharan et al. 2024b)."""
    gated = "gated"
    """A gate decides what fires, a second bias and scale how much (Rajamanoharan et al. 2024a)."""


TOPK_FAMILY = (Architecture.topk, Architecture.batchtopk, Architecture.matryoshka)
L1_FAMILY = (Architecture.relu, Architecture.gated)


class L1Unit(Enum):
    """How the source of an L1 coefficient normalises its loss; the trainer converts and prints."""

    canonical = "canonical"
    """Squared error summed over dimensions, L1 summed over features, both averaged over tokens."""
    mean_over_dims = "mean_over_dims"
    """Squared error averaged over dimensions: x d_in."""
    batch_sum = "batch_sum"
    """L1 summed over the batch: x batch_size."""
    fvu = "fvu"
    """Squared error divided by the variance of the inputs: x that variance."""


class AuxkUnit(Enum):
    """What the weight of AuxK is relative to; the trainer converts (`saerl_cli.sae.presets.auxk_weight`)."""

    relative = "relative"
    """Main and auxiliary squared error each divided by the variance of its target (Gao et al. 2024)."""
    residual = "residual"
    """The auxiliary one alone divided by that of the residual (dictionary_learning)."""
    plain = "plain"
    """Neither divided (SAELens)."""


class Controller(Enum):
    """How the weight of the sparsity penalty is chosen."""

    fixed = "fixed"
    """It stays what it is, after `l1_warmup`."""
    auto = "auto"
    """It is raised while L0 is above `target_l0` and lowered while it is below (2023 recipe)."""


class Penalty(Enum):
    """What a JumpReLU SAE pays for firing; all multiplied by `l0`."""

    step = "step"
    """Mean number of active features (Rajamanoharan et al. 2024b)."""
    tanh = "tanh"
    """Mean sum of tanh(tanh_scale f |W_dec|) (Anthropic, January 2025)."""
    target = "target"
    """(mean L0 / target_l0 - 1)^2."""
    quadratic = "quadratic"
    """Mean over tokens of (L0 / target_l0 - 1)^2."""


class Resample(Enum):
    """What features that are dead are re-initialised to."""

    none = "none"
    """They are left alone."""
    loss = "loss"
    """Inputs drawn in proportion to their squared loss (Bricken et al. 2023)."""
    random = "random"
    """Random directions, Kaiming-uniform (Nanda 2023; Newhouse and Bashkansky 2023)."""


class DecoderNorm(Enum):
    """What happens to the norms of decoder rows in training; saved rows always have norm 1."""

    free = "free"
    """They are learned; penalties and selection weigh by them."""
    unit = "unit"
    """Held at 1, the gradient along a row removed."""
    renormalised = "renormalised"
    """Divided by their norm after every step, the gradient left as it is."""


class InputScale(Enum):
    """The number that inputs are multiplied by, from the first batch; folded into the saved weights."""

    norm = "norm"
    """sqrt(d_in) / mean |x| (Anthropic, April 2024)."""
    rms = "rms"
    """1 / sqrt(mean |x|^2) (Gemma Scope; dictionary_learning)."""
    none = "none"
    """1."""


class Centre(Enum):
    """Where `b_dec` starts."""

    mean = "mean"
    """Mean of the first batch."""
    median = "median"
    """Geometric median of the first batch."""
    zeros = "zeros"
    """0."""
    off = "off"
    """0, and there it stays: the SAE has no b_dec."""


class Optimizer(Enum):
    """How parameters step."""

    adam = "adam"
    """Adam, fused."""
    signum = "signum"
    """Sign of the gradient under schedule-free momentum (sparsify's default)."""


class LrShape(Enum):
    """How the learning rate rises and falls."""

    linear = "linear"
    cosine = "cosine"


class EncoderDtype(Enum):
    """Precision of the encoder's matrix product; weights and optimiser stay float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Kernel(Enum):
    """How decoding and gradients are computed; the results are equal to rounding."""

    auto = "auto"
    """Sparse where few features fire, else dense: decided by every batch."""
    sparse = "sparse"
    dense = "dense"


@dataclass
class SaeConfig:
    """One sparse autoencoder; a run trains one at every site with these settings, or several (`sweep`)."""

    architecture: Architecture = Architecture.topk
    """Form of the autoencoder."""
    expansion: int | None = 8
    """Features per input dimension, >= 1; leave empty when d_sae is given."""
    d_sae: int | None = None
    """Number of features; leave empty when expansion is given."""
    tied: bool = False
    """The encoder is the decoder, transposed (relu with decoder_norm unit or renormalised)."""
    init_from: str | None = None
    """SAE folder or run directory to start from (any format that `saerl export` writes; `sae_lens:RELEASE/ID`)."""

    # what fires
    k: int = 16
    """Active features a token (topk), or on average (batchtopk, matryoshka), 1 <= k <= d_sae."""
    prefixes: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """Shares of the features that reconstruct on their own, rising to 1 (matryoshka)."""
    l1: float = 5.0
    """Weight of sum_i f_i |W_dec_i| against the squared error summed over dimensions, both averaged over tokens
    (relu, gated), on scaled inputs."""
    l1_unit: L1Unit = L1Unit.canonical
    """What `l1` is a multiple of, where it is quoted from elsewhere."""
    l0: float = 1.0
    """Weight of the penalty of a JumpReLU SAE."""
    l1_warmup: float = 0.05
    """Share of training, or steps where above 1, over which l1 or l0 rises linearly from 0."""
    controller: Controller = Controller.fixed
    """`auto` adapts l1 (relu, gated) or l0 (jumprelu with penalty step or tanh) to reach target_l0."""
    target_l0: float | None = None
    """Active features a token to reach (controller=auto; penalty target and quadratic)."""
    control_after_tokens: int = 0
    """Tokens before the controller acts for the first time."""
    control_every: int = 20
    """Steps between its decisions, each on the mean L0 since the last."""
    control_factor: float = 1.1
    """It multiplies the weight by this, or by 2 minus this, > 1 and < 2."""
    control_band: float = 1.0
    """It leaves the weight alone while L0 is that close to the target."""
    penalty: Penalty = Penalty.tanh
    """What firing costs (jumprelu)."""
    tanh_scale: float = 4.0
    """Inside the tanh (penalty=tanh)."""
    theta: float = 0.1
    """Threshold at the start (jumprelu), >= 0."""
    bandwidth: float = 2.0
    """Width of the window around the threshold whose pre-activations give it a gradient (jumprelu)."""
    ste_to_input: bool = True
    """That gradient reaches the pre-activation too (Anthropic, January 2025), not the threshold alone (jumprelu)."""

    # dead features
    dead_after_tokens: int = 200_000
    """A feature that has not fired for so many tokens is dead."""
    dead_below_rate: float = 0.0
    """So is one that fired on a smaller share of the tokens since the last resampling."""
    auxk: float = 0.0
    """Weight of reconstructing the error with dead features (topk, batchtopk, matryoshka); 1/32 in Gao et al. 2024."""
    auxk_unit: AuxkUnit = AuxkUnit.relative
    """What that weight is relative to."""
    auxk_relu: bool = False
    """Dead features enter it through a ReLU (Gao et al.'s code, dictionary_learning), and not as they are."""
    auxk_latents: int | None = None
    """Dead features a token used for that; d_in / 2 when empty."""
    preact: float = 0.0
    """Weight of mean sum over dead features of relu(theta - pre) |W_dec| (jumprelu); 3e-6 in Anthropic, 2025."""
    resample: Resample = Resample.loss
    """What dead features are re-initialised to."""
    resample_every_tokens: int = 250_000
    """How often; never in the last `lr_decay` share."""
    resample_until: float = 1.0
    """Share of training, or steps where above 1, after which there is none."""
    resample_norm: float = 0.2
    """Norm of a new encoder row relative to the mean of those alive (resample=loss)."""

    # start and inputs
    scale: InputScale = InputScale.norm
    """What inputs are multiplied by."""
    centre: Centre = Centre.mean
    """Where b_dec starts."""
    decoder_norm: DecoderNorm = DecoderNorm.free
    """Norms of decoder rows in training."""
    decoder_start: float | None = None
    """Norm of decoder and encoder rows at the start; 0.1 when free, else 1, when empty."""

    # optimiser
    tokens: int = 2_000_000
    """Training tokens a SAE sees."""
    batch_size: int = 2048
    """Tokens an optimiser step."""
    optimizer: Optimizer = Optimizer.adam
    """How parameters step."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_at_width: int | None = None
    """Number of features that `lr` is meant for; it is multiplied by sqrt(lr_at_width / d_sae) (Gao et al. 2024).
    Empty: `lr` as it is."""
    lr_warmup: float = 0.02
    """Share of training, or steps where above 1, with a rising learning rate."""
    lr_shape: LrShape = LrShape.linear
    """Shape of its rise and its fall."""
    lr_decay: float = 0.2
    """Share of training, or steps where above 1, at its end with a learning rate that falls to 0."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient; signum's momentum."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient."""
    eps: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float | None = 1.0
    """Gradient norm above which gradients are scaled down, > 0; empty leaves them alone."""
    encoder_dtype: EncoderDtype = EncoderDtype.float32
    """Precision of the encoder's matrix product."""
    kernel: Kernel = Kernel.auto
    """How decoding and gradients are computed."""
    seed: int = 0
    """Seed of the initial weights and of resampling."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_sparsity(self)
        _check_dead(self)
        _check_optimizer(self)

    def width(self, d_in: int) -> int:
        """Number of features for an input of `d_in` dimensions; `ValueError` when k exceeds it."""
        d_sae = self.d_sae or d_in * (self.expansion or 1)
        if self.architecture in TOPK_FAMILY:
            refuse_unless(self.k <= d_sae, f"sae.k={self.k} > d_sae={d_sae}")
        return d_sae

    def peak_lr(self, d_in: int) -> float:
        """`lr`, at the width that it has for an input of `d_in` dimensions."""
        return self.lr * (self.lr_at_width / self.width(d_in)) ** 0.5 if self.lr_at_width else self.lr

    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_size

    def in_steps(self, share: float) -> float:
        """A share of training, or a number of steps where above 1, in steps."""
        return share if share > 1 else share * self.steps()


def _check_sizes(c: SaeConfig) -> None:
    refuse_unless(
        (c.expansion is None) != (c.d_sae is None),
        "give either sae.expansion or sae.d_sae; empty the other, for instance sae.expansion=null sae.d_sae=4096",
    )
    refuse_unless((c.expansion or c.d_sae or 0) >= 1, "sae.expansion and sae.d_sae must be >= 1")
    refuse_unless(c.k >= 1, f"sae.k must be >= 1, got {c.k}")
    if c.architecture in TOPK_FAMILY and c.d_sae is not None:
        refuse_unless(c.k <= c.d_sae, f"sae.k={c.k} exceeds sae.d_sae={c.d_sae}")
    refuse_unless(c.batch_size >= 1, f"sae.batch_size must be >= 1, got {c.batch_size}")
    refuse_unless(
        c.tokens >= c.batch_size, f"sae.tokens={c.tokens} is less than one batch of sae.batch_size={c.batch_size}"
    )
    if c.architecture is Architecture.matryoshka:
        rising = all(a < b for a, b in zip(c.prefixes, c.prefixes[1:], strict=False))
        refuse_unless(
            bool(c.prefixes) and rising and c.prefixes[0] > 0 and c.prefixes[-1] == 1,
            f"sae.prefixes must rise from above 0 to 1, for instance [0.25,0.5,1], got {list(c.prefixes)}",
        )
    if c.tied:
        refuse_unless(
            c.architecture is Architecture.relu and c.decoder_norm is not DecoderNorm.free,
            "sae.tied belongs to sae.architecture=relu with sae.decoder_norm=unit or renormalised",
        )


def _check_sparsity(c: SaeConfig) -> None:
    for name in ("l1", "l0", "theta", "preact", "auxk", "control_band", "dead_below_rate"):
        refuse_unless(getattr(c, name) >= 0, f"sae.{name} must be >= 0, got {getattr(c, name)}")
    for name in ("bandwidth", "tanh_scale"):
        refuse_unless(getattr(c, name) > 0, f"sae.{name} must be > 0, got {getattr(c, name)}")
    jumprelu = c.architecture is Architecture.jumprelu
    aims = jumprelu and c.penalty in (Penalty.target, Penalty.quadratic)
    if c.controller is Controller.auto:
        refuse_unless(
            (c.architecture in L1_FAMILY or jumprelu) and not aims,
            "sae.controller=auto needs sae.architecture relu, gated, or jumprelu with sae.penalty step or tanh",
        )
    refuse_unless(
        c.target_l0 is None or c.target_l0 > 0, f"sae.target_l0 must be > 0 active features a token, got {c.target_l0}"
    )
    refuse_unless(
        (c.target_l0 is not None) == (aims or c.controller is Controller.auto),
        "sae.target_l0 goes with sae.controller=auto, or with jumprelu and sae.penalty=target or quadratic",
    )
    refuse_unless(1 < c.control_factor < 2, f"sae.control_factor must be in (1, 2), got {c.control_factor}")
    refuse_unless(
        c.control_every >= 1 and c.control_after_tokens >= 0,
        "sae.control_every must be >= 1 and sae.control_after_tokens >= 0",
    )


def _check_dead(c: SaeConfig) -> None:
    refuse_unless(
        c.dead_after_tokens >= 1 and c.resample_every_tokens >= 1,
        "sae.dead_after_tokens and sae.resample_every_tokens must be >= 1",
    )
    refuse_unless(c.resample_norm > 0, f"sae.resample_norm must be > 0, got {c.resample_norm}")
    refuse_unless(
        c.auxk == 0 or c.architecture in TOPK_FAMILY,
        f"sae.auxk belongs to topk, batchtopk and matryoshka, not to {c.architecture.value}; write sae.auxk=0",
    )
    refuse_unless(c.auxk_latents is None or c.auxk_latents >= 1, "sae.auxk_latents must be >= 1")
    refuse_unless(
        c.preact == 0 or c.architecture is Architecture.jumprelu,
        f"sae.preact belongs to jumprelu, not to {c.architecture.value}; write sae.preact=0",
    )


def _check_optimizer(c: SaeConfig) -> None:
    for name in ("lr", "eps"):
        refuse_unless(getattr(c, name) > 0, f"sae.{name} must be > 0, got {getattr(c, name)}")
    refuse_unless(c.decoder_start is None or c.decoder_start > 0, "sae.decoder_start must be > 0")
    refuse_unless(
        c.max_grad_norm is None or c.max_grad_norm > 0, f"sae.max_grad_norm must be > 0, got {c.max_grad_norm}"
    )
    for name in ("beta1", "beta2"):
        refuse_unless(0 <= getattr(c, name) < 1, f"sae.{name} must be in [0, 1), got {getattr(c, name)}")
    refuse_unless(c.lr_at_width is None or c.lr_at_width >= 1, "sae.lr_at_width must be >= 1")
    for name in ("l1_warmup", "lr_warmup", "lr_decay", "resample_until"):
        refuse_unless(
            getattr(c, name) >= 0, f"sae.{name} is a share in [0, 1] or a number of steps, got {getattr(c, name)}"
        )


NAMES = tuple(f.name for f in fields(SaeConfig))
"""The settings of an SAE, by name."""
