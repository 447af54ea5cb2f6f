"""Every setting, typed: one root dataclass a command, filled by the YAML of `conf/`."""

from typing import Any, TypeVar

from omegaconf import OmegaConf

T = TypeVar("T")


def typed(cfg: Any, kind: type[T]) -> T:
    """A composed config as its dataclass.

    The merge refuses keys that the dataclass lacks, which Hydra's `+key=value` would let through; building the
    dataclass runs every `__post_init__`.

    Raises:
        ValueError: a contradiction between settings.
        omegaconf.errors.OmegaConfBaseException: an unknown key or a value of another type.
    """
    value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.to_container(cfg)))
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config to {dotted key: value}."""
    found: dict[str, Any] = {}
    values = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg)
    assert isinstance(values, dict)
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
