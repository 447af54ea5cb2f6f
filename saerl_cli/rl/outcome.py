"""Whether a run did what it was to do: a KL target met, a loss moved by training and not by inserting the splice."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from saerl_cli.config.algo import AlgoKind
from saerl_cli.rl.evaluation import behaviour
from saerl_cli.run.files import read_jsonl

if TYPE_CHECKING:
    from saerl_cli.rl.build import RlhfSetup
    from saerl_cli.rl.policy import Policy
    from saerl_cli.rl.training.base import PhasedTrainer

NO_GRADIENT = 1e-7
"""A gradient whose norm stays below this moves nothing."""
NO_MOVE = 1e-3
"""Share of the loss, by which it must have moved to count as learned."""
TOLERANCE = 0.15
"""A KL within this share of its target, or two standard errors, meets it."""


def insertion(setup: "RlhfSetup", trainer: "PhasedTrainer") -> dict[str, float]:
    """Loss on held-out examples of the bare model, and with the untouched adapter inserted; nats per token."""
    from saerl_cli.rl.training.examples import example_loss

    assert setup.examples is not None
    model = trainer.accelerator.unwrap_model(trainer.model)
    training = model.training
    model.eval()
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        base = example_loss(model, setup.examples.heldout)
    inserted = example_loss(model, setup.examples.heldout)
    model.train(training)
    return {"loss_base": base, "loss_inserted": inserted}


def task_numbers(setup: "RlhfSetup", policy: "Policy", numbers: dict[str, Any]) -> dict[str, Any]:
    """What the algorithm itself was after: loss before and after (sft), preferences (dpo), the KL asked for."""
    from saerl_cli.rl.training.examples import example_loss, preferences

    algo = setup.config.algo
    if algo.kind is AlgoKind.sft and setup.examples is not None:
        losses = dict(setup.run.record["insertion"])
        trained = example_loss(policy.model, setup.examples.heldout)
        return {
            **losses,
            "loss_trained": trained,
            "insertion_effect": losses["loss_inserted"] - losses["loss_base"],
            "training_effect": trained - losses["loss_inserted"],
        }
    if algo.kind is AlgoKind.dpo and setup.examples is not None:
        return preferences(policy.model, policy.reference_model, setup.examples.heldout)
    if algo.kl_target is not None:
        slack = max(TOLERANCE * algo.kl_target, 2 * numbers["kl_exact_se"])
        met = abs(numbers["kl_exact"] - algo.kl_target) <= slack
        return {"kl_target": algo.kl_target, "kl_target_met": met}
    return {}


def warnings_of(setup: "RlhfSetup", numbers: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    rows = read_jsonl(setup.run.path / "metrics.jsonl")
    largest = max((row["grad_norm"] for row in rows), default=1.0)
    found = [no_gradient(largest)] if largest < NO_GRADIENT else []
    if "loss_trained" in numbers:
        found += [insertion_warning(numbers), movement_warning(setup, numbers)]
    if numbers.get("kl_target_met") is False:
        found.append(target_warning(numbers, rows))
    return [*behaviour.warnings_of(numbers), *(warning for warning in found if warning)]


def unreachable(target: float, scores: list[float]) -> str:
    """A target beyond the policy that always scores best, whose KL is -log of how often the reference does.

    Said only where several samples share the best score: else the share is that of one sample in many.
    """
    share = sum(score == max(scores) for score in scores) / len(scores)
    if share * len(scores) < 5 or target <= -math.log(share):
        return ""
    return (
        f"algo.kl_target={target:g} is more than the best reward costs: the untouched model has it in {share:.0%} of"
        f" completions, so about {-math.log(share):.2f} nats would do, and beyond them nothing pulls the policy on"
    )


def no_gradient(norm: float) -> str:
    """A gradient that moves nothing."""
    return (
        f"the gradient of the trained parameters has norm {norm:.1e}: nothing is learned; do the SAE's features fire"
        " on this text, and does the reward tell completions apart?"
    )


def insertion_warning(losses: dict[str, Any]) -> str:
    """Inserting an untouched splice cannot teach the model anything: a better loss says that it is off-distribution."""
    base, inserted = losses["loss_base"], losses["loss_inserted"]
    if inserted >= base - NO_MOVE * base:
        return ""
    return (
        f"inserting the untouched splice alone improves the loss, {base:.3f} -> {inserted:.3f}: the text is far from"
        " what the model knows, or the SAE belongs to another model; this is no effect of training"
    )


def movement_warning(setup: "RlhfSetup", numbers: dict[str, Any]) -> str:
    """A loss that training has not moved."""
    inserted, trained = numbers["loss_inserted"], numbers["loss_trained"]
    steps = setup.config.algo.phases * setup.config.algo.steps_per_phase
    if abs(trained - inserted) > NO_MOVE * inserted:
        return ""
    return f"the loss has not moved in {steps} steps: {inserted:.4f} before, {trained:.4f} after; raise adapter.lr"


def target_warning(numbers: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A KL target that was not met, and what to do."""
    kl, target, coef = numbers["kl_exact"], numbers["kl_target"], rows[-1]["kl_coef"] if rows else float("nan")
    low = "the policy stops straying before that; raise adapter.lr or algo.phases, or ask for less"
    high = "raise algo.phases, lower adapter.lr, or ask for more"
    return (
        f"algo.kl_target={target:g} was not met: the KL at the end is {kl:.3f} nats (se {numbers['kl_exact_se']:.3f})"
        f" with beta at {coef:.2g}; {low if kl < target else high}"
    )


def objective(numbers: Mapping[str, Any], kl_limit: float | None) -> float:
    """What a sweeper maximises: the reward after training, under a limit on the KL.

        kl_exact <= kl_limit    reward_after
        otherwise               min(reward_before, reward_after) - (kl_exact - kl_limit)

    The untouched model has KL 0 and reward_before: a run over the limit counts as worse than doing nothing, by its
    excess in nats, so that a search is led back. Both are estimates from `evaluation.samples` completions.
    """
    if kl_limit is None or numbers["kl_exact"] <= kl_limit:
        return numbers["reward_after"]
    return min(numbers["reward_before"], numbers["reward_after"]) - (numbers["kl_exact"] - kl_limit)
