"""Settings of one sparse autoencoder: its form, its sparsity, its dead features, its optimiser.

A preset is an option of the config group `sae` (`conf/sae/*.yaml`).
"""

from dataclasses import dataclass, fields
from enum import Enum

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.settings import applies, check_settings, setting


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
PENALISED = (*L1_FAMILY, Architecture.jumprelu)
"""The architectures that pay for firing, and find what fires without sorting."""


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


RESAMPLING = (Resample.loss, Resample.random)


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
    expansion: int | None = setting(8, ">= 1")
    """Features per input dimension; leave empty when d_sae is given."""
    d_sae: int | None = setting(None, ">= 1")
    """Number of features; leave empty when expansion is given."""
    tied: bool = setting(
        False, architecture=Architecture.relu, decoder_norm=(DecoderNorm.unit, DecoderNorm.renormalised)
    )
    """The encoder is the decoder, transposed."""
    init_from: str | None = None
    """SAE folder or run directory to start from (any format that `saerl export` writes; `sae_lens:RELEASE/ID`)."""

    # what fires
    k: int = setting(16, ">= 1", architecture=TOPK_FAMILY)
    """Active features a token (topk), or on average (batchtopk, matryoshka), at most d_sae."""
    prefixes: list[float] = setting(lambda: [0.0625, 0.125, 0.25, 0.5, 1.0], architecture=Architecture.matryoshka)
    """Shares of the features that reconstruct on their own, rising to 1."""
    l1: float = setting(5.0, ">= 0", architecture=L1_FAMILY)
    """Weight of sum_i f_i |W_dec_i| against the squared error summed over dimensions, both averaged over tokens, on
    scaled inputs."""
    l1_unit: L1Unit = setting(L1Unit.canonical, architecture=L1_FAMILY)
    """What `l1` is a multiple of, where it is quoted from elsewhere."""
    l0: float = setting(1.0, ">= 0", architecture=Architecture.jumprelu)
    """Weight of the penalty."""
    l1_warmup: float = setting(0.05, ">= 0", architecture=PENALISED)
    """Share of training, or steps where above 1, over which l1 or l0 rises linearly from 0."""
    controller: Controller = setting(
        Controller.fixed,
        only=(
            {"architecture": L1_FAMILY},
            {"architecture": Architecture.jumprelu, "penalty": (Penalty.step, Penalty.tanh)},
        ),
    )
    """`auto` adapts l1 or l0 to reach target_l0."""
    target_l0: float | None = setting(
        None,
        "> 0",
        only=({"controller": Controller.auto}, {"penalty": (Penalty.target, Penalty.quadratic)}),
        write="NUMBER",
    )
    """Active features a token to reach."""
    control_after_tokens: int = setting(0, ">= 0", controller=Controller.auto)
    """Tokens before the controller acts for the first time."""
    control_every: int = setting(20, ">= 1", controller=Controller.auto)
    """Steps between its decisions, each on the mean L0 since the last."""
    control_factor: float = setting(1.1, "in (1, 2)", controller=Controller.auto)
    """It multiplies the weight by this, or by 2 minus this."""
    control_band: float = setting(1.0, ">= 0", controller=Controller.auto)
    """It leaves the weight alone while L0 is that close to the target."""
    penalty: Penalty = setting(Penalty.tanh, architecture=Architecture.jumprelu)
    """What firing costs."""
    tanh_scale: float = setting(4.0, "> 0", penalty=Penalty.tanh)
    """Inside the tanh."""
    theta: float = setting(0.1, ">= 0", architecture=Architecture.jumprelu)
    """Threshold at the start."""
    bandwidth: float = setting(2.0, "> 0", architecture=Architecture.jumprelu)
    """Width of the window around the threshold whose pre-activations give it a gradient."""
    ste_to_input: bool = setting(True, architecture=Architecture.jumprelu)
    """That gradient reaches the pre-activation too (Anthropic, January 2025), not the threshold alone."""

    # dead features
    dead_after_tokens: int = setting(200_000, ">= 1")
    """A feature that has not fired for so many tokens is dead."""
    dead_below_rate: float = setting(0.0, ">= 0", resample=RESAMPLING)
    """So is one that fired on a smaller share of the tokens since the last resampling."""
    auxk: float = setting(0.0, ">= 0", architecture=TOPK_FAMILY)
    """Weight of reconstructing the error with dead features; 1/32 in Gao et al. 2024."""
    auxk_unit: AuxkUnit = setting(AuxkUnit.relative, auxk=True)
    """What that weight is relative to."""
    auxk_relu: bool = setting(False, auxk=True)
    """Dead features enter it through a ReLU (Gao et al.'s code, dictionary_learning), and not as they are."""
    auxk_latents: int | None = setting(None, ">= 1", auxk=True)
    """Dead features a token used for that; d_in / 2 when empty."""
    preact: float = setting(0.0, ">= 0", architecture=Architecture.jumprelu)
    """Weight of mean sum over dead features of relu(theta - pre) |W_dec|; 3e-6 in Anthropic, 2025."""
    resample: Resample = Resample.loss
    """What dead features are re-initialised to."""
    resample_every_tokens: int = setting(250_000, ">= 1", resample=RESAMPLING)
    """How often; never in the last `lr_decay` share."""
    resample_until: float = setting(1.0, ">= 0", resample=RESAMPLING)
    """Share of training, or steps where above 1, after which there is none."""
    resample_norm: float = setting(0.2, "> 0", resample=Resample.loss)
    """Norm of a new encoder row relative to the mean of those alive."""

    # start and inputs
    scale: InputScale = InputScale.norm
    """What inputs are multiplied by."""
    centre: Centre = Centre.mean
    """Where b_dec starts."""
    decoder_norm: DecoderNorm = DecoderNorm.free
    """Norms of decoder rows in training."""
    decoder_start: float | None = setting(None, "> 0")
    """Norm of decoder and encoder rows at the start; 0.1 when free, else 1, when empty."""

    # optimiser
    tokens: int = 2_000_000
    """Training tokens a SAE sees."""
    batch_size: int = setting(2048, ">= 1")
    """Tokens an optimiser step."""
    optimizer: Optimizer = Optimizer.adam
    """How parameters step."""
    lr: float = setting(1e-3, "> 0")
    """Peak learning rate."""
    lr_at_width: int | None = setting(None, ">= 1")
    """Number of features that `lr` is meant for; it is multiplied by sqrt(lr_at_width / d_sae) (Gao et al. 2024).
    Empty: `lr` as it is."""
    lr_warmup: float = setting(0.02, ">= 0")
    """Share of training, or steps where above 1, with a rising learning rate."""
    lr_shape: LrShape = LrShape.linear
    """Shape of its rise and its fall."""
    lr_decay: float = setting(0.2, ">= 0")
    """Share of training, or steps where above 1, at its end with a learning rate that falls to 0."""
    beta1: float = setting(0.9, "in [0, 1)")
    """Adam's decay of the mean gradient; signum's momentum."""
    beta2: float = setting(0.999, "in [0, 1)", optimizer=Optimizer.adam)
    """Adam's decay of the squared gradient."""
    eps: float = setting(1e-8, "> 0", optimizer=Optimizer.adam)
    """Adam's epsilon."""
    max_grad_norm: float | None = setting(1.0, "> 0")
    """Gradient norm above which gradients are scaled down; empty leaves them alone."""
    encoder_dtype: EncoderDtype = EncoderDtype.float32
    """Precision of the encoder's matrix product."""
    kernel: Kernel = setting(Kernel.auto, architecture=PENALISED)
    """How decoding and gradients are computed."""
    seed: int = 0
    """Seed of the initial weights and of resampling."""

    def __post_init__(self) -> None:
        check_settings(self, "sae")
        refuse_unless(
            (self.expansion is None) != (self.d_sae is None),
            "give either sae.expansion or sae.d_sae; empty the other, for instance sae.expansion=null sae.d_sae=4096",
        )
        if self.d_sae is not None:
            self.width(d_in=0)
        refuse_unless(
            self.tokens >= self.batch_size,
            f"sae.tokens={self.tokens} is less than one batch of sae.batch_size={self.batch_size}",
        )
        rising = all(a < b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False))
        refuse_unless(
            bool(self.prefixes) and rising and self.prefixes[0] > 0 and self.prefixes[-1] == 1,
            f"sae.prefixes must rise from above 0 to 1, for instance [0.25,0.5,1], got {list(self.prefixes)}",
        )

    def width(self, d_in: int) -> int:
        """Number of features for an input of `d_in` dimensions; `ValueError` when k exceeds it."""
        d_sae = self.d_sae or d_in * (self.expansion or 1)
        refuse_unless(not applies(self, "k") or self.k <= d_sae, f"sae.k={self.k} exceeds d_sae={d_sae}")
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


NAMES = tuple(f.name for f in fields(SaeConfig))
"""The settings of an SAE, by name."""
