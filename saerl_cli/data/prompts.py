"""Prompts: the beginnings of documents, cut to one length in tokens, each text once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from saerl_cli.config.algo import AlgoConfig


@dataclass(frozen=True)
class Prompt:
    """What a completion continues."""

    text: str
    input_ids: tuple[int, ...]
    """With the BOS token, where the tokenizer puts one in front."""
    answer: str | None = None
    """The right answer, where there is one."""


def cut_prompts(
    documents: Iterable[str],
    encode: Callable[[str], list[int]],
    tokens: int,
    count: int | None = None,
    avoid: Iterable[tuple[int, ...]] = (),
) -> list[tuple[int, ...]]:
    """The first `tokens` token ids of every document that has more, each sequence once, in order.

    Args:
        documents: texts.
        encode: text to token ids, without special tokens.
        tokens: length of a prompt.
        count: stop when there are so many; all when None.
        avoid: sequences to leave out.
    """
    left_out, found = set(avoid), dict[tuple[int, ...], None]()
    for document in documents:
        if count is not None and len(found) >= count:
            break
        ids = tuple(encode(document)[: tokens + 1])
        if len(ids) > tokens and ids[:-1] not in left_out:
            found.setdefault(ids[:-1])
    return list(found)


def refuse_too_few(available: int, algo: AlgoConfig, tokens: int) -> None:
    """Refuse fewer distinct prompts than a phase takes."""
    if available < algo.prompts_per_phase:
        group = f" / algo.group={algo.group_size}" if algo.group_size > 1 else ""
        raise ValueError(
            f"the data give {available} distinct prompts of {tokens} tokens, but one phase takes"
            f" algo.rollouts={algo.rollouts}{group}; lower algo.rollouts, raise prompts.tokens, or give more text"
        )
    if not available:
        raise ValueError(f"no document has more than prompts.tokens={tokens} tokens; lower it")


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The BOS token, where the tokenizer puts one in front of a text."""
    ids = tokenizer("")["input_ids"]
    return tuple(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else ()


def as_prompts(ids: Iterable[tuple[int, ...]], tokenizer: Any) -> list[Prompt]:
    """Token ids as prompts; two that read alike are one, because rewards see text."""
    lead = leading_tokens(tokenizer)
    by_text: dict[str, Prompt] = {}
    for row in ids:
        text = tokenizer.decode(row, skip_special_tokens=True)
        by_text.setdefault(text, Prompt(text, lead + row))
    return list(by_text.values())


def build_prompts(
    train: Iterable[str], heldout: Iterable[str], tokenizer: Any, tokens: int, count: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out prompts; no prompt is in both, unless all held-out ones are among the others.

    Args:
        train: documents of the training part.
        heldout: documents of the held-out part.
        tokenizer: of the policy.
        tokens: length of a prompt, without BOS.
        count: training prompts, at most.

    Raises:
        ValueError: no held-out document is long enough.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    seen = cut_prompts(train, encode, tokens, count)
    documents = list(heldout)
    unseen = cut_prompts(documents, encode, tokens, avoid=seen) or cut_prompts(documents, encode, tokens)
    if not unseen:
        raise ValueError(f"no held-out document has more than prompts.tokens={tokens} tokens; lower it")
    return as_prompts(seen, tokenizer), as_prompts(unseen, tokenizer)
