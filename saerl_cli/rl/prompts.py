"""Which prompts a run takes: beginnings of documents, or questions with right answers. Imports no torch."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from saerl_cli.activations import documents
from saerl_cli.config.algo import AlgoConfig
from saerl_cli.config.groups import DataKind, ModelConfig, ModelKind
from saerl_cli.config.reward import Match
from saerl_cli.config.rlhf import PromptConfig, PromptKind, RlhfConfig
from saerl_cli.data.prompts import Prompt, build_prompts, cut_prompts, refuse_too_few
from saerl_cli.data.questions import Question, arithmetic_questions, file_questions
from saerl_cli.models import context_size, light_tokenizer, locate
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rewards.patterns import last_number
from saerl_cli.run.progress import say


def choose_prompts(config: RlhfConfig, tokenizer: Any, context: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out prompts of a run.

    Args:
        config: `prompts` says which; `algo.max_new_tokens` are left free behind them.
        tokenizer: of the policy.
        context: tokens that the policy can read.

    Raises:
        ValueError: no data, or no prompt that fits.
    """
    if config.prompts.kind is PromptKind.documents:
        train, heldout = (documents(config.data, config.model, split) for split in ("train", "heldout"))
        return build_prompts(train, heldout, tokenizer, config.prompts.tokens, config.prompts.count)
    train, heldout = split_questions(config)
    longest = context - config.algo.max_new_tokens
    prompts = fitting(train, lambda text: tokenizer(text)["input_ids"], longest)
    if len(prompts) < len(train):
        say(f"left out {len(train) - len(prompts)} of {len(train)} prompts: longer than {longest} tokens")
    unseen = fitting(heldout, lambda text: tokenizer(text)["input_ids"], longest)
    return prompts[: config.prompts.count], unseen


def check_questions(config: RlhfConfig, encode: Callable[[str], list[int]] | None, context: int) -> int | None:
    """Refuse questions of which none fits.

    Args:
        config: whose prompts are not documents.
        encode: text to token ids; None where it cannot be had without loading the model.
        context: tokens that the policy can read.

    Returns:
        How many training prompts there are, at most one phase's; None when that is not known.
    """
    if config.algo.max_new_tokens >= context:
        raise ValueError(
            f"algo.max_new_tokens={config.algo.max_new_tokens} fills the model's context of {context}; lower it"
        )
    train, heldout = split_questions(config)
    if encode is None:
        return None
    longest = context - config.algo.max_new_tokens
    fitting(heldout, encode, longest)
    return len(fitting(train, encode, longest)[: config.prompts.count])


def check_prompts(config: RlhfConfig, description: Any) -> None:
    """Refuse prompts that are too few, or too long together with their completions."""
    if config.prompts.kind is not PromptKind.documents:
        available = check_questions(config, light_encoder(config.model), context_size(description))
        if available is not None:
            refuse_few_questions(available, config.algo)
        return
    asked, context = config.prompts.tokens + config.algo.max_new_tokens, context_size(description)
    if asked > context:
        raise ValueError(
            f"prompts.tokens={config.prompts.tokens} + algo.max_new_tokens={config.algo.max_new_tokens} = {asked}"
            f" tokens exceed the model's context of {context}; lower one of them"
        )
    encode = light_encoder(config.model)
    if encode is None:
        return
    texts = first_documents(config, "train")
    needed = max(1, config.algo.prompts_per_phase)
    limit = needed if config.prompts.count is None else min(config.prompts.count, needed)
    available = len(cut_prompts(texts, encode, config.prompts.tokens, limit))
    refuse_too_few(available, config.algo, config.prompts.tokens)
    if not cut_prompts(first_documents(config, "heldout"), encode, config.prompts.tokens, 1):
        raise ValueError(f"no held-out document has more than prompts.tokens={config.prompts.tokens} tokens; lower it")


