"""What ppo, grpo and rloo learn by: completions of their own, scored and learned from in epochs."""

from saerl_cli.config.algo import LOGITS_HELD as LOGITS
from saerl_cli.plan.policy import (
    PHASE,
    TRAINER_STEP,
    Learning,
    Policy,
    activation_bytes,
    distributions,
    forward_bytes,
    generating,
    generation_bytes,
    scaled,
)
from saerl_cli.plan.work import SIZE, Phase, Piece, Work, adam, copied, forward, fused, fused_bytes, score, small

EXACT_ROWS = 16
"""Completions of a phase whose exact KL is computed (`saerl_cli.rl.training.phase`)."""
KEPT = 3
"""Vectors of the frozen part that a rollout keeps for each token."""


def learning(policy: Policy, grading: Work) -> Learning:
    """The phases of training.

    Args:
        policy: what is trained.
        grading: scoring a phase's completions.
    """
    algo = policy.algo
    recorded = {"kept of rollouts": rollout_bytes(policy)}
    writing = [*generating(policy, policy.rows, policy.new, policy.written), *grading]
    update = recorded | activation_bytes(policy, policy.micro * policy.seq)
    passes = recorded | {"forward pass": forward_bytes(policy, policy.micro)}
    scoring = Phase("scoring", algo.phases, scored(policy), passes)
    scoring.on_cpu, scoring.on_gpu = head_bytes(policy, "none")
    updates = Phase("updates", algo.phases * algo.steps_per_phase, updated(policy), update)
    updates.on_cpu, updates.on_gpu = head_bytes(policy, policy.grad)
    generation = Phase("generation", algo.phases, writing, generation_bytes(policy, policy.rows))
    return Learning(phases=[generation, scoring, updates])


def head(policy: Policy, grad: str, outputs: str = "entropy") -> Piece:
    """Log-probabilities of a micro-batch: of its completions where the head is frozen, else of every position."""
    if policy.full:
        return fused(policy.shape, policy.micro * (policy.seq - 1), policy.computes, grad, outputs)
    return score(policy.shape, policy.micro * policy.written, policy.computes, grad)


def scored(policy: Policy) -> Work:
    """The two scoring passes of a phase, and the exact KL of some completions."""
    shape, dtype = policy.shape, policy.computes
    batches = policy.rows / policy.micro
    first: Work = [(1, forward(shape, shape.layers, policy.micro, policy.seq, dtype))]
    first += [(1, sae.piece(policy.micro * policy.seq, "encode")) for sae in policy.saes]
    again: Work = [(1, forward(shape, policy.above, policy.micro, policy.seq, dtype))]
    heads: Work = [(1, head(policy, "none")), (1, head(policy, "none", ""))]
    rows = policy.rows if policy.algo.kl_target else min(EXACT_ROWS, policy.rows)
    exact = distributions(policy, rows, policy.above, "encode") + distributions(policy, rows, policy.above, None)
    work = scaled([*first, *again, *heads], batches)
    if policy.critic > shape.width + 1:  # a model of its own
        work.append((batches, forward(shape, shape.layers, policy.micro, policy.seq, dtype)))
    return [*work, *exact, small(PHASE)]


def updated(policy: Policy) -> Work:
    """An optimiser step: its micro-batches, the gradient's norm, Adam."""
    shape, dtype, algo = policy.shape, policy.computes, policy.algo
    batches = policy.config.rows_of_a_step / policy.micro
    tokens = policy.micro * policy.seq
    grad = policy.grad
    work: Work = [(1, forward(shape, policy.above, policy.micro, policy.seq, dtype, grad))]
    if algo.activation_checkpointing:
        work.append((1, forward(shape, policy.above, policy.micro, policy.seq, dtype)))
    work.append((1, head(policy, grad)))
    if policy.full:
        work.append(copied(4 * shape.embedding))  # the embedding's gradient is dense
    for number, sae in enumerate(policy.saes):  # from the lowest up
        known = number == 0 and algo.prefix_cache
        work.append((1, sae.piece(tokens, "known" if known else "back")))
    if policy.critic > shape.width + 1:
        work.append((1, forward(shape, shape.layers, policy.micro, policy.seq, dtype, "weights")))
    numbers = policy.trained + policy.critic
    return [*scaled(work, batches), (1, adam(numbers)), small(TRAINER_STEP + 3000 * (batches - 1))]


# --- memory ---------------------------------------------------------------------------------------------------------


def rollout_bytes(policy: Policy) -> float:
    """What is kept of the frozen part, from the first scoring pass to the end of the phase."""
    if not policy.algo.prefix_cache or not policy.lowest and not policy.saes:
        return 0.0
    vectors = KEPT * policy.shape.width * SIZE[policy.computes]
    codes = sum(8 * sae.k for sae in policy.saes if sae.layer == policy.lowest)
    return 2.0 * policy.rows * policy.seq * (vectors + codes)  # in TRL's buffer, and shuffled


def head_bytes(policy: Policy, grad: str) -> tuple[dict[str, float], dict[str, float]]:
    """What the head holds of logits, on a CPU and on a GPU."""
    if policy.full:
        cpu, gpu = fused_bytes(policy.shape, policy.micro * (policy.seq - 1), policy.computes, grad)
    else:
        vocabulary = policy.shape.vocabulary
        tile = min(policy.micro * policy.written * vocabulary, max(16 * vocabulary, LOGITS))
        cpu = gpu = 4.0 * 4 * tile
    return {"logits": cpu}, {"logits": gpu}
