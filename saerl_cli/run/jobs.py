"""What each command runs, named by rule so that nothing heavy is imported before it is needed."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """A command's settings, its checks before work, and its work."""

    schema: str
    """Dataclass of its settings, `module:name`."""
    module: str
    """Has `check` and `work`."""
    launches: bool = True
    """Whether the work is done by worker processes."""

    @property
    def check(self) -> str:
        """`check(config) -> None`: raises `ValueError` for what cannot work, before anything is written."""
        return f"{self.module}:check"

    @property
    def work(self) -> str:
        """`work(config, run, accelerator) -> float`, in every rank; `work(config, run)` when nothing is launched.

        The float is what a sweeper optimises.
        """
        return f"{self.module}:work"


COMMANDS = (
    *("demo", "train_lm", "train_sae", "eval_sae", "train_reward"),
    *("rlhf", "evaluate", "features", "audit", "compare"),
)
HERE = ("demo", "features", "compare")
"""Those that start no worker processes."""


def job_of(name: str) -> Job:
    """The job of a command: train_sae has `config.train_sae:TrainSaeConfig` and `jobs.train_sae`."""
    schema = f"saerl_cli.config.{name}:{name.title().replace('_', '')}Config"
    return Job(schema, f"saerl_cli.jobs.{name}", launches=name not in HERE)


JOBS = {name: job_of(name) for name in COMMANDS}
"""By the name of the command's root config in `conf/`."""


def resolve(target: str) -> Any:
    """The object named `module:name`."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
