"""Sparse probing of features (`saerl_cli.sae.probe`) before it runs."""

from pathlib import Path

from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig
from saerl_cli.plan.metrics import Reading
from saerl_cli.plan.work import Phase, Work, forward, piece
from saerl_cli.planted.language import ATTRIBUTES
from saerl_cli.sae.probe import SIZES, TRAIN_SHARE, read_labelled

PASSES = 2
"""Over the text for features, and as many for raw activations: which features differ, then those features."""
ITERATIONS, TIMED = 300, 10
"""Of L-BFGS on all columns, as many as it may make: on activations it does; and how many are timed."""
NEWTON_COPIES, LBFGS_COPIES = 4.0, 3.0
"""Float64 copies of the chosen columns, and of all, that fitting holds."""


def phases(config: EvalSaeConfig, data: DataConfig, model: ModelConfig, read: Reading) -> list[Phase]:
    """The probes of a labelled file, else of the planted language; none for other text.

    Raises:
        ValueError: a labelled file that cannot be read.
    """
    making: Work = []
    if config.probes is not None:
        labelled = read_labelled(Path(config.probes))
        examples = len(labelled)
        labels, tokens = len({label for _, label in labelled}), float(examples * read.length)
    elif data.kind is DataKind.planted:
        heldout = min(data.max_documents or model.planted.documents, model.planted.documents) * data.heldout
        making = [(heldout / 1000, piece("reviews", 0, 0, 15_000))]
        labels, examples, tokens = len(ATTRIBUTES), config.probe_tokens, float(config.probe_tokens)
    else:
        return []
    chunk = read.chunk * read.length
    sites = {sae.site: sae.d_in for sae in read.saes}
    one = forward(read.shape, read.layers, read.chunk, read.length, read.dtype)
    work: Work = [*making, (2 * PASSES * tokens / chunk, one)]
    work += [(PASSES * tokens / chunk, sae.measured(chunk, "encode")) for sae in read.saes]
    train = round(TRAIN_SHARE * examples)
    for size in SIZES:
        each = piece("newton", 0, 16 * labels * train * size, 2000, labels=labels, rows=train, columns=size)
        work.append((len(read.saes) + len(sites), each))
    for width in sites.values():
        numbers = {"labels": labels, "rows": train, "columns": width, "steps": TIMED}
        work.append((ITERATIONS / TIMED, piece("lbfgs", 5 * TIMED * labels * train * width, 0, 50 * TIMED, **numbers)))
    fitted = NEWTON_COPIES * labels * (max(SIZES) + 1)
    raw = sum(sites.values()) + LBFGS_COPIES * max(sites.values())
    return [Phase("probes", 1, work, {"features in float64": 8.0 * examples * (fitted + raw)})]
