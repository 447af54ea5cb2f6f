"""Where a score comes from: an entry a kind of reward, and everything that the commands ask of it; imports no torch."""

import importlib
import importlib.util
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config.reward import Per, RewardPart
from saerl_cli.planted.language import ATTRIBUTES, labels_of, split_words
from saerl_cli.rewards.lexicon import Lexicon, read_lexicon
from saerl_cli.rewards.patterns import compiled, heavy_tailed, needs_answers, occurrences, verifier

PartFunction = Callable[..., Sequence[float]]
"""f(prompts, completions, completion_ids) -> one score a completion; ids include the end token, text does not. One with
an argument named `answers` gets the prompts' right answers too, None for those without one."""
SCORE_HEADS = ("score.", "classifier.", "classification_head.", "sequence_summary.", "head.")
"""How the parameters of a sequence classifier's head are named in Hugging Face's models."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the commands ask of a kind of reward."""

    check: Callable[[RewardPart], None]
    """check(part): a `ValueError` of one line, before any work and without torch, where the part cannot work."""
    build: Callable[[RewardPart, Any, Any], PartFunction]
    """build(part, the policy's tokenizer, device): the function that scores."""
    counted: Callable[[RewardPart], Callable[[str], bool]] | None = None
    """counted(part): whether a word alone earns something. None: it does not judge words one by one."""
    answers: Callable[[RewardPart], bool] | None = None
    """answers(part): whether every prompt must have a right answer. None: it does not verify answers, else its score is
    1 for a right one and 0 for any other."""
    slow: bool = False
    """Too slow to score every beginning of a completion."""
    model: bool = False
    """A language model at `path` scores."""


# --- words and patterns ----------------------------------------------------------------------------------------------


def check_planted(part: RewardPart) -> None:
    """Refuse an attribute that the planted language lacks."""
    if part.attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {part.attribute!r}; there are {', '.join(sorted(ATTRIBUTES))}")


