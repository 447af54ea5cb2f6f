"""The words of a command line: flags and overrides, sweeps, and `site=` for any place in the model."""

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ONE_VALUE = {"--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--shell-completion"}
MAYBE_A_VALUE = {"--info", "-i"}
NO_VALUE = {"-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help", "--version"}
"""Hydra's flags, without those that would replace the command's own config or read a pickle."""
INFO = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
POINTS = 32
"""At most so many points of a sweep are composed beforehand, about 50 ms each."""


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides: people mix them, and Hydra 1.3 rejects an override after `--flag value`.

    Raises:
        ValueError: a flag that is unknown.
    """
    flags: list[str] = []
    overrides: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        if word in MAYBE_A_VALUE and not (waiting and waiting[0] in INFO):
            word = "--info=all"  # else the next override would be taken for its value
        flag = word.split("=")[0]
        if flag not in ONE_VALUE | MAYBE_A_VALUE | NO_VALUE:
            raise ValueError(f"unknown flag {flag}; settings are written key=value, and --help lists them")
        flags.append(word)
        if waiting and (word in ONE_VALUE or word in MAYBE_A_VALUE):
            flags.append(waiting.pop(0))
    return flags, overrides


def with_folders(words: Sequence[str], key: str) -> list[str]:
    """Words in which folders that are named without a key have become `key=[...]`.

    Raises:
        ValueError: a folder that is not there, or an unknown flag.
    """
    flags, overrides = split_words(words)
    folders = [word for word in overrides if "=" not in word and not word.startswith("~")]
    for folder in folders:
        if not glob.glob(folder) and not Path(folder).exists():
            raise ValueError(f"there is no folder {folder}")
    named = [f"{key}={quoted_list(','.join(folders))}"] if folders else []
    return [*flags, *named, *(word for word in overrides if word not in folders)]


def sweep_points(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The points of a sweep, the first POINTS of them, in the order in which Hydra runs them.

    Sweeps that only a sweeper can expand (interval, glob) are left out.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    axes: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not override.is_sweep_override():
            axes.append([override.input_line or ""])
        elif override.is_choice_sweep() or override.is_range_sweep():
            values = itertools.islice(override.sweep_string_iterator(), POINTS)
            axes.append([f"{override.get_key_element()}={value}" for value in values])
    return map(list, itertools.islice(itertools.product(*axes), POINTS))


def as_override(key: str, value: str) -> str:
    """`key=value` for Hydra's grammar, quoted where the value needs it."""
    if value and all(character.isalnum() or character in "/-_.+$%*@?|:" for character in value):
        return f"{key}={value}"
    escaped = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + end[2].replace('"', '\\"'), value)  # only before a quote
    return f'{key}="{escaped}"'


def expand_sites(overrides: Sequence[str], conf: Path, multirun: bool) -> list[str]:
    """Overrides with `site=mlp_out.3`, `site=[mlp_out.1,mlp_out.3]`, `site=mlp_out.*` as `site.names=[...]`.

    An option of the config group `site` stays what it is. In a sweep, `site=mlp_out.1,mlp_out.3` is two points.

    Raises:
        ValueError: a sweep mixes options and places.
    """
    options = {file.stem for file in (conf / "site").glob("*.yaml")}
    return [
        expand_site(word.removeprefix("site="), options, multirun) if word.startswith("site=") else word
        for word in overrides
    ]


def expand_site(value: str, options: set[str], multirun: bool) -> str:
    """One `site=` word."""
    choices = split_commas(value)
    named = [choice for choice in choices if choice in options]
    if named == choices or (len(choices) > 1 and not multirun):  # Hydra has its own words for a list without -m
        return f"site={value}"
    if named:
        raise ValueError(f"site={value} mixes the group option {named[0]} with places; sweep site.names=… instead")
    return "site.names=" + ",".join(quoted_list(choice) for choice in choices)


def split_commas(value: str) -> list[str]:
    """Split at the commas outside brackets."""
    depth, parts = 0, [""]
    for character in value:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def quoted_list(value: str) -> str:
    """`mlp_out.1` or `[mlp_out.1,mlp_out.3]` as a list of quoted strings; quotes protect globs such as `[1-9]`."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    names = [name.strip().strip("'\"") for name in split_commas(inner)]
    return "[" + ",".join(f'"{name}"' for name in names if name) + "]"
