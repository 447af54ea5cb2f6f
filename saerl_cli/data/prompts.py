"""Prompts: beginnings of documents, or questions with right answers. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from saerl_cli.config.algo import AlgoConfig
from saerl_cli.config.groups import ModelKind
from saerl_cli.config.rlhf import PromptConfig, PromptKind, RlhfConfig
from saerl_cli.data.documents import documents, iter_documents
from saerl_cli.data.rows import Row, column, read_rows
from saerl_cli.planted.documents import planted_questions
from saerl_cli.run.progress import say

PROMPT_COLUMNS = ("prompt", "question", "text")
"""Where a row's prompt is looked for, in this order."""


@dataclass(frozen=True)
class Prompt:
    """What a completion continues."""

    text: str
    input_ids: tuple[int, ...]
    """With the BOS token, where the tokenizer puts one in front."""
    answer: str | None = None
    """The right answer, where there is one."""


@dataclass(frozen=True)
class Question:
    """A prompt before it is tokenized, and its right answer."""

    prompt: str
    answer: str | None
    """None where the file has none."""


def choose_prompts(config: RlhfConfig, tokenizer: Any, context: int) -> tuple[list[Prompt], list[Prompt]]:
    """Choose training prompts and held-out prompts of a run.

    Args:
        config: `prompts` says which; `algo.max_new_tokens` are left free behind them.
        tokenizer: of the policy.
        context: tokens that the policy can read.

    Raises:
        ValueError: no data, or no prompt that fits.
    """
    prompts = config.prompts
    if prompts.kind is PromptKind.documents:
        train, heldout = (documents(config.data, config.model, split) for split in ("train", "heldout"))
        return build_prompts(train, heldout, tokenizer, prompts.tokens, prompts.count)

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    train, heldout = split_questions(config)
    longest = context - config.algo.max_new_tokens
    fit = fitting(train, encode, longest)
    if len(fit) < len(train):
        say(f"left out {len(train) - len(fit)} of {len(train)} prompts: longer than {longest} tokens")
    return fit[: prompts.count], fitting(heldout, encode, longest)


def check_prompts(config: RlhfConfig, encode: Callable[[str], list[int]] | None, context: int) -> None:
    """Refuse prompts that are too few, or too long together with their completions.

    Args:
        config: of the run.
        encode: text to token ids; None where it cannot be had without loading the model.
        context: tokens that the policy can read.

    Raises:
        ValueError: one line saying what to write instead.
    """
    prompts, new = config.prompts, config.algo.max_new_tokens
    if prompts.kind is not PromptKind.documents:
        if new >= context:
            raise ValueError(f"algo.max_new_tokens={new} fills the model's context of {context}; lower it")
        train, heldout = split_questions(config)
        if encode is not None:
            fitting(heldout, encode, context - new)
            refuse_too_few(len(fitting(train, encode, context - new)[: prompts.count]), config.algo, prompts)
        return
    if prompts.tokens + new > context:
        raise ValueError(
            f"prompts.tokens={prompts.tokens} + algo.max_new_tokens={new} = {prompts.tokens + new}"
            f" tokens exceed the model's context of {context}; lower one of them"
        )
    if encode is None:
        return
    train, heldout = (iter_documents(config.data, config.model, split) for split in ("train", "heldout"))
    needed = max(1, config.algo.prompts_per_phase)
    limit = needed if prompts.count is None else min(prompts.count, needed)
    refuse_too_few(len(cut_prompts(train, encode, prompts.tokens, limit)), config.algo, prompts)
    if not cut_prompts(heldout, encode, prompts.tokens, 1):
        raise ValueError(f"no held-out document has more than prompts.tokens={prompts.tokens} tokens; lower it")


def refuse_too_few(available: int, algo: AlgoConfig, prompts: PromptConfig) -> None:
    """Refuse fewer distinct prompts than an iteration takes."""
    tokens = prompts.tokens
    if available < algo.prompts_per_phase:
        found, more = f"there are {available} distinct prompts that fit", "lower algo.rollouts or give more prompts"
        if prompts.kind is PromptKind.documents:
            found = f"the data give {available} distinct prompts of {tokens} tokens"
            more = "lower algo.rollouts, raise prompts.tokens, or give more text"
        group = f" / algo.group={algo.group_size}" if algo.group_size > 1 else ""
        raise ValueError(f"{found}, but one phase takes algo.rollouts={algo.rollouts}{group}; {more}")
    if prompts.kind is PromptKind.documents and not available:
        raise ValueError(f"no document has more than prompts.tokens={tokens} tokens; lower it")


