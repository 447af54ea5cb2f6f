"""Finding the policy in a run directory of `saerl rlhf`, without importing torch."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf.errors import OmegaConfBaseException

from saerl_cli.config import typed
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_jsonl

if TYPE_CHECKING:
    from torch import Tensor


def run_config(run_path: Path | str) -> RlhfConfig:
    """The settings of a run of `saerl rlhf`.

    Raises:
        ValueError: it is no such run.
    """
    path = Path(run_path)
    file = path / ".hydra" / "config.yaml"
    if not file.is_file() or not (path / "run.json").is_file():
        raise ValueError(f"{path} is not a run directory: it has no run.json with a .hydra/config.yaml")
    job = Run(path).record.get("job")
    if job != "rlhf":
        raise ValueError(f"{path} is a run of `saerl {str(job).replace('_', '-')}`; give one of `saerl rlhf`")
    try:
        return typed(Run(path).settings, RlhfConfig)
    except OmegaConfBaseException as error:
        raise ValueError(f"{file} is not a config of `saerl rlhf`: {str(error).splitlines()[0]}") from None


def coefficient_run(run_path: Path | str) -> RlhfConfig:
    """The settings of a finished run with coefficients of SAE features.

    Raises:
        ValueError: it is no run of that kind, or has not finished.
    """
    config = run_config(run_path)
    if adapter_of(config.adapter).saes is None:
        raise ValueError(
            f"{run_path} trained adapter={config.adapter.kind}, which has no coefficients of features; give a run"
            " of `saerl rlhf --sparse-coeffs` or of adapter=random_dictionary"
        )
    run = Run(run_path)
    if run.status != "completed":
        status = run.status or "not finished"
        raise ValueError(f"{run_path} is {status}; finish it first: {run.record.get('command')}")
    return config


def deltas_of(run_path: Path | str, config: RlhfConfig) -> "dict[str, Tensor]":
    """Site -> delta of every feature of a run, [d_sae].

    Raises:
        ValueError: the run has not finished, or its SAEs are not what and where they were.
    """
    from saerl_cli.adapter.files import check_adapter, read_deltas

    folder = policy_folder(run_path, config)
    check_adapter(folder)
    return read_deltas(folder)


def policy_folder(run_path: Path | str, config: RlhfConfig) -> Path:
    """The folder of the trained adapter or model.

    Raises:
        ValueError: the run has not finished.
    """
    folder = Path(run_path) / ("model" if adapter_of(config.adapter).whole_model else "adapter")
    if not folder.is_dir():
        raise ValueError(f"{run_path} has no {folder.name} folder: the run has not finished; run its command again")
    return folder


def snapshot_files(run_path: Path | str) -> list[tuple[int, Path]]:
    """Step and file of every policy kept along the way of a run, in order."""
    files = (Path(run_path) / "policies").glob("step-*.safetensors")
    return sorted((int(match[1]), file) for file in files if (match := re.fullmatch(r"step-(\d+)", file.stem)))


def kl_coef(run_path: Path | str) -> float | None:
    """The weight of the KL at the end of a run; None for algorithms without one."""
    lines = read_jsonl(Path(run_path) / "metrics.jsonl")
    return lines[-1].get("kl_coef") if lines else None
