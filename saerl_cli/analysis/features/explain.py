"""Labels by a language model: it explains a feature from contexts, then must tell other contexts apart by that.

Explaining after Bills et al. (2023), detection scoring after Paulo et al. (2024). The model is behind any
OpenAI-compatible address, or a local Hugging Face folder. Nothing is sent anywhere unless `explain.endpoint` is set.
"""

import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from saerl_cli.config.features import ExplainConfig
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.run.progress import say

Ask = Callable[[str], str]
"""Question -> answer."""
Context = Sequence[tuple[str, float]]

EXPLAIN = """\
A feature of a language model fires on some tokens and not on others. In the texts below, the tokens on which it fires \
are between << and >>. Say in one short phrase what these tokens, or the text before them, have in common. Answer with \
the phrase alone.

{contexts}

The feature fires on:"""
DETECT = """\
A feature of a language model fires on: {explanation}

In which of the following texts does it fire somewhere? Answer with one digit for each text, in order, separated by \
spaces: 1 where it fires, 0 where it does not. Write nothing else.

{contexts}

Answer:"""


def explain_all(features: Sequence[dict[str, Any]], config: ExplainConfig, device: Any = None) -> None:
    """Give features an `explanation` {text, model, score, ...}; none where nothing is configured or nothing fires.

    Args:
        features: with `contexts`, `drawn` (others in which they fire) and `silent` (in which they do not).
        config: which model, how much.
        device: where a local model runs.

    Raises:
        ValueError: the model cannot be reached or loaded, or answers in another form.
    """
    if not config.on:
        return
    firing = [one for one in features if one["contexts"]][: config.features]
    say(f"explaining {len(firing)} features by {config.model}")
    ask = endpoint_asker(config) if config.endpoint is not None else local_asker(config, device)
    for one in firing:
        one["explanation"] = explain(one, ask, config)


def explain(one: dict[str, Any], ask: Ask, config: ExplainConfig) -> dict[str, Any]:
    """The explanation of a feature, and how well it tells contexts apart that it was not made from."""
    shown = one["contexts"][: config.shown]
    texts = "\n".join(f"{i}. {marked(context)}" for i, context in enumerate(shown, start=1))
    phrase = first_phrase(ask(EXPLAIN.format(contexts=texts)))
    found: dict[str, Any] = {"text": phrase, "model": str(config.model)}
    seen = {plain(context) for context in shown}
    positive = [plain(c) for c in one.get("drawn", []) if plain(c) not in seen][: config.judged]
    negative = [plain(c) for c in one.get("silent", []) if plain(c) not in seen][: config.judged]
    if phrase and positive and negative:
        found |= detection(phrase, positive, negative, ask, config.batch, seed=one["feature"])
    return found


def detection(
    explanation: str, positive: Sequence[str], negative: Sequence[str], ask: Ask, batch: int, seed: int = 0
) -> dict[str, Any]:
    """How well an explanation tells texts with the feature from texts without it.

    Args:
        explanation: the phrase.
        positive: texts in which the feature fires.
        negative: texts in which it does not.
        ask: the judge.
        batch: texts a question.
        seed: of their order.

    Returns:
        `score`, the balanced accuracy (mean of both shares that are told right; 1/2 is chance), `score_se`, `judged`
        and `unread`, texts for which the judge gave no answer in the form asked for; no score without any of a kind.
    """
    items = [(text, True) for text in positive] + [(text, False) for text in negative]
    Random(seed).shuffle(items)
    right: dict[bool, list[bool]] = {True: [], False: []}
    unread = 0
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        texts = "\n".join(f"{i}. {text}" for i, (text, _) in enumerate(part, start=1))
        answers = digits(ask(DETECT.format(explanation=explanation, contexts=texts)), len(part))
        if answers is None:
            unread += len(part)
            continue
        for (_, fires), answer in zip(part, answers, strict=True):
            right[fires].append(answer == fires)
    found: dict[str, Any] = {"judged": len(right[True]) + len(right[False]), "unread": unread}
    return found | balanced(right[True], right[False])


def balanced(positive: Sequence[bool], negative: Sequence[bool]) -> dict[str, float]:
    """Balanced accuracy and its standard error, from which judgements of each kind were right.

    The two shares are independent binomial estimates: var = sum p (1 - p) / n / 4.
    """
    if not positive or not negative:
        return {}
    shares = [(sum(kind) / len(kind), len(kind)) for kind in (positive, negative)]
    error = math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / 2
    return {"score": sum(p for p, _ in shares) / 2, "score_se": error}


def digits(answer: str, count: int) -> list[bool] | None:
    """The zeros and ones of an answer; None unless there are as many as asked for."""
    found = re.findall(r"(?<![\d.])[01](?![\d.])", answer)
    return [digit == "1" for digit in found] if len(found) == count else None


def first_phrase(answer: str) -> str:
    """The first line with text of an answer, without quotes and the final stop."""
    lines = [line.strip(" \t\"'*.") for line in answer.splitlines()]
    return next((line for line in lines if line), "")[:200]


def plain(context: Context) -> str:
    """A context as text on one line."""
    return joined([token for token, _ in context])


def marked(context: Context) -> str:
    """A context with the tokens on which the feature fires between << and >>."""
    return joined([f"<<{token.strip()}>>" if value > 0 else token for token, value in context])


def joined(tokens: Sequence[str]) -> str:
    """Decoded tokens as a line: those of a word-level tokenizer carry no spaces."""
    spaced = any(token[:1].isspace() for token in tokens)
    return " ".join(("" if spaced else " ").join(tokens).split())


# --- who is asked ----------------------------------------------------------------------------------------------------


def endpoint_asker(config: ExplainConfig) -> Ask:
    """Asks `ENDPOINT/chat/completions` at temperature 0."""
    url = f"{str(config.endpoint).rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(config.key):
        headers["Authorization"] = f"Bearer {key}"

    def ask(question: str) -> str:
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": config.max_tokens,
            "temperature": 0,
        }
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=config.timeout) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            hint = f"; is {config.key} set to its key?" if error.code in (401, 403) else ""
            raise ValueError(f"{url} refused with status {error.code} {error.reason}{hint}") from None
        except OSError as error:
            raise ValueError(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url} answered in another form than OpenAI's ({error!r})") from None

    return ask


def local_asker(config: ExplainConfig, device: Any) -> Ask:
    """Asks a causal language model of a folder, taking the likeliest token; with its chat template where it has one."""
    import torch

    from saerl_cli.models import eos_token_ids, load_model
    from saerl_cli.rl.rollouts.sampling import sample

    loaded = load_model(ModelConfig(kind=ModelKind.local, path=str(config.model)), device)
    tokenizer, ends = loaded.tokenizer, eos_token_ids(loaded)

    def ask(question: str) -> str:
        if tokenizer.chat_template:
            talk = [{"role": "user", "content": question}]
            question = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(question, verbose=False)["input_ids"]
        longest = loaded.context_size - config.max_tokens
        if longest < 1:
            raise ValueError(
                f"explain.max_tokens={config.max_tokens} fills the context of {config.model},"
                f" {loaded.context_size} tokens; lower it"
            )
        ids = torch.tensor([ids[-longest:]], device=loaded.model.device)  # the end of a question says what is asked
        written = sample(loaded.model, ids, torch.ones_like(ids), config.max_tokens, ends, None)
        return tokenizer.decode(written[0], skip_special_tokens=True)

    return ask
