"""The settings of vectors at the outputs of modules."""

from dataclasses import dataclass, field
from typing import Any

from saerl_cli.adapter.tuner import SiteConfig

PEFT_TYPE: Any = "ACTIVATION_VECTOR"  # as for SPARSE_COEFFS
KINDS = ("shift", "scale")


@dataclass
class VectorConfig(SiteConfig):
    """Configuration of `VectorModel`.

    Args:
        target_modules, exclude_modules, modules_to_save: as in `SiteConfig`; all keys of `widths` are adapted when left
            out.
        widths: path of a module -> size of its output.
        kind: `shift` or `scale` (formulas: `saerl_cli.adapter.activation_vector.layer`).
    """

    widths: dict[str, int] | None = field(default=None)
    kind: str = field(default="shift")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; there are {', '.join(KINDS)}")
        if self.target_modules is None and self.widths:
            self.target_modules = sorted(self.widths)
