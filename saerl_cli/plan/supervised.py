"""What sft, dpo and rwr learn by: given sequences, pairs, or weighted completions of the untouched model."""

from math import ceil

from saerl_cli.config.adapter import Splice
from saerl_cli.config.algo import AlgoKind
from saerl_cli.plan.examples import Examples, documents_packed, examples_of_file, pairs
from saerl_cli.plan.policy import (
    TRAINER_STEP,
    Learning,
    Policy,
    activation_bytes,
    generating,
    generation_bytes,
    scaled,
)
from saerl_cli.plan.work import (
    MATRICES,
    Phase,
    Piece,
    Work,
    adam,
    copied,
    forward,
    fused,
    fused_bytes,
    logits,
    piece,
    small,
)

MEASURED_ROWS, AT_ONCE = 512, 16
"""Held-out sequences that are measured, and how many in a pass (`saerl_cli.rl.training.supervised`)."""
EXAMPLE_BYTES, READ_BYTES = 16.0, 120.0
"""Memory of a token among rows: its id and its label; and beside them while rows are made from lists (measured)."""
OUTPUTS = {AlgoKind.sft: "entropy,is_top1", AlgoKind.dpo: "entropy,mean_logits,is_top1"}
"""What TRL's head is asked for beside log-probabilities."""
WHOLE = 4.0
"""Matrices [sequences, tokens, vocabulary] that the weighted likelihood holds at once."""


def learning(policy: Policy, grading: Work) -> Learning:
    """The phases of training.

    Args:
        policy: what is trained.
        grading: scoring as many completions as a phase of an algorithm that writes some.

    Raises:
        ValueError: pairs or examples that cannot be read.
    """
    examples = examples_of(policy)
    policy.notes += examples.notes
    steps = policy.algo.phases * policy.algo.steps
    tokens = examples.mean * (examples.sequences + examples.heldout)
    holds = activation_bytes(policy, sequences(policy) * examples.longest)
    training = Phase("steps", steps, stepped(policy, examples), holds)
    training.on_cpu, training.on_gpu = head_bytes(policy, examples)
    return Learning(
        phases=[training],
        before=[drawing(policy, grading)] if policy.algo.kind is AlgoKind.rwr else [],
        after=[judged(policy, examples)] if policy.algo.kind is not AlgoKind.rwr else [],
        reading=examples.reading,
        read={"examples as lists": READ_BYTES * tokens},
        stays={"examples": EXAMPLE_BYTES * tokens},
    )


def examples_of(policy: Policy) -> Examples:
    """What the algorithm learns from."""
    config, algo, context = policy.config, policy.algo, policy.shape.context
    if algo.kind is AlgoKind.dpo:
        return pairs(algo.pairs, config.model, context, policy.micro)
    if algo.kind is AlgoKind.rwr:  # some completion of a batch is nearly always as long as it may be
        mean = policy.prompt + policy.written
        return Examples(algo.draws, 0, mean, policy.seq, policy.seq, [], [])
    if algo.examples is not None:
        return examples_of_file(config, context, policy.micro)
    return documents_packed(config, context)


def sequences(policy: Policy) -> int:
    """Sequences of a micro-batch: both sides of each pair (dpo)."""
    return policy.micro * (2 if policy.algo.kind is AlgoKind.dpo else 1)


# --- training -------------------------------------------------------------------------------------------------------


def stepped(policy: Policy, examples: Examples) -> Work:
    """An optimiser step: its micro-batches, the gradient's norm, Adam."""
    shape, dtype, rows, length = policy.shape, policy.computes, sequences(policy), round(examples.padded)
    batches = policy.config.rows_of_a_step / policy.micro
    below = shape.layers - policy.above  # which gradients do not reach
    work: Work = [(1, forward(shape, policy.above, rows, length, dtype, policy.grad))]
    work += [(1, forward(shape, below, rows, length, dtype))] if below else []
    if policy.algo.activation_checkpointing:
        work.append((1, forward(shape, policy.above, rows, length, dtype)))
    if policy.full:
        work.append(copied(4 * shape.embedding))  # the embedding's gradient is dense
    for number, sae in enumerate(policy.saes):  # from the lowest up
        work.append((1, sae.piece(rows * length, "back" if number else "first")))
    work.append((1, head(policy, length, policy.grad)))
    if policy.algo.kind is AlgoKind.dpo:  # the reference
        work += [(1, forward(shape, shape.layers, rows, length, dtype)), (1, head(policy, length, "none"))]
        if policy.adapter.splice is Splice.reconstruct:
            work += [(1, sae.piece(rows * length, "encode")) for sae in policy.saes]
    return [*scaled(work, batches), (1, adam(policy.trained)), small(TRAINER_STEP + 3000 * (batches - 1))]


def head(policy: Policy, length: int, grad: str) -> Piece:
    """The loss of a micro-batch: by TRL's head, or from whole distributions (rwr)."""
    shape, rows = policy.shape, sequences(policy)
    if policy.algo.kind is not AlgoKind.rwr:
        return fused(shape, rows * (length - 1), policy.computes, grad, OUTPUTS[policy.algo.kind])
    numbers = rows * length * shape.vocabulary
    sizes = {"width": shape.width, "vocabulary": shape.vocabulary, "rows": rows, "seq": length, "grad": grad}
    flops, moved = 2 * MATRICES[grad] * numbers * shape.width, 40 * numbers
    return piece("likelihood", flops, moved, 20, **sizes, dtype=policy.computes)


def head_bytes(policy: Policy, examples: Examples) -> tuple[dict[str, float], dict[str, float]]:
    """What the loss holds of logits, on a CPU and on a GPU."""
    tokens = sequences(policy) * examples.longest
    if policy.algo.kind is AlgoKind.rwr:
        cpu = gpu = WHOLE * 4 * tokens * policy.shape.vocabulary
    else:
        cpu, gpu = fused_bytes(policy.shape, tokens, policy.computes, policy.grad)
    return {"logits": cpu}, {"logits": gpu}


# --- before and after -----------------------------------------------------------------------------------------------


def drawing(policy: Policy, grading: Work) -> Phase:
    """The completions of the untouched model that rwr learns from; every process draws all."""
    rows, draws = policy.config.evaluation.batch_size, policy.algo.draws
    rows = min(rows, draws)
    one = generating(policy, rows, policy.new, policy.written, spliced=False)
    return Phase("drawing", 1, [*scaled(one, draws / rows), *scaled(grading, draws / policy.rows)],
                 generation_bytes(policy, rows))  # fmt: skip


def judged(policy: Policy, examples: Examples) -> Phase:
    """Held-out sequences: their loss (sft), or how policy and reference judge them (dpo).

    The loss is that without the adapter, with it untouched, and with it trained.
    """
    shape, sft = policy.shape, policy.algo.kind is AlgoKind.sft
    rows = min(examples.heldout, MEASURED_ROWS * (1 if sft else 2))
    batch = max(1, min(AT_ONCE, round(rows)))
    length = round(examples.padded)
    passes, spliced = (3, 2) if sft else (2, 1)
    work: Work = [
        (passes, forward(shape, shape.layers, batch, length, policy.dtype)),
        (passes, logits(shape, batch * length, policy.dtype)),
        *((spliced, sae.piece(batch * length, "encode")) for sae in policy.saes),
    ]
    holds = {"logits": 4.0 * 3 * batch * examples.longest * shape.vocabulary}
    return Phase("held-out examples", 1, scaled(work, ceil(rows / batch)), holds)
