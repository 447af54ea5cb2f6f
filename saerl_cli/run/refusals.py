"""Hydra's and OmegaConf's errors about words, each as one line that says what to write instead."""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any, cast, get_origin, get_type_hints

from saerl_cli.config.renamed import renamed

EXTRAS = {
    "submitit": "this launcher needs an extra: pip install 'saerl[slurm]'",
    "joblib": "this launcher needs an extra: pip install 'saerl[joblib]'",
    "optuna": "this sweeper needs an extra: pip install 'saerl[optuna]'",
    "ray": "{} is not one of saerl's extras, because its plugin wants another cloudpickle than joblib; on one machine"
    " take hydra/launcher=joblib, on a cluster hydra/launcher=slurm",
}
"""What to say of a plugin of Hydra that is not installed."""


def readable(error: Exception, name: str, schema: type) -> str:
    """One line about a word that cannot be composed.

    Args:
        error: of Hydra or OmegaConf.
        name: root config of the command.
        schema: its dataclass.
    """
    cause = error.__cause__
    key = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    text = f"{error} ({str(cause).splitlines()[0]})" if cause else str(error)
    command = f"saerl {name.replace('_', '-')}"
    if key and (said := renamed(key)):
        return said
    if plugin := re.search(r"Could not (?:find|load) 'hydra/(launcher|sweeper)/(submitit|joblib|optuna|ray)", text):
        return EXTRAS[plugin[2]].format(f"hydra/{plugin[1]}={plugin[2]}")
    if option := re.search(r"Could not find '(.+)/(.+)'", text):
        listed = text.partition("Available options in")[2].partition("Config search path")[0].split()[1:]
        options = f"; options are {', '.join(sorted(listed, key=natural))}" if listed else ""
        return f"there is no {option[1]}={option[2]}{options}{counted(option[1], option[2])}"
    if group := re.search(r"To append to your default list use \+([\w/]+)=(\S+)", text):
        if group[1] == "launch":
            return f"{command} runs in one process; leave launch={group[2]} out"
        return f"{command} has no group {group[1]}; leave {group[1]}={group[2]} out ({command} --help lists its groups)"
    if ambiguous := re.search(r"Ambiguous value for argument '(.+?)=(.+)'", text):
        key, value = ambiguous.groups()
        return f"{key}={value} is a sweep: add -m, or write a list as {key}=[{value}]"
    if missing := re.search(r"Error parsing override '(.*?)'\s+missing EQUAL", text):
        return f"{missing[1]!r} is no setting; settings are written key=value ({command} --help lists them)"
    if "is not a subclass of" in text:  # OmegaConf makes new parts of such settings only when given whole
        named = next(iter(named_parts(schema)), key)
        return f"a new part of {named} is written whole: '{named}={{NAME: {{KEY: VALUE}}}}'"
    if "hydra.cc/docs" in text:  # a parser's message, with a link to the grammar
        return f"cannot read a setting: {text.partition('See https')[0]}; quote values that hold special characters"
    if "missing mandatory value" in text.lower():
        return f"{key} has no value; write {key}=…"
    if key and re.search(r"not in '|not in struct|is not in struct", text):
        near = difflib.get_close_matches(key, settings(schema), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"{command} --help lists the settings"
        return f"there is no setting {key}; {hint}"
    if key and cause is not None:
        return f"{key}: {str(cause).splitlines()[0]}"
    if key:
        return f"{key}: {str(error).splitlines()[0]}"
    return text


def counted(group: str, option: str) -> str:
    """What to write for a number of processes that has no preset, as part of a message; else empty."""
    found = re.fullmatch(r"(gpu|cpu)_([1-9]\d*)", option)
    if group != "launch" or found is None:
        return ""
    return f", or launch.num_processes={found[2]}" + " launch.cpu=true" * (found[1] == "cpu")


def natural(name: str) -> list[Any]:
    """Sort key that puts pythia-70m before pythia-160m, and both before pythia-1b; other names come first."""
    size = re.fullmatch(r"pythia-([\d.]+)([mb])(.*)", name)
    return [1, "mb".index(size[2]), float(size[1]), size[3]] if size else [0, name]


def fields(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a dataclass: every dotted key and its type."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from fields(cast(type, kind), f"{prefix}{name}.")


def settings(schema: type) -> list[str]:
    """List every dotted key of a dataclass."""
    return [key for key, _ in fields(schema)]


def named_parts(schema: type) -> list[str]:
    """List the dotted keys of the settings whose parts the user names (`reward.parts`)."""
    return [key for key, kind in fields(schema) if get_origin(kind) is dict]
