"""Words of earlier versions: read in the run directories that have them, refused on a command line."""

from typing import Any

RENAMED = {"model.world": "model.planted"}
"""Groups of settings."""
RENAMED_KIND = {"world": "planted"}
"""Kinds of a reward part."""


def translate(recorded: Any, key: str = "") -> Any:
    """Return what an earlier version wrote down, settings nested or as dotted keys, in today's words.

    Args:
        recorded: of a JSON or YAML file.
        key: the dotted key under which it stands there.
    """
    if isinstance(recorded, list):
        return [translate(item) for item in recorded]
    if isinstance(recorded, dict):
        return {today(name, key): translate(value, f"{key}.{name}") for name, value in recorded.items()}
    return RENAMED_KIND.get(recorded, recorded) if ".parts." in key and key.endswith(".kind") else recorded


def today(name: Any, parent: str) -> Any:
    """Return a key of a dictionary in today's words."""
    for old, new in RENAMED.items():
        group, _, last = old.rpartition(".")
        if name == last and parent.endswith(f".{group}"):
            return new.rpartition(".")[2]
        if isinstance(name, str) and name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def renamed(key: str) -> str | None:
    """Return one line about a setting that has another name now; None where it never had one.

    Args:
        key: what cannot be composed, with dots.
    """
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"{old} is called {new} now"
    return None
