"""The job of `saerl train-lm`: a small Pythia-architecture language model of the planted language or of any text."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import DataKind, ModelKind, refuse_unless
from saerl_cli.config.train_lm import TrainLmConfig
from saerl_cli.data.documents import read_documents, split_documents
from saerl_cli.planted.cache import damage, measure, planted_folder, planted_model, save_model
from saerl_cli.run.files import atomic_folder, read_json
from saerl_cli.run.processes import ProcessGroup, process_group
from saerl_cli.run.progress import say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from saerl_cli.run.directory import Run

VOCABULARY_LIMIT = 8192
"""Words of a text that become tokens; rarer ones are <unk>."""


def check(config: TrainLmConfig) -> None:
    """Refuse what cannot work, before anything is written."""
    refuse_unless(
        config.model.kind is ModelKind.planted,
        "train-lm makes a new model: leave model=planted and give its sizes as model.planted.hidden_size=… and so on",
    )
    refuse_unless(
        config.data.kind in (DataKind.planted, DataKind.text),
        "train-lm reads data=planted, or data=text data.path=FILE",
    )
    planted, processes = config.model.planted, config.launch.num_processes
    refuse_unless(
        planted.batch_size >= processes,
        f"model.planted.batch_size={planted.batch_size} is less than a row for each of"
        f" launch.num_processes={processes} processes",
    )
    refuse_unless(
        config.data.context_size in (None, config.model.planted.context_size),
        "train-lm takes the context from model.planted.context_size; leave data.context_size empty",
    )
    refuse_unless(
        config.launch.shards == 1 or config.data.kind is DataKind.text,
        "the planted model is trained whole, by one process; write launch.sharding=none, or data=text data.path=FILE",
    )
    if config.data.kind is DataKind.text:
        split_documents(read_documents(config.data), config.data)


def work(config: TrainLmConfig, run: "Run", accelerator: "Accelerator") -> float:
    """Train, or take the planted model from the cache; returns the held-out loss in nats per token.

    The first process alone writes, and knows the summary.
    """
    group = process_group()
    is_planted = config.data.kind is DataKind.planted
    summary = planted(config, run, group) if is_planted else from_text(config, run, accelerator.device, group)
    run.summary(summary)
    return summary.get("loss_heldout", 0.0)


def planted(config: TrainLmConfig, run: "Run", group: ProcessGroup) -> dict[str, Any]:
    """RUN/model is a copy of the cached model, which is trained here if need be."""
    planted = config.model.planted
    cached = group.broadcast(damage(planted_folder(planted)) is None)
    folder = planted_model(planted, run, config.log_every, config.checkpoint_every, group)
    if not run.writes:
        return {}
    if cached:
        say(f"this model is in the cache already, copied from {folder}")
    with atomic_folder(run.path / "model", replace=True) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    summary = summary_of(run.path / "model")
    if cached:
        run.truncate(0)
        run.log(summary["steps"], loss_heldout=summary["loss_heldout"])
    return {**summary, "cached": cached}


def from_text(config: TrainLmConfig, run: "Run", device: Any, group: ProcessGroup) -> dict[str, Any]:
    """RUN/model is a model of the text's words."""
    from saerl_cli.planted.tokenizer import build_tokenizer, frequent_words
    from saerl_cli.planted.train import train_model

    start = time.monotonic()
    planted = config.model.planted
    training, heldout = split_documents(read_documents(config.data), config.data)
    words = frequent_words(build_tokenizer([]), training, VOCABULARY_LIMIT)
    tokenizer = build_tokenizer(words, planted.context_size)
    ids = [tokenizer(document)["input_ids"] for document in training]
    settings = (run, config.log_every, config.checkpoint_every, device, group, config.launch.shards > 1)
    model = train_model(planted, ids, tokenizer, *settings)
    record = {
        "config": asdict(planted),
        "data": config.data.path,
        **measure(model, [tokenizer(document)["input_ids"] for document in heldout], tokenizer, group),
        "entropy": None,
        "seconds": round(time.monotonic() - start, 1),
    }
    if not run.writes:
        return {}
    with atomic_folder(run.path / "model", replace=True) as partial:
        save_model(model, tokenizer, partial, record)
    return summary_of(run.path / "model") | {"cached": False}


def summary_of(folder: Path) -> dict[str, Any]:
    """The numbers of a trained model. `entropy` bounds the language's entropy from above, in nats per token."""
    record = read_json(folder / "planted.json")
    config = record["config"]
    return {
        "loss_heldout": record["loss_heldout"],
        "entropy": record["entropy"],
        "parameters": record["parameters"],
        "steps": config["steps"],
        "tokens": config["steps"] * config["batch_size"] * config["context_size"],
        "seconds": record["seconds"],
        "sha256": record["sha256"]["model.safetensors"],
    }
