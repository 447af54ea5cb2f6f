"""What `saerl audit` refuses before any work."""

from pathlib import Path
from typing import TYPE_CHECKING

from saerl_cli.config.adapter import COEFFICIENTS
from saerl_cli.config.audit import AuditConfig
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.models import describe
from saerl_cli.rewards.check import check_reward
from saerl_cli.rl.chosen import chosen
from saerl_cli.rl.runs import policy_folder, run_config
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json

if TYPE_CHECKING:
    from torch import Tensor


def check(config: AuditConfig) -> None:
    """Refuse runs without coefficients, unfinished or failed ones, peers on other SAEs, unknown features.

    Raises:
        ValueError: one line saying what is wrong.
    """
    trained = coefficient_run(config.policy)
    deltas = deltas_of(config.policy, trained)
    if not has_moved(config.policy, trained):
        raise ValueError(f"all coefficients of {config.policy} are untouched: there is nothing to revert")
    chosen(config.features, "features", trained.adapter.saes, {site: len(values) for site, values in deltas.items()})
    for peer in config.peers:
        check_peer(peer, config.policy)
    describe(trained.model)
    check_reward(trained.reward)
    if config.launch.num_processes > 1:
        raise ValueError("saerl audit measures in one process; write launch=one")


def coefficient_run(path: str) -> RlhfConfig:
    """The settings of a finished run with coefficients.

    Raises:
        ValueError: it is none.
    """
    trained = run_config(path)
    if trained.adapter.kind not in COEFFICIENTS:
        raise ValueError(
            f"{path} trained adapter={trained.adapter.kind.value}, which has no coefficients of features to revert;"
            " give a run of adapter=sparse_coeffs or adapter=random_dictionary"
        )
    status = Run(path).status
    if status != "completed":
        raise ValueError(f"{path} is {status or 'not finished'}; repeat its command to finish it, then audit it")
    return trained


def deltas_of(path: str, trained: RlhfConfig) -> "dict[str, Tensor]":
    """Site -> delta, of a run whose SAEs are where they were; `ValueError` otherwise."""
    from saerl_cli.adapter.files import check_adapter, read_deltas

    folder = policy_folder(path, trained)
    check_adapter(folder)
    return read_deltas(folder)


def has_moved(path: str, trained: RlhfConfig) -> bool:
    """Whether any coefficient, or shift, is not untouched."""
    from saerl_cli.adapter.files import read_adapter

    _, state = read_adapter(policy_folder(path, trained))
    return any(bool((values != 0).any()) for values in state.values())


def check_peer(peer: str, policy: str) -> None:
    """Refuse a peer without coefficients, or on other SAEs than the policy."""
    trained = coefficient_run(peer)
    if Path(peer).resolve() == Path(policy).resolve():
        raise ValueError(f"peers: {peer} is the policy itself; give runs of other seeds")
    deltas_of(peer, trained)
    if bound_saes(peer, trained) != bound_saes(policy, run_config(policy)):
        raise ValueError(
            f"peers: {peer} was trained on other SAEs than {policy}, so their features are not the same; leave it out"
        )


def bound_saes(path: str, trained: RlhfConfig) -> dict[str, str]:
    """Module path -> hash of the SAE, by which an adapter knows it."""
    return read_json(policy_folder(path, trained) / "adapter_config.json")["sae_sha256"]