def planted(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """Count the words of a completion that carry an attribute of the planted language, by the language's labels."""
    check_planted(part)

    def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = split_words(prompt)  # a label may depend on the words before
            labels = labels_of([*before, *split_words(completion)])[len(before) :]
            count = sum(part.attribute in of_word for of_word in labels)
            scores.append(count / max(1, len(labels)) if part.per is Per.token else float(count))
        return scores

    return score


def planted_word(part: RewardPart) -> Callable[[str], bool]:
    """Whether a word carries the attribute without the words before it."""
    alone = not (part.attribute or "").startswith("after_")
    return lambda word: alone and part.attribute in labels_of([word])[0]


def weights_of(part: RewardPart) -> dict[str, float]:
    """The words of a lexicon and their weights."""
    return part.words or read_lexicon(part.path or "")


def check_lexicon(part: RewardPart) -> None:
    """Refuse a word list that cannot be read, and a weight that is not finite."""
    for word, weight in weights_of(part).items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {word!r} must be a finite number, got {weight}")


def lexicon_word(part: RewardPart) -> Callable[[str], bool]:
    """Whether a word is in the list."""
    words = {word.lower() for word in weights_of(part)}
    return lambda word: word.lower() in words


def check_vader(part: RewardPart) -> None:
    """Refuse without the library."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise ValueError("kind=vader needs the library vaderSentiment: pip install vaderSentiment")


def vader(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """Sentiment of a completion, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return of_text(lambda text: analyser.polarity_scores(text)["compound"])


def check_pattern(part: RewardPart) -> None:
    """Refuse what is no regular expression."""
    compiled(part.pattern or "")


def count(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """Count the matches of a regular expression, or divide their number by that of the words."""
    expression, per_word = compiled(part.pattern or ""), part.per is Per.token
    return of_text(lambda text: occurrences(expression, text) / (max(1, len(text.split())) if per_word else 1))


def heavy(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """A heavy-tailed function of such a count (`patterns.heavy_tailed`)."""
    expression = compiled(part.pattern or "")
    return of_text(lambda text: heavy_tailed(occurrences(expression, text), part.tail, part.shape, part.scale))


def of_text(score: Callable[[str], float]) -> PartFunction:
    """A score of the text alone."""
    return lambda prompts, completions, completion_ids: [score(text) for text in completions]


# --- answers ---------------------------------------------------------------------------------------------------------


def verified(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """1 for the right answer, 0 for any other."""
    is_right, needed = verifier(part.match, part.pattern, part.tolerance), needs_answers(part.match, part.pattern)

    def score(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answers: list[str | None]
    ) -> list[float]:
        if needed and None in answers:
            raise ValueError(f"the prompt {prompts[answers.index(None)][:60]!r} has no answer to verify against")
        return [float(is_right(text, answer)) for text, answer in zip(completions, answers, strict=True)]

    return score


# --- reward models ---------------------------------------------------------------------------------------------------


def check_classifier(part: RewardPart) -> None:
    """Refuse a folder without a sequence classifier and its score head; a Hub id is checked when it is loaded."""
    folder = Path(part.path or "")
    if not folder.exists():
        looks_local = folder.is_absolute() or str(part.path).startswith((".", "~")) or str(part.path).count("/") != 1
        if looks_local:
            raise ValueError(f"there is no folder {folder}; write a model folder or a Hub id OWNER/MODEL")
        return
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is not a model folder: config.json is missing or malformed") from None
    architecture = (config.get("architectures") or ["an unnamed architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder} holds {architecture}, which has no score head; give a …ForSequenceClassification model"
        )
    names = safetensors_names(folder)
    if names and not any(name.split("model.")[-1].startswith(SCORE_HEADS) for name in names):
        raise ValueError(f"the score head is missing from the weights in {folder}; it would be newly initialised")


def safetensors_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors files, read from their headers; empty when there are none."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, path.stat().st_size)))
            except (struct.error, ValueError):
                raise ValueError(f"{path} is damaged: it has no readable safetensors header") from None
        names |= header.keys() - {"__metadata__"}
    return names


def classifier(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """The logit of a sequence classifier."""
    from saerl_cli.rewards.classifier import Classifier

    return Classifier(part.path or "", tokenizer, device, part.batch_size, part.revision)


# --- your own --------------------------------------------------------------------------------------------------------


def import_function(target: str) -> PartFunction:
    """The function named `module:function`, looked for in the working directory too.

    Raises:
        ValueError: malformed name, module that cannot be imported, or no such function in it.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"function={target!r} must read module:function, for instance my_rewards:short")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot import {module_name!r} for function={target}: {reason}") from None
    function: Any = getattr(module, name, None)
    if not hasattr(function, "__call__"):  # noqa: B004 (callable() narrows the type to one that returns object)
        raise ValueError(f"function={target}: the module {module_name!r} has no function {name!r}")
    return function


def check_function(part: RewardPart) -> None:
    """Refuse what cannot be imported."""
    import_function(part.function or "")


KINDS = {
    "planted": Kind(check=check_planted, build=planted, counted=planted_word),
    "lexicon": Kind(
        check=check_lexicon,
        build=lambda part, *_: of_text(Lexicon(weights_of(part), part.per is Per.token)),
        counted=lexicon_word,
    ),
    "vader": Kind(check=check_vader, build=vader),
    "hf": Kind(check=check_classifier, build=classifier, slow=True, model=True),
    "python": Kind(
        check=check_function,
        build=lambda part, *_: import_function(part.function or ""),
        slow=True,
    ),
    "count": Kind(
        check=check_pattern,
        build=count,
        counted=lambda part: lambda word: compiled(part.pattern or "").search(word) is not None,
    ),
    "heavy": Kind(check=check_pattern, build=heavy),
    "verifier": Kind(check=check_pattern, build=verified, answers=lambda part: needs_answers(part.match, part.pattern)),
}
"""By the `kind` of a reward part."""


def kind_of(part: RewardPart) -> Kind:
    """The entry of a part's kind.

    Raises:
        ValueError: there is none.
    """
    if part.kind not in KINDS:
        raise ValueError(
            f"there is no kind={part.kind}; there are {', '.join(sorted(KINDS))}"
            " (a new one is an entry in saerl_cli/rewards/kinds.py)"
        )
    return KINDS[part.kind]
