"""`saerl runs --watch`: what running jobs do, from their own files, until all have ended."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from saerl_cli.config import flat
from saerl_cli.run.directory import Run, shown, true_status
from saerl_cli.run.files import last_jsonl

EVERY_S = 1.0
SHOWN_RUNS = 6
"""Running jobs shown at once, the newest first: more do not fit on a screen."""
LINES = 40
"""Latest lines of metrics that are read."""
PROGRESS = {
    "rlhf": (("phase", "algo.phases"), ("step", "algo.steps")),
    "train_sae": (("tokens", "sae.tokens"),),
    "train_lm": (("step", "model.planted.steps"),),
    "train_reward": (("step", "steps"),),
}
"""Job -> what its metrics count and the setting that says how far, in order of preference."""
NUMBERS = (
    ("reward", "reward", "{:.3f}"),
    ("kl", "KL", "{:.2f} nats"),
    ("length", "length", "{:.1f}"),
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("samples_per_second", "", "{:.1f} samples/s"),
    ("tokens_per_second", "", "{:,.0f} tokens/s"),
)
"""Key of metrics.jsonl, its name, its format."""
SAE_NUMBERS = ("fvu", "l0", "dead")
"""What metrics of SAEs say of each, `SAE/fvu`."""
BLOCKS = "▁▂▃▄▅▆▇█"


def watch(folders: Sequence[Path], every: float = EVERY_S) -> int:
    """Show every running job below some folders until none runs any more.

    Returns:
        How many had been running.
    """
    seen: set[Path] = set()
    with Live(console=Console(), auto_refresh=False, vertical_overflow="crop") as live:
        while running := running_jobs(folders):
            seen |= {run.path for run in running}
            live.update(frame(running), refresh=True)
            time.sleep(every)
    return len(seen)


def running_jobs(folders: Sequence[Path]) -> list[Run]:
    """Jobs that are at work now, the newest first."""
    runs = [Run.load(file.parent) for folder in folders for file in folder.rglob("run.json")]
    running = [(run.record.get("started", ""), run) for run in runs if true_status(run, run.record) == "running"]
    return [run for _, run in sorted(running, key=lambda entry: entry[0], reverse=True)]


def frame(runs: Sequence[Run]) -> Group:
    """One picture of running jobs."""
    parts = [picture(run) for run in runs[:SHOWN_RUNS]]
    more = len(runs) - SHOWN_RUNS
    return Group(*parts, *([Text(f"and {more} more")] if more > 0 else []))


def picture(run: Run) -> Text:
    """A job: how far it is, its latest numbers, the course of its reward, two of its latest samples."""
    rows = last_jsonl(run.path / "metrics.jsonl", LINES)
    text = Text(f"{shown(run.path)}", style="bold", no_wrap=True, overflow="ellipsis")
    text.append(f"  {str(run.record.get('job', '?')).replace('_', '-')}  {how_far(run, rows)}\n", style="not bold")
    if rows:
        text.append(f"  {numbers(rows[-1])}\n", style="not bold")
    rewards = [row["reward"] for row in rows if "reward" in row]
    if len(rewards) > 1:
        text.append(f"  reward {spark(rewards)}\n", style="not bold cyan")
    for sample in last_jsonl(run.path / "samples.jsonl", 2):
        text.append(f"  {line_of(sample['prompt'])}", style="not bold dim")
        text.append(f" {line_of(sample['completion'])}", style="not bold")
        text.append(f"  [{sample['reward']:.2f}]\n", style="not bold dim")
    return text


def how_far(run: Run, rows: Sequence[dict[str, Any]]) -> str:
    """`phase 12/40, about 90 s left`, as far as the job's files tell."""
    if not rows:
        return "starting"
    settings = flat(run.settings)
    for key, setting in PROGRESS.get(str(run.record.get("job")), ()):
        total = settings.get(setting)
        if key in rows[-1] and total:
            done, seconds = rows[-1][key], [row["seconds"] for row in rows[-5:] if "seconds" in row]
            left = f", about {sum(seconds) / len(seconds) * (total - done):.0f} s left" if seconds else ""
            return f"{key} {done:,}/{total:,}{left if done < total else ', closing'}"
    return ""


def numbers(row: dict[str, Any]) -> str:
    """The latest numbers of a job in a line; of SAEs, those of the first."""
    found = [f"{name} {form.format(row[key])}".strip() for key, name, form in NUMBERS if key in row]
    first = next((key.rpartition("/")[0] for key in row if key.endswith("/fvu")), None)
    if first is not None:
        found.append(first)
        found += [f"{key} {row[f'{first}/{key}']:.4g}" for key in SAE_NUMBERS if f"{first}/{key}" in row]
    return "  ".join(found)


def spark(values: Sequence[float]) -> str:
    """Numbers as a line of blocks, lowest to highest."""
    low, high = min(values), max(values)
    return "".join(BLOCKS[round((v - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1))] for v in values)


def line_of(text: str, limit: int = 90) -> str:
    """Text a model wrote, on one line: control characters and line breaks away, cut to a length."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"