def first_documents(config: RlhfConfig, split: str) -> Iterable[str]:
    """The texts of a split; those of the planted language are written only as far as they are read."""
    if config.data.kind is DataKind.planted and config.model.kind is ModelKind.planted:
        from saerl_cli.planted.cache import planted_documents

        reviews = planted_documents(config.model.planted, split)
        return (" ".join(review.words) for review in islice(reviews, config.data.max_documents))
    return documents(config.data, config.model, split)


def light_encoder(model: ModelConfig) -> Callable[[str], list[int]] | None:
    """Text to token ids without special tokens; None where only transformers can read the tokenizer."""
    if model.kind is ModelKind.planted:
        from saerl_cli.planted.language import VOCABULARY, split_words

        ids = {word: index for index, word in enumerate(VOCABULARY)}
        return lambda text: [ids.get(word, -1) for word in split_words(text)]
    tokenizer = light_tokenizer(locate(model))
    if tokenizer is None:
        return None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def refuse_few_questions(available: int, algo: AlgoConfig) -> None:
    """Refuse fewer distinct prompts than a phase takes."""
    if available < algo.prompts_per_phase:
        group = f" / algo.group={algo.group_size}" if algo.group_size > 1 else ""
        raise ValueError(
            f"there are {available} distinct prompts that fit, but one phase takes algo.rollouts={algo.rollouts}{group}"
            "; lower algo.rollouts or give more prompts"
        )


def split_questions(config: RlhfConfig) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, each prompt once and in one of the two."""
    prompts, planted = config.prompts, config.model.planted
    if prompts.kind is PromptKind.arithmetic:
        if config.model.kind is not ModelKind.planted:
            raise ValueError("prompts.kind=arithmetic belongs to model=planted; write prompts.kind=file prompts.path=…")
        train = distinct(arithmetic_questions(planted, "train"))
        seen = {question.prompt for question in train}
        unseen = [q for q in distinct(arithmetic_questions(planted, "heldout")) if q.prompt not in seen]
        return train, refuse_none(unseen, prompts)
    found = distinct(file_questions(prompts.path or "", prompts.field, prompts.answer_field, prompts.template))
    first = len(found) - max(1, round(prompts.heldout * len(found)))
    if first < 1:
        raise ValueError(f"prompts.path={prompts.path} holds {len(found)} distinct prompts; give two or more")
    return found[:first], found[first:]


def distinct(questions: Iterable[Question]) -> list[Question]:
    """The questions, each prompt once: the first."""
    found: dict[str, Question] = {}
    for question in questions:
        if question.prompt.strip():
            found.setdefault(question.prompt, question)
    return list(found.values())


def refuse_none(questions: list[Question], prompts: PromptConfig) -> list[Question]:
    """The questions; `ValueError` when there is none."""
    if not questions:
        raise ValueError(f"the data hold no held-out prompt of prompts.kind={prompts.kind.value}; give more documents")
    return questions


def fitting(questions: list[Question], encode: Callable[[str], list[int]], longest: int) -> list[Prompt]:
    """The questions of at most `longest` tokens as prompts.

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


def check_answers(config: RlhfConfig) -> None:
    """Refuse a verifier whose prompts have no answers.

    Raises:
        ValueError: naming the part, and the first prompt without a usable answer.
    """
    parts = config.reward.parts.items()
    needing = {name: part for name, part in parts if (answers := kind_of(part).answers) and answers(part)}
    if not needing:
        return
    name = next(iter(needing))
    if config.prompts.kind is PromptKind.documents:
        raise ValueError(
            f"reward.parts.{name} verifies answers, and documents have none; write prompts.kind=arithmetic, or"
            " prompts.kind=file prompts.path=FILE with answers"
        )
    numeric = any(part.match is Match.numeric for part in needing.values())
    for question in (q for questions in split_questions(config) for q in questions):
        if question.answer is None:
            problem = f"has no {config.prompts.answer_field!r}; write prompts.answer_field=COLUMN"
        elif numeric and last_number(question.answer) is None:
            problem = f"has the answer {question.answer[:40]!r}, which holds no number; write match=exact"
        else:
            continue
        raise ValueError(f"reward.parts.{name} verifies answers, but the prompt {question.prompt[:60]!r} {problem}")
