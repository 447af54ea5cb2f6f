"""`saerl export`: SAEs of any readable format, written for another library."""

from collections import Counter
from pathlib import Path

from saerl_cli.run.files import atomic_folder, read_json, write_json
from saerl_cli.sae.files.source import FORMATS, RELEASE, Source, find_sources

MANIFEST = "export.json"


def export_saes(path_or_name: str, to: str, out: Path | None = None, site: str | None = None) -> list[str]:
    """Convert every SAE of a source; all are written, or none.

    Args:
        path_or_name: a run of `saerl train-sae`, an SAE folder, or `sae_lens:RELEASE/ID`.
        to: `saelens`, `dictionary_learning` or `sparsify`.
        out: the folder to make; beside the source when empty.
        site: only the SAEs of this site.

    Returns:
        What to print: a line an SAE, then how the other library loads the first.

    Raises:
        ValueError: no SAE there, one that cannot be written in that format, or `out` holds something else.
    """
    if to not in FORMATS:
        raise ValueError(
            f"--to {to}: no such format; there are {', '.join(FORMATS)} of SAEs, compact, peft and model of policies"
        )
    sources = find_sources(path_or_name, site)
    for source in sources:
        if source.info:
            if site not in (None, source.info.site):
                raise ValueError(f"{path_or_name} is an SAE of {source.info.site}, not of {site}; leave --site out")
            FORMATS[to].refuse_unwritable(source.info)
    out = (out if out is None or out.name else out.resolve()) or beside(path_or_name, to)
    refuse_occupied(out, [source.folder for source in sources if source.folder])
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out, replace=True) as temporary:
        written = _write(sources, to, temporary)
        files = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file())
        write_json(temporary / MANIFEST, {"from": path_or_name, "to": to, "files": files})
    lines = [f"{text} -> {out / place}" for place, text in written]
    return [*lines, "", FORMATS[to].recipe(out / written[0][0])]


def _write(sources: list[Source], to: str, folder: Path) -> list[tuple[str, str]]:
    """Write SAEs below `folder`; the place of each there, and what it is."""
    kind = FORMATS[to]
    shared = Counter(source.info.site for source in sources if source.info)
    written = []
    for source in sources:
        sae = source.open()
        own = source.folder.name if source.folder and source.info and shared[source.info.site] > 1 else None
        place = kind.place(sae, own)
        if (folder / place).exists():
            raise ValueError(f"two of these SAEs would be written to {place}; name one of them with its folder")
        kind.save_sae(sae, folder / place)
        k = "" if sae.k is None else f" k={sae.k}"
        widths = f"{sae.d_in} -> {sae.d_sae}" + (f" -> {sae.d_out} at {sae.target}" if sae.transcoder else "")
        note = (
            " (not for SAELens itself, which has no topk transcoder)"
            if to == "saelens" and k and sae.transcoder
            else ""
        )
        written.append((place, f"{sae.site}: {sae.architecture}{k}, {widths}{note}"))
    return written


def beside(path_or_name: str, to: str) -> Path:
    """`RUN-saelens` beside RUN; in the working directory for a release."""
    if path_or_name.startswith(RELEASE):
        return Path(f"{path_or_name.removeprefix(RELEASE).replace('/', '_')}-{to}")
    path = Path(path_or_name).resolve()
    return path.with_name(f"{path.name}-{to}")


def refuse_occupied(out: Path, folders: list[Path]) -> None:
    """`ValueError` where writing `out` would take away what an earlier export did not put there."""
    for folder in folders:
        if folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} holds what is to be exported; name another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} exists and is no folder; name another one with --out")
    held = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    try:
        ours = {MANIFEST, *read_json(out / MANIFEST)["files"]} if MANIFEST in held else set()
    except (ValueError, TypeError, KeyError):
        ours = set()
    if foreign := sorted(held - ours):
        raise ValueError(f"{out} holds files that no export made ({foreign[0]}); name another folder with --out")
