"""Settings of `saerl eval-sae`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saerl_cli.config.groups import LaunchConfig, refuse_unless
from saerl_cli.config.settings import check_settings, setting


@dataclass
class EvalSaeConfig:
    """Measure trained SAEs on held-out text: what they reconstruct, what features tell, what chance would give."""

    saes: Any = MISSING
    """Run directory of `saerl train-sae`, its sae folder, an SAE folder, a folder of these, or a list of folders."""
    model: dict[str, Any] = field(default_factory=dict)
    """The language model: a choice of model=…, or single settings that differ from the model of the SAEs' run."""
    data: dict[str, Any] = field(default_factory=dict)
    """The text whose held-out part is read: a choice of data=…, or single settings that differ from the run's."""
    eval_tokens: int = setting(50_000, ">= 1")
    """Held-out tokens for the metrics, at most what there is."""
    probes: str | None = None
    """A jsonl file of {"text": ..., "label": ...}: how well few features tell the labels; the planted language is
    probed for its own attributes when empty."""
    probe_tokens: int = setting(20_000, ">= 1", probes=False)
    """Tokens of the planted language that are probed; a labelled file is read whole."""
    controls: bool = False
    """Measure also what says nothing: SAEs trained on the model with shuffled weights, random directions, and every SAE
    at a wrong layer. This trains two SAEs for each."""
    control_tokens: int = setting(200_000, ">= 1", controls=True)
    """Training tokens of those on shuffled weights, and of their like on the real ones."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    seed: int = 0
    """Seed of the controls and of the order of labelled texts."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_unless(
            not (self.controls and self.launch.shards > 1),
            "controls=true shuffles the weights of a whole model; write launch.sharding=none, or leave controls out",
        )
        given = [self.saes] if isinstance(self.saes, str) else self.saes
        refuse_unless(
            isinstance(given, list) and bool(given) and all(isinstance(path, str) and path for path in given),
            f"saes must be a folder or a list of folders, for instance saes=[runs/a,runs/b], got {self.saes}",
        )

    def paths(self) -> list[str]:
        """`saes` as a list."""
        return [self.saes] if isinstance(self.saes, str) else list(self.saes)
