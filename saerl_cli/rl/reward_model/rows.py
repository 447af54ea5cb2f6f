"""Preference pairs as token ids, without importing torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.train_reward import TooLong
from saerl_cli.data.pairs import Pair
from saerl_cli.run.files import read_json

if TYPE_CHECKING:
    from saerl_cli.models import Loaded


@dataclass
class Rows:
    """Pairs as token ids: prompt, reply and end token."""

    chosen: list[list[int]] = field(default_factory=list)
    rejected: list[list[int]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    cut: int = 0
    """Pairs whose prompt was cut."""
    left_out: int = 0
    """Pairs that did not fit."""


def encode_pairs(pairs: list[Pair], tokenizer: Any, end: int, longest: int, too_long: TooLong) -> Rows:
    """Pairs as token ids, of at most `longest` tokens a side; the end token is kept, the prompt cut from the left.

    A reply is encoded by itself, as a policy writes it behind the prompt's tokens.
    """
    rows = Rows()
    for pair in pairs:
        prompt = tokenizer(pair.prompt)["input_ids"]
        replies = [[*tokenizer(t, add_special_tokens=False)["input_ids"], end] for t in (pair.chosen, pair.rejected)]
        room = longest - max(map(len, replies))
        if len(prompt) > room:
            if too_long is TooLong.drop or room < 0:
                rows.left_out += 1
                continue
            rows.cut += 1
        kept = prompt[max(0, len(prompt) - room) :]  # of the same length for both sides
        rows.chosen.append(kept + replies[0])
        rows.rejected.append(kept + replies[1])
        rows.pairs.append(pair)
    return rows


def end_id(loaded: "Loaded") -> int:
    """The token that ends a text: as the model's generation config says, else the tokenizer's."""
    file = loaded.folder / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.is_file() else None
    own = loaded.tokenizer.eos_token_id
    ids = given if isinstance(given, list) else [own if given is None else given]
    return own if own in ids else ids[0]


def check_padding(folder: Path) -> None:
    """Refuse a tokenizer whose settings say that it pads with its end token."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    pad, end = (as_text(settings.get(name)) for name in ("pad_token", "eos_token"))
    if pad is not None and pad == end:
        raise ValueError(pad_is_end(folder))


def pad_is_end(folder: Path) -> str:
    """The message about a tokenizer with which the score would be read at the wrong place."""
    return (
        f"the tokenizer in {folder} pads with its end token, so a score would be read before the end; give it another"
        " pad_token in tokenizer_config.json"
    )


def as_text(token: Any) -> str | None:
    """A token of tokenizer_config.json, which may be an object."""
    return token.get("content") if isinstance(token, dict) else token
