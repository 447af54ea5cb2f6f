"""Settings of a command as its job would compose them, without asking for what is not there yet."""

from collections.abc import Sequence
from typing import Any

from saerl_cli.config import typed
from saerl_cli.run.configs import conf_dir, config_dirs, register_schema
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.refusals import readable
from saerl_cli.run.words import expand_sites, split_words


def composed(name: str, words: Sequence[str]) -> Any:
    """The dataclass of a command's settings.

    Args:
        name: root config of the command.
        words: what would follow the command word.

    Raises:
        ValueError: a word that makes no sense, a contradiction, or a flag that does not choose settings.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    flags, overrides = split_words(words)
    extra = [flag for flag in flags[::1] if flag.startswith("-") and flag not in ("--config-dir", "-cd")]
    if extra:
        raise ValueError(f"saerl plan plans one job; leave out {extra[0]}")
    register_schema(name)
    search = f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs(flags))}]"
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(name, [search, *expand_sites(overrides, conf_dir(), False)])
        return typed(cfg, resolve(JOBS[name].schema))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(readable(error, name, resolve(JOBS[name].schema))) from None