# --- beginnings of documents -----------------------------------------------------------------------------------------


def cut_prompts(
    documents: Iterable[str],
    encode: Callable[[str], list[int]],
    tokens: int,
    count: int | None = None,
    avoid: Iterable[tuple[int, ...]] = (),
) -> list[tuple[int, ...]]:
    """Cut the first `tokens` token ids of every document that has more, each sequence once, in order.

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


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the BOS token, where the tokenizer puts one in front of a text."""
    ids = tokenizer("")["input_ids"]
    return tuple(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else ()


def as_prompts(ids: Iterable[tuple[int, ...]], tokenizer: Any) -> list[Prompt]:
    """Decode token ids to prompts; two that read alike are one, because rewards see text."""
    lead = leading_tokens(tokenizer)
    by_text: dict[str, Prompt] = {}
    for row in ids:
        text = tokenizer.decode(row, skip_special_tokens=True)
        by_text.setdefault(text, Prompt(text, lead + row))
    return list(by_text.values())


def build_prompts(
    train: Iterable[str], heldout: Iterable[str], tokenizer: Any, tokens: int, count: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Cut training prompts and held-out ones; no prompt is in both, unless all held-out ones are among the others.

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


# --- questions with answers ------------------------------------------------------------------------------------------


def split_questions(config: RlhfConfig) -> tuple[list[Question], list[Question]]:
    """Read training and held-out questions, each prompt once and in one of the two."""
    prompts, planted = config.prompts, config.model.planted
    if prompts.kind is PromptKind.arithmetic:
        if config.model.kind is not ModelKind.planted:
            raise ValueError("prompts.kind=arithmetic belongs to model=planted; write prompts.kind=file prompts.path=…")
        train, heldout = (
            distinct(Question(*question) for question in planted_questions(planted, split))
            for split in ("train", "heldout")
        )
        seen = {question.prompt for question in train}
        unseen = [question for question in heldout if question.prompt not in seen]
        if not unseen:
            raise ValueError("the data hold no held-out prompt of prompts.kind=arithmetic; give more documents")
        return train, unseen
    found = distinct(file_questions(prompts.path or "", prompts.field, prompts.answer_field, prompts.template))
    first = len(found) - max(1, round(prompts.heldout * len(found)))
    if first < 1:
        raise ValueError(f"prompts.path={prompts.path} holds {len(found)} distinct prompts; give two or more")
    return found[:first], found[first:]


def file_questions(path: str, field: str | None, answer_field: str, template: str) -> Iterator[Question]:
    """Read the rows of a file; a row without the answer's column has no answer.

    Args:
        path: jsonl, json or parquet, or a glob.
        field: column of the prompt; when None, the first of `PROMPT_COLUMNS` that a row has.
        answer_field: column of the answer.
        template: the prompt's text stands for {prompt} in it.

    Raises:
        ValueError: a missing or malformed file, or a row without a prompt, named.
    """
    for row in read_rows(path, "prompts.path"):
        text = column(row, field or prompt_column(row), "write prompts.field=COLUMN")
        answer = row[1].get(answer_field)
        yield Question(template.replace("{prompt}", text), None if answer is None else str(answer))


def prompt_column(row: Row) -> str:
    """Find the column of a row that holds its prompt."""
    return next((name for name in PROMPT_COLUMNS if name in row[1]), PROMPT_COLUMNS[0])


def distinct(questions: Iterable[Question]) -> list[Question]:
    """Keep each prompt once: the first."""
    found: dict[str, Question] = {}
    for question in questions:
        if question.prompt.strip():
            found.setdefault(question.prompt, question)
    return list(found.values())


def fitting(questions: list[Question], encode: Callable[[str], list[int]], longest: int) -> list[Prompt]:
    """Tokenize the questions of at most `longest` tokens.

    Raises:
        ValueError: there is none.
    """
    encoded = ((question, tuple(encode(question.prompt))) for question in questions)
    prompts = [Prompt(q.prompt, ids, q.answer) for q, ids in encoded if 0 < len(ids) <= longest]
    if not prompts:
        raise ValueError(
            f"all {len(questions)} prompts are longer than {longest} tokens, the model's context less"
            " algo.max_new_tokens; lower that, or give shorter prompts"
        )
    return prompts
