"""SAEs by path or name, in whatever format they are: found, checked without torch, opened.

A source is a folder of one SAE, a folder of such folders (a run of `saerl train-sae`, of `dictionary_learning`, of
sparsify), or `sae_lens:RELEASE/ID`, an SAE that SAELens knows by name and downloads.
"""

import importlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from saerl_cli.sae.files import dictionary_learning, saelens, sparsify
from saerl_cli.sae.files.weights import SaeInfo

if TYPE_CHECKING:
    from saerl_cli.sae.autoencoder import SAE

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}
"""Name of a format -> its file: `is_folder`, `check_folder`, `load_sae`, `refuse_unwritable`, `save_sae`, ..."""

RELEASE = "sae_lens:"
EXPECTED = (
    "expected a run directory of `saerl train-sae`, an SAE folder of SAELens, dictionary_learning or sparsify,"
    f" or {RELEASE}RELEASE/ID"
)


@dataclass(frozen=True)
class Source:
    """One SAE that was found, not opened yet."""

    folder: Path | None
    """Its folder; None for a release that is not downloaded."""
    info: SaeInfo | None
    """What is in it; None likewise."""
    name: str
    """What it was asked for by."""

    def open(self) -> "SAE":
        """The SAE, on the CPU, frozen; `ValueError` when it cannot be read."""
        return _released(self.name) if self.folder is None else _format(self.folder).load_sae(self.folder)


def find_sources(path_or_name: str | Path, site: str | None = None) -> list[Source]:
    """Every SAE of a source, checked, in the order of their folders.

    Args:
        path_or_name: a folder or a release.
        site: only those of this site; a folder of one SAE is taken at its word.

    Raises:
        ValueError: nothing there, nothing of that site, or an SAE that cannot be read.
    """
    name = str(path_or_name)
    if name.startswith(RELEASE):
        _check_release(name)
        return [Source(None, None, name)]
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"no SAE at {path}: no such folder; {EXPECTED}")
    if kind := _kind(path):
        return [Source(path, kind.check_folder(path), name)]
    root = path / "sae" if (path / "sae").is_dir() else path
    folders = [folder for child in _folders(root) for folder in ([child] if _kind(child) else _folders(child))]
    found = [Source(folder, _format(folder).check_folder(folder), name) for folder in folders if _kind(folder)]
    if not found:
        raise ValueError(f"no SAE in {path}; {EXPECTED}")
    chosen = [source for source in found if source.info and site in (None, source.info.site)]
    if not chosen:
        sites = ", ".join(dict.fromkeys(source.info.site for source in found if source.info))
        raise ValueError(f"{path} has no SAE of {site}; it has {sites}")
    return chosen


def check_source(
    path_or_name: str | Path, d_in: int | None = None, d_sae: int | None = None, site: str | None = None
) -> SaeInfo | None:
    """Refuse, without torch and before a run, a source that `open_sae` could not open or that does not fit.

    Args:
        path_or_name: a folder or a release.
        d_in: width that it has to have, where known.
        d_sae: number of features that it has to have, where known.
        site: which SAE of several.

    Returns:
        What is known of it; None for a release, of which nothing is known before it is downloaded.

    Raises:
        ValueError: as said.
    """
    source = _only(path_or_name, site)
    for name, wanted in (("d_in", d_in), ("d_sae", d_sae)):
        found = getattr(source.info, name, wanted)
        if wanted is not None and found != wanted:
            raise ValueError(f"the SAE {source.folder} has {name}={found}, but {wanted} is needed")
    return source.info


def open_sae(path_or_name: str | Path, site: str | None = None) -> "SAE":
    """The SAE of a source, whatever its format, on the CPU, frozen.

    Args:
        path_or_name: a folder or a release.
        site: which SAE of several.

    Raises:
        ValueError: as in `check_source`; a release that cannot be downloaded.
    """
    return _only(path_or_name, site).open()


def _only(path_or_name: str | Path, site: str | None) -> Source:
    sources = find_sources(path_or_name, site)
    if len(sources) > 1:
        sites = ", ".join(dict.fromkeys(source.info.site for source in sources if source.info))
        folders = ", ".join(source.folder.name for source in sources if source.folder)
        raise ValueError(f"{path_or_name} has several SAEs ({sites}); name the folder of one: {folders}")
    return sources[0]


def _kind(folder: Path) -> ModuleType | None:
    return next((kind for kind in FORMATS.values() if kind.is_folder(folder)), None)


def _format(folder: Path) -> ModuleType:
    kind = _kind(folder)
    if kind is None:
        raise ValueError(f"no SAE in {folder}; {EXPECTED}")
    return kind


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and child.name[0] != ".")


# --- releases that SAELens knows by name -----------------------------------------------------------------------------


def _check_release(name: str) -> None:
    """`ValueError` where a name is no release's, or SAELens is not there to ask."""
    release, _, sae_id = name.removeprefix(RELEASE).partition("/")
    if not release or not sae_id:
        raise ValueError(
            f"{name!r} is not {RELEASE}RELEASE/ID, for instance"
            f" {RELEASE}pythia-70m-deduped-mlp-sm/blocks.3.hook_mlp_out"
        )
    if importlib.util.find_spec("sae_lens") is None:
        raise ValueError(
            f"{name} needs SAELens: pip install sae-lens in your environment; or save the SAE elsewhere by"
            f" SAE.from_pretrained({release!r}, {sae_id!r}).save_model(DIR) and give DIR"
        )


def _released(name: str) -> "SAE":
    """What SAELens makes of a name, through a folder that it writes."""
    _check_release(name)
    release, _, sae_id = name.removeprefix(RELEASE).partition("/")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sae"
        try:
            library: Any = importlib.import_module("sae_lens")
            library.SAE.from_pretrained(release, sae_id, device="cpu").save_model(folder)
        except Exception as error:  # no network, no such release, a broken installation: each raises its own
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"SAELens cannot get {name}: {type(error).__name__}: {reason} Where that works, save it by"
                f" SAE.from_pretrained({release!r}, {sae_id!r}).save_model(DIR) and give DIR"
            ) from None
        sae = saelens.load_sae(folder)
    if sae.site == folder.name:  # neither we nor TransformerLens have a name for where it belongs
        sae.site = sae_id.replace("/", "_")
    return sae
