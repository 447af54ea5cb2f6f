"""`accelerate launch` of a job's ranks: `python -m saerl_cli.run.agent RUN SCHEMA WORK`, started by `launch.run_ranks`.

It is called in this process, with RUN/accelerate.yaml and nothing else to go by, because only its caller learns how
each rank ended: as a command it would print a table and exit 1.
"""

import logging
import os
import sys
import time
from pathlib import Path

from saerl_cli.run.files import write_json
from saerl_cli.run.launch import CODES, CONFIG
from saerl_cli.run.worker import end_with


def main(folder: Path, *job: str) -> None:
    """Start the ranks and see them through; how they failed is left for the command in `CODES` or `.error.*.json`."""
    end_with(os.getppid())
    logging.disable(logging.CRITICAL)  # of this process: torch's own account of signals and exit codes
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--config_file", str(folder / CONFIG), "--module", "saerl_cli.run.worker", str(folder), *job]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        write_json(folder / CODES, {str(rank): failure.exitcode for rank, failure in error.failures.items()})
        sys.exit(1)
    except SignalException:  # the command stops the run; the ranks have been stopped
        sys.exit(1)
    except Exception as error:
        message = f"accelerate launch: {' '.join(str(error).split())}"
        write_json(folder / ".error.launch.json", {"rank": None, "time": time.time(), "message": message})
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
