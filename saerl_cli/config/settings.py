"""What a setting belongs to and may be, said once: at its field.

    k: int = setting(16, ">= 1", architecture=TOPK_FAMILY)

From it follow what is refused (`check_settings`), the last words of the setting's help (`belongs`), what stands for it
where it is empty (`filled`), and whether it does anything (`applies`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

GROUPS = ("model", "data", "adapter", "algo")
"""Settings whose `kind` is an option of a config group: `algo=ppo`."""

T = TypeVar("T")
Case = Mapping[str, Any]
"""Other settings of a dataclass -> the value, or values, that they must have. True stands for any that is given (not
empty, 0 or false), False for none. Values may be keys; what they map to stands for the field where it is empty."""


def setting(
    default: Any, bounds: str | None = None, only: Iterable[Case] = (), write: str | None = None, **case: Any
) -> Any:
    """Make the field of a setting.

    Args:
        default: its default; what makes one, where it is a class or a function.
        bounds: `>= 1`, `> 0`, `in [0, 1)`; an empty setting is within any.
        only: the cases in which it does something, any of them; everywhere when empty.
        write: what is to be given, for instance FILE, where it may not be empty.
        case: the only case, by keyword.
    """
    metadata = {"only": (*only, *([case] if case else [])), "bounds": bounds, "write": write}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def default_of(f: Field) -> Any:
    """The default of a dataclass field."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def default_text(f: Field) -> str:
    """A default as one would type it; empty where there is none."""
    text = _shown(default_of(f))
    return {"None": "null", "???": "", "True": "true", "False": "false"}.get(text, text.replace(" ", ""))


def filled(config: Any, name: str) -> Any:
    """A setting, or what stands for it in this configuration where it is empty."""
    value = getattr(config, name)
    if value is not None and value != []:
        return value
    found = [
        wanted.get(getattr(config, key))
        for case in _cases(config, name)
        for key, wanted in case.items()
        if isinstance(wanted, Mapping)
    ]
    return found[0] if found else value


def applies(config: Any, name: str) -> bool:
    """Whether a setting does anything in this configuration."""
    return _unmet(config, name) is None


def suited(schema: type[T], values: Mapping[str, Any]) -> T:
    """Make a configuration of the values that do something in it; other settings keep their defaults."""
    config = object.__new__(schema)
    for f in fields(schema):  # type: ignore[arg-type]
        setattr(config, f.name, values.get(f.name, default_of(f)))
    return schema(**{name: value for name, value in values.items() if applies(config, name)})


def check_settings(config: Any, prefix: str = "") -> None:
    """Refuse settings that do nothing, are missing, or out of bounds.

    Args:
        config: an instance of a dataclass of settings.
        prefix: where it stands, for instance `sae`.

    Raises:
        ValueError: one line; a setting at its default is never refused for doing nothing.
    """
    for f in fields(config):
        at, value, unmet = _label(prefix, f.name), getattr(config, f.name), _unmet(config, f.name)
        if unmet is not None and value != default_of(f):
            raise ValueError(_idle(config, f, prefix, *unmet))
        if unmet is None and f.metadata.get("write") and not value:
            case = next(
                case for case in _cases(config, f.name) if not any(_lack(config, *pair) for pair in case.items())
            )
            given = " and ".join(f"{_label(prefix, key)}={_shown(getattr(config, key))}" for key in case)
            raise ValueError(f"{given} needs {at}={f.metadata['write']}")
        bounds = f.metadata.get("bounds")
        if bounds and value is not None and not within(value, bounds):
            raise ValueError(f"{at} must be {bounds}, got {value}")


def within(value: float, bounds: str) -> bool:
    """Whether a number is within `> 0`, `>= 1`, `in [0, 1)` or the like."""
    if bounds.startswith("in "):
        low, high = (float(end) for end in re.findall(r"[-.\d]+", bounds))
        return low <= value <= high and (value != low or "[" in bounds) and (value != high or "]" in bounds)
    sign, _, least = bounds.partition(" ")
    return value >= float(least) if sign == ">=" else value > float(least)


def belongs(f: Field, prefix: str = "") -> str:
    """Where a setting does something, as one would write it: `algo=ppo, grpo or rloo`; empty for everywhere."""
    return ", or ".join(
        " and ".join(_written(_label(prefix, key), wanted) for key, wanted in case.items())
        for case in f.metadata.get("only", ())
    )


def _idle(config: Any, f: Field, prefix: str, key: str, wanted: Any) -> str:
    at, label = _label(prefix, f.name), _label(prefix, key)
    default = "out" if is_dataclass(default_of(f)) else f"at {default_text(f)}"
    if wanted is True:
        return f"{at} does nothing without {label}; set that too, or leave it {default}"
    if wanted is False:
        return f"{at} does nothing with {label}; leave one of them out"
    given = f"{label}={_shown(getattr(config, key))}"
    return f"{at} does nothing with {given}; it belongs to {belongs(f, prefix)}; leave it {default}"


def _written(label: str, wanted: Any) -> str:
    if isinstance(wanted, bool):
        return label if wanted else f"no {label}"
    *first, last = map(_shown, _values(wanted))
    return f"{label}={', '.join(first)} or {last}" if first else f"{label}={last}"


def _cases(config: Any, name: str) -> Iterable[Case]:
    return type(config).__dataclass_fields__[name].metadata.get("only", ())


def _unmet(config: Any, name: str) -> tuple[str, Any] | None:
    """What a setting lacks to do something: another setting, and what that must be; of the case that lacks least."""
    lacking = [
        [lack for key, wanted in case.items() if (lack := _lack(config, key, wanted))] for case in _cases(config, name)
    ]
    return min(lacking, key=len)[0] if lacking and all(lacking) else None


def _lack(config: Any, key: str, wanted: Any) -> tuple[str, Any] | None:
    value = getattr(config, key)
    met = bool(value) is wanted if isinstance(wanted, bool) else value in _values(wanted)
    unmet = None if wanted is False else _unmet(config, key)  # what does nothing gives nothing a meaning
    return unmet or (None if met else (key, wanted))


def _values(wanted: Any) -> tuple[Any, ...]:
    return (wanted,) if isinstance(wanted, Enum | str) else tuple(wanted)


def _label(prefix: str, key: str) -> str:
    if key == "kind" and prefix in GROUPS:
        return prefix
    return f"{prefix}.{key}" if prefix else key


def _shown(value: Any) -> str:
    return str(value.value) if isinstance(value, Enum) else str(value)
