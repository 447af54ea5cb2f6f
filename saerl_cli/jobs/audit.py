"""`saerl audit`: which features caused a policy's reward.

audit.json          everything (`saerl_cli.rl.results.Audit`); also copied to the policy's run directory
summary.json        the headline
variants.jsonl      rewards of every variant, so that an audit that was killed goes on
reverts.csv, attribution.csv, keep_only.csv    as `saerl_cli.report.audit` draws them
"""

import time
from pathlib import Path
from typing import Any

from saerl_cli.config.audit import AuditConfig
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.models import describe
from saerl_cli.rewards.score import check_reward
from saerl_cli.rl.adapters.selection import select
from saerl_cli.rl.results import Audit, write_audit
from saerl_cli.rl.runs import coefficient_run, deltas_of, policy_folder, run_config
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json
from saerl_cli.run.progress import say


def check(config: AuditConfig) -> None:
    """Refuse runs without coefficients, unfinished or failed ones, peers on other SAEs, unknown features.

    Raises:
        ValueError: one line saying what is wrong.
    """
    trained = coefficient_run(config.policy)
    deltas = deltas_of(config.policy, trained)
    if not has_moved(config.policy, trained):
        raise ValueError(f"all coefficients of {config.policy} are untouched: there is nothing to revert")
    select(config.features, "features", trained.adapter.saes, {site: len(values) for site, values in deltas.items()})
    for peer in config.peers:
        check_peer(peer, config.policy)
    describe(trained.model)
    check_reward(trained.reward)
    if config.launch.num_processes > 1:
        raise ValueError("saerl audit measures in one process; write launch=one")


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


# --- the work --------------------------------------------------------------------------------------------------------


def work(config: AuditConfig, run: Run, accelerator: Any) -> float:
    """Audit, write the files, print table and finding; returns the number of features behind 90 % of the gain."""
    from saerl_cli.analysis.audit.steps import audit, headline
    from saerl_cli.report.audit import finding, print_table, write_figures

    start = time.monotonic()
    found = audit(config, run, accelerator.device)
    run.update(inputs={**run.record.get("inputs", {}), "peers": config.peers})
    write_audit(run.path, found)
    leave_beside(Path(config.policy), found)
    write_figures(run.path, found)
    print_table(found)
    for line in finding(found):
        say(line)
    run.summary({**headline(found), "seconds": round(time.monotonic() - start, 1)})
    return float((found.needed["90"] or {"n": found.features["touched"]})["n"])


def leave_beside(policy: Path, found: Audit) -> None:
    """Copy audit.json into the policy's run directory, where its report looks; a folder of others may not allow it."""
    try:
        write_audit(policy, found)
    except OSError as error:
        say(f"WARNING: {policy} has no audit.json for its report: {error.strerror}")
