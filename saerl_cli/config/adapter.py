"""What RLHF may change."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import refuse_unless


class AdapterKind(Enum):
    """What RLHF may change."""

    sparse_coeffs = "sparse_coeffs"
    full = "full"


class Splice(Enum):
    """How coefficients enter the forward pass (formulas: `saerl_cli.adapter.layer`)."""

    error_preserving = "error_preserving"
    reconstruct = "reconstruct"
    pre_activation = "pre_activation"


@dataclass
class AdapterConfig:
    """The trainable parameters of RLHF, beside the value head."""

    kind: AdapterKind = AdapterKind.full
    """`sparse_coeffs` or a baseline."""
    saes: str | None = None
    """Run directory of `saerl train-sae`, its `sae` folder, or any folder of SAE folders (sparse_coeffs)."""
    sites: list[str] | None = None
    """Use only these sites of the folder; all of them when empty."""
    splice: Splice = Splice.error_preserving
    """How coefficients enter the forward pass."""
    lr: float = 1e-4
    """Peak learning rate of AdamW for these parameters."""
    weight_decay: float = 0.0
    """Decoupled weight decay; of delta, hence towards the untouched model."""

    def __post_init__(self) -> None:
        refuse_unless(self.lr > 0, f"adapter.lr must be > 0, got {self.lr}")
        refuse_unless(self.weight_decay >= 0, f"adapter.weight_decay must be >= 0, got {self.weight_decay}")
        if self.kind is AdapterKind.full:
            refuse_unless(
                self.saes is None and self.sites is None,
                "adapter.saes and adapter.sites belong to adapter=sparse_coeffs (the flag --sparse-coeffs)",
            )
        if self.kind is AdapterKind.sparse_coeffs:
            refuse_unless(
                self.saes is not None,
                "adapter=sparse_coeffs needs adapter.saes=DIR, the run directory of `saerl train-sae` on this model",
            )
