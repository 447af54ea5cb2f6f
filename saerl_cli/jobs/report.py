"""`saerl report`: one HTML page of runs, and with --describe first what their features are."""

from collections.abc import Sequence
from pathlib import Path

from saerl_cli.run.progress import say


def report(paths: Sequence[Path], out: Path | None = None, describe: bool = False) -> Path:
    """Write the page of runs.

    Args:
        paths: run directories of any command, or folders that hold some.
        out: the page; report.html in the first folder when empty.
        describe: first write features.json into coefficient runs without one.

    Returns:
        The page.

    Raises:
        ValueError: a folder that is not there or holds no run.
    """
    from saerl_cli.report.page import write_report

    if describe:
        describe_features(paths)
    return write_report(paths, out)


def describe_features(paths: Sequence[Path]) -> None:
    """Write features.json into the coefficient runs in these folders that have none, some seconds each.

    A run whose features cannot be described is left as it is; its page will say that they are missing.
    """
    from saerl_cli.analysis.features import describe_run
    from saerl_cli.report.collect import lacks_features, read, run_folders

    for folder in dict.fromkeys(folder for path in paths for folder in run_folders(path)):
        if lacks_features(read(folder)):
            try:
                describe_run(folder)
            except ValueError as error:
                say(f"{folder}: features not described: {' '.join(str(error).split())}")
