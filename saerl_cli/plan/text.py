"""What reading a job's text costs."""

from glob import glob
from pathlib import Path

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind
from saerl_cli.plan.work import Work, piece

REVIEW_BYTES, PROMPT_BYTES = 1500.0, 2400.0
"""Memory of a review of the planted language as text, tokens and rows, and as a prompt (experiments/014-plan)."""
TEXT_BYTES, PLAIN_BYTES = 9.0, 1.0
"""Memory of a byte of text: documents, token ids as Python's and as rows (measured); and of text that is only read."""


def reading(data: DataConfig, model: ModelConfig, review: float, share: float = 1.0) -> tuple[Work, float, list[str]]:
    """Work, bytes held, and what was assumed; text that is not there yet, or on the Hub, counts nothing.

    Args:
        data: the text.
        model: whose language or tokenizer it is.
        review: bytes of a review of the planted language.
        share: of the documents that become tokens; others are only read.
    """
    if data.kind is DataKind.planted:
        planted = model.planted
        count = planted.documents + max(200, planted.documents // 10)
        count = min(count, data.max_documents or count) * share
        return [(count / 1000, piece("reviews", 0, 0, 15_000))], count * review, []
    files = [Path(name) for name in glob(data.path or "", recursive=True)] if data.kind is DataKind.text else []
    size = sum(file.stat().st_size for file in files)
    if not files:
        what = f"the data set {data.name}" if data.kind is DataKind.hub else f"the text {data.path}"
        return [], 0, [f"{what} was not looked at: reading it counts no time and no memory"]
    if data.stream:
        return [], 0, ["streamed text counts no time and no memory"]
    if data.max_documents is not None:
        size = min(size, data.max_documents * 2000)
    tokenizer = str(model.path) if model.kind is ModelKind.local else ""
    work: Work = [(size * share / 2**20, piece("tokenize", 0, 0, 100_000, tokenizer=tokenizer))]
    return work, size * (PLAIN_BYTES + share * (TEXT_BYTES - PLAIN_BYTES)), []
