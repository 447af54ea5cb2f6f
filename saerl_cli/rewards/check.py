"""What can be refused about a reward before any work, without loading torch."""

import importlib
import importlib.util
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_cli.config.reward import RewardConfig, RewardKind, RewardPart
from saerl_cli.rewards.lexicon import read_lexicon
from saerl_cli.rewards.patterns import compiled

SCORE_HEADS = ("score.", "classifier.", "classification_head.", "sequence_summary.", "head.")
"""How the parameters of a sequence classifier's head are named in Hugging Face's models."""


def check_reward(config: RewardConfig) -> None:
    """Refuse a reward that cannot work.

    Raises:
        ValueError: one line naming the part, what is wrong with it and what to write instead.
    """
    for name, part in config.parts.items():
        try:
            CHECKS[part.kind](part)
        except ValueError as error:
            raise ValueError(f"reward.parts.{name}: {error}") from None
        if not math.isfinite(part.weight):
            raise ValueError(f"reward.parts.{name}: weight must be a finite number, got {part.weight}")


def check_planted(part: RewardPart) -> None:
    """The attribute must be one of the planted language."""
    from saerl_cli.planted.language import ATTRIBUTES

    if part.attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {part.attribute!r}; there are {', '.join(sorted(ATTRIBUTES))}")


def check_lexicon(part: RewardPart) -> None:
    """The word list must be readable and every weight finite."""
    weights = part.words or read_lexicon(part.path or "")
    for word, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {word!r} must be a finite number, got {weight}")


def check_vader(part: RewardPart) -> None:
    """The library must be installed."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise ValueError("kind=vader needs the library vaderSentiment: pip install vaderSentiment")


def check_hf(part: RewardPart) -> None:
    """A folder must hold a sequence classifier with its score head; a Hub id is checked when it is loaded."""
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


def check_python(part: RewardPart) -> None:
    """The function must be importable."""
    import_function(part.function or "")


def check_pattern(part: RewardPart) -> None:
    """The regular expression, where there is one, must be one."""
    compiled(part.pattern or "")


CHECKS: dict[RewardKind, Callable[[RewardPart], None]] = {
    RewardKind.planted: check_planted,
    RewardKind.lexicon: check_lexicon,
    RewardKind.vader: check_vader,
    RewardKind.hf: check_hf,
    RewardKind.python: check_python,
    RewardKind.count: check_pattern,
    RewardKind.heavy: check_pattern,
    RewardKind.verifier: check_pattern,
}


def import_function(target: str) -> Callable[..., list[float]]:
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
