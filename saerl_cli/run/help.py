"""The settings of a command as text, from the docstrings under the fields of its dataclasses: the only copy."""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from saerl_cli.config.settings import belongs, default_text
from saerl_cli.run.configs import conf_dir
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.refusals import natural

HYDRA_FLAGS = """Hydra's own words:
  -m key=1,2         sweep: a run for every combination
  --cfg job          print the composed settings and stop
  --config-dir DIR   add your own configs
  --info searchpath  where configs are looked for; --hydra-help tells the rest"""


def settings_help(name: str) -> str:
    """Config groups with their options, then every setting with its default and meaning.

    Args:
        name: root config of the command.
    """
    schema = resolve(JOBS[name].schema)
    groups = [field.name for field in dataclasses.fields(schema) if (conf_dir() / field.name).is_dir()]
    lines = ["Config groups (GROUP=OPTION):"] if groups else []
    for group in groups:
        options = sorted((file.stem for file in (conf_dir() / group).glob("*.yaml")), key=natural)
        lines.append(textwrap.fill(f"{group}={' | '.join(options)}", 110, **INDENTED))
    lines += ["", "Settings (KEY=VALUE):", *described(schema), "", HYDRA_FLAGS]
    return "\n".join(lines)


INDENTED: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "      ", "break_on_hyphens": False}


def described(schema: type, prefix: str = "", where: str = "") -> Iterator[str]:
    """A line or more for every setting of a dataclass, nested ones with dotted keys; `where` it belongs."""
    documentation, kinds = field_docstrings(schema), get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = prefix + field.name, kinds[field.name]
        place = belongs(field, prefix.removesuffix(".")) or where
        if dataclasses.is_dataclass(kind):
            yield from described(resolve_type(kind), f"{key}.", place)
            continue
        if get_origin(kind) is dict and dataclasses.is_dataclass(get_args(kind)[1]):
            yield from described(resolve_type(get_args(kind)[1]), f"{key}.NAME.")
            continue
        choices = ", ".join(member.name for member in kind) if is_enum(kind) else field.metadata.get("bounds")
        text = f"{key}={default_text(field)}{f' ({choices})' if choices else ''}: {documentation.get(field.name, '')}"
        text += f" Only with {place}." if place else ""
        yield textwrap.fill(" ".join(text.split()), 110, **INDENTED)


def field_docstrings(schema: type) -> dict[str, str]:
    """Field -> the string under it in the source of its class."""
    source = inspect.getsource(sys.modules[schema.__module__])
    tree = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    )
    found = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = str(after.value.value)
    return found


def is_enum(kind: Any) -> bool:
    """Whether a field's type is a choice."""
    return inspect.isclass(kind) and issubclass(kind, Enum)


def resolve_type(kind: Any) -> type:
    """The dataclass itself, for the type checker."""
    return kind
