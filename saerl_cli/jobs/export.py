"""`saerl export`: SAEs in the format of another library, or a policy as a small adapter or a model."""

from pathlib import Path


def export(path: str, to: str, out: Path | None = None, site: str | None = None, first: int | None = None) -> list[str]:
    """Write SAEs or a policy in the form `to`.

    Args:
        path: SAEs (a run of `saerl train-sae`, a folder, `sae_lens:RELEASE/ID`), or a policy (a run, an adapter).
        to: a library's format of SAEs, or a form of a policy.
        out: the folder to make; beside `path` when empty.
        site: of SAEs, only those of this site.
        first: of a policy, only the features that its audit ranks first.

    Returns:
        What to print.

    Raises:
        ValueError: an option of the other kind, or what the stage refuses.
    """
    from saerl_cli.rl.export import FORMS, export_policy
    from saerl_cli.sae.export import export_saes

    if to in FORMS and site is not None:
        raise ValueError(f"--site chooses SAEs; a policy is exported whole with --to {to}")
    if to not in FORMS and first is not None:
        raise ValueError(f"--first chooses features of a policy; --to {to} is a form of SAEs")
    return export_policy(Path(path), to, out, first) if to in FORMS else export_saes(path, to, out, site)
