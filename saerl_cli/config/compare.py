"""Settings of `saerl compare`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from saerl_cli.config.groups import refuse_unless

ACROSS = ("model", "reference", "prompts", "reward")
"""What a comparison may average over."""


@dataclass
class CompareConfig:
    """Many policies on one reward-KL frontier: methods at equal KL, with intervals over seeds."""

    runs: Any = MISSING
    """A run of `saerl evaluate`, a folder of them (a sweep), a glob, or a list of these. Of a folder that holds none,
    the finished runs of `saerl rlhf`: single points, as training measured its final policies."""
    kls: list[float] | None = None
    """KLs at which methods are compared, nats per completion; when empty a quarter, half and all of what every run
    reaches."""
    by: list[str] | None = None
    """Settings of the training runs that make a method, for instance by=[adapter.kind,adapter.lr]; when empty the kind
    of adapter and whatever differs between runs of one kind, but for seeds, processes and how they were measured. Runs
    of one method and seed that differ otherwise, for instance in algo.kl_coef, put their points on one frontier."""
    labels: dict[str, str] = field(default_factory=dict)
    """What to call methods: automatic name -> shown name."""
    across: list[str] = field(default_factory=list)
    """What may differ between runs beside the seed, of model, reference, prompts and reward: [model,prompts] averages
    over languages or SAEs. Runs that agree in these share a base and a limit; every method's mean is over all of them,
    and differences from the baseline are paired by them and the seed."""
    baseline: str | None = None
    """Name of the method whose gain counts as 100 %; that of adapter=full when empty and there is one."""

    def __post_init__(self) -> None:
        refuse_unless(
            bool(self.paths()) and all(isinstance(path, str) and path for path in self.paths()),
            f"runs must be a folder or a list of folders, for instance runs=[runs/a,runs/b], got {self.runs}",
        )
        refuse_unless(
            self.kls is None or (bool(self.kls) and min(self.kls) > 0),
            f"kls must be a list of KLs > 0 in nats, for instance kls=[0.5,1,2], got {self.kls}",
        )
        unknown = sorted(set(self.across) - set(ACROSS))
        refuse_unless(not unknown, f"across: {', '.join(unknown)} may not differ; choose of {', '.join(ACROSS)}")
        refuse_unless(self.by is None or bool(self.by), "by is empty; name settings, for instance by=[adapter.kind]")

    def paths(self) -> list[Any]:
        """`runs` as a list."""
        return list(self.runs) if isinstance(self.runs, list) else [self.runs]
