"""A command with a job that counts, for tests of everything around a job: `python tests/stub_command.py WORDS`."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import LaunchConfig, SiteConfig, refuse_unless
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, write_json, write_safetensors
from saerl_cli.run.jobs import JOBS, Job
from saerl_cli.run.progress import progress


class End(Enum):
    good = "good"
    value_error = "value_error"
    bug = "bug"
    kill = "kill"
    hang = "hang"
    not_finite = "not_finite"


@dataclass
class StubConfig:
    steps: int = 4
    end: End = End.good
    rank: int = 0
    """The rank that ends so."""
    at: int = 2
    """The step at which it ends so, unless it has resumed."""
    step_seconds: float = 0.0
    site: SiteConfig = field(default_factory=SiteConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_unless(self.steps >= 1, "steps must be >= 1")


def check(config: StubConfig) -> None:
    if "SAERL_TEST_HANG_CHECK" in os.environ:
        Path(os.environ["SAERL_TEST_HANG_CHECK"]).touch()
        time.sleep(600)
    refuse_unless(config.seed != 13, "seed=13 is unlucky; write seed=14")


def work(config: StubConfig, run: Run, accelerator: Any = None) -> float:
    """Sum rank + 1 over ranks and steps, and walk at random, with a checkpoint after every step."""
    if accelerator is None:
        return work_here(config, run)
    import torch
    from safetensors.torch import load_file

    latest = run.latest_checkpoint()
    start, total = (latest[0], read_json(latest[1] / "total.json")) if latest else (0, 0.0)
    walk = load_file(latest[1] / "walk.safetensors")["walk"] if latest else torch.zeros(100)
    run.truncate(start)
    for step in progress(range(start, config.steps), "counting"):
        if step == config.at and start == 0 and accelerator.process_index == config.rank:
            misbehave(config.end, run)
        time.sleep(config.step_seconds)
        share = torch.tensor(accelerator.process_index + 1.0)
        total += accelerator.reduce(share, "sum").item()
        walk = 0.9 * walk + torch.randn(100, generator=torch.Generator().manual_seed(config.seed + 1000 * step))
        run.log(step + 1, total=total)
        if accelerator.is_main_process:
            with run.save_checkpoint(step + 1) as folder:
                write_json(folder / "total.json", total)
                write_safetensors(folder / "walk.safetensors", {"walk": walk})
    if accelerator.is_main_process:
        write_safetensors(run.path / "walk.safetensors", {"walk": walk})
    where = {"world": accelerator.num_processes, "threads": torch.get_num_threads()}
    run.summary({"total": total, **where, "precision": accelerator.mixed_precision})
    return total - config.seed


def misbehave(end: End, run: Run) -> None:
    if end is End.value_error:
        raise ValueError("the data are\nused up")
    if end is End.bug:
        raise KeyError("oops")
    if end is End.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if end is End.hang:
        time.sleep(600)
    if end is End.not_finite:
        run.log(3, loss=float("nan"))


def work_here(config: StubConfig, run: Run) -> float:
    """Work without worker processes, as the demo's."""
    here = f"steps={config.steps}"
    if config.end is End.hang or os.environ.get("SAERL_TEST_HANG") == here:
        time.sleep(600)
    if os.environ.get("SAERL_TEST_FAIL") == here:
        raise ValueError("no luck")
    run.summary({"steps": config.steps})
    return float(config.steps)


def add_jobs() -> None:
    """Make the stub a job, with workers and without."""
    for name in ("stub", "stub_here"):
        JOBS[name] = Job("stub_command:StubConfig", "stub_command", launches=name == "stub")


def register() -> None:
    """Make the stub a command with a root config of its own, kept in Hydra's store instead of a file."""
    from hydra.core.config_store import ConfigStore

    add_jobs()
    for name in ("stub", "stub_here"):
        groups = [f"{name}_schema", "run_dirs", {"site": "mlp_out"}, {"launch": "one"}, "_self_"]
        root = {"defaults": [*groups, {"override hydra/job_logging": "disabled"}], "hydra": {"job": {"name": name}}}
        ConfigStore.instance().store(name=name, node=root)


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here / "site"), os.environ.get("PYTHONPATH", "")])
    from saerl_cli.run import bridge

    register()
    bridge.run(sys.argv[1], sys.argv[2:])
