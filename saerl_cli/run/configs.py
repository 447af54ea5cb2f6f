"""Where the configs are, and the frozen copies that a sweep composes from."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.refusals import named_parts

PACKAGE = Path(__file__).parents[1]


def conf_dir() -> Path:
    """`saerl_cli/conf` in an installed wheel, `conf/` beside the package in a checkout."""
    for candidate in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (candidate / "train_sae.yaml").is_file():
            return candidate
    raise ValueError("the conf/ directory is missing from this installation; reinstall saerl")


def register_schema(name: str) -> None:
    """Make the command's dataclass known to Hydra as `NAME_schema`, the first entry of its root config."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = resolve(JOBS[name].schema)
    node = OmegaConf.structured(schema)
    for key in named_parts(schema):  # parts that the user names may be added without Hydra's `+`
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name=f"{name}_schema", node=node)


def config_dirs(flags: Sequence[str]) -> list[Path]:
    """Folders of further configs; `ValueError` when one is missing, which Hydra would only warn of."""
    pairs = zip(flags, flags[1:], strict=False)
    folders = [Path(value).absolute() for flag, value in pairs if flag in ("--config-dir", "-cd")]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--config-dir {folder} is not a directory")
    return folders


def frozen(conf: Path) -> Path:
    """A copy of a config folder, named by its content. A queued job composes when it starts: not from files in edit."""
    content = hashlib.sha256()
    files = sorted(conf.rglob("*.yaml"))
    for path in files:
        content.update(path.relative_to(conf).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    copy = Path("runs/.conf", content.hexdigest()[:12]).absolute()
    if not copy.exists():
        partial = copy.with_name(f"{copy.name}.{os.getpid()}")
        for path in files:
            target = partial / path.relative_to(conf)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        with contextlib.suppress(OSError):  # another start made the same copy first
            partial.rename(copy)
        shutil.rmtree(partial, ignore_errors=True)
    return copy


def freeze_config_dirs(flags: Sequence[str]) -> list[str]:
    """The flags, with frozen copies of the user's own config folders."""
    after = ["", *flags]
    return [
        str(frozen(Path(word).absolute())) if before in ("--config-dir", "-cd") else word
        for before, word in zip(after, flags, strict=False)
    ]
