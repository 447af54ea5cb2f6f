"""What each command runs, named by string so that nothing heavy is imported before it is needed."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """A command's settings, its checks before work, and its work."""

    schema: str
    """Dataclass of its settings, `module:name`."""
    check: str
    """`check(config) -> None`: raises `ValueError` for what cannot work, before anything is written."""
    work: str
    """`work(config, run, accelerator) -> float`, in every rank; `work(config, run)` when nothing is launched. The
    float is what a sweeper optimises."""
    launches: bool = True
    """Whether the work is done by worker processes."""


JOBS = {
    "demo": Job(
        "saerl_cli.config.demo:DemoConfig", "saerl_cli.jobs.demo:check", "saerl_cli.jobs.demo:work", launches=False
    ),
    "train_lm": Job(
        "saerl_cli.config.train_lm:TrainLmConfig", "saerl_cli.jobs.train_lm:check", "saerl_cli.jobs.train_lm:work"
    ),
    "train_sae": Job(
        "saerl_cli.config.train_sae:TrainSaeConfig", "saerl_cli.jobs.train_sae:check", "saerl_cli.jobs.train_sae:work"
    ),
    "eval_sae": Job(
        "saerl_cli.config.eval_sae:EvalSaeConfig", "saerl_cli.sae.evaluate:check", "saerl_cli.report.saes:work"
    ),
    "train_reward": Job(
        "saerl_cli.config.train_reward:TrainRewardConfig",
        "saerl_cli.jobs.train_reward:check",
        "saerl_cli.jobs.train_reward:work",
    ),
    "rlhf": Job("saerl_cli.config.rlhf:RlhfConfig", "saerl_cli.jobs.rlhf:check", "saerl_cli.jobs.rlhf:work"),
    "evaluate": Job(
        "saerl_cli.config.evaluate:EvaluateConfig",
        "saerl_cli.rl.evaluation.evaluate:check",
        "saerl_cli.report.frontier:work",
    ),
    "features": Job(
        "saerl_cli.config.features:FeaturesConfig",
        "saerl_cli.analysis.features_job:check",
        "saerl_cli.report.features:work",
        launches=False,
    ),
    "audit": Job(
        "saerl_cli.config.audit:AuditConfig", "saerl_cli.analysis.audit_check:check", "saerl_cli.report.audit:work"
    ),
    "compare": Job(
        "saerl_cli.config.compare:CompareConfig",
        "saerl_cli.report.compare:check",
        "saerl_cli.report.compare:work",
        launches=False,
    ),
}
"""By the name of the command's root config in `conf/`."""


def resolve(target: str) -> Any:
    """The object named `module:name`."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
