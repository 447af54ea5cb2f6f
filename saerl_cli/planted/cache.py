"""The planted model: trained when first needed, then kept under the hash of its settings and checked on every use.

Importing this file loads no torch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import PlantedConfig
from saerl_cli.planted.documents import planted_documents
from saerl_cli.planted.language import VOCABULARY
from saerl_cli.planted.shape import model_shape
from saerl_cli.run.files import atomic_folder, read_json, sha256_file, write_json, write_safetensors
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.run.progress import say

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from saerl_cli.run.directory import Run

SPECIAL_TOKENS = 3
"""<pad>, <eos> and <unk> come before the words."""
TINY = PlantedConfig(
    documents=600, hidden_size=32, layers=3, heads=2, context_size=96, steps=60, batch_size=16, lr=1e-2
)
"""Trains in seconds and has learned little more than which words exist: for tests."""
THREADS = 2
"""CPU threads that train it: another number would add up in another order and make other bits."""
SOURCES = ("words.py", "language.py", "tokenizer.py", "shape.py", "train.py")
"""What decides the weights, beside the settings."""


def planted_shape(config: PlantedConfig) -> dict[str, Any]:
    """Keyword arguments of the planted model's `transformers.GPTNeoXConfig`."""
    return model_shape(config, len(VOCABULARY) + SPECIAL_TOKENS)


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """`$SAERL_CACHE`, else `$XDG_CACHE_HOME/saerl`, else `~/.cache/saerl`."""
    if folder := os.environ.get("SAERL_CACHE"):
        return Path(folder).expanduser().absolute()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser().absolute() / "saerl"
    return Path.home() / ".cache" / "saerl"


def planted_folder(config: PlantedConfig) -> Path:
    """Where the model of these settings is kept, whether or not it is there yet."""
    return cache_folder() / "planted" / cache_key(config)


def cache_key(config: PlantedConfig) -> str:
    """Hash of the settings and of the source that turns them into weights."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def planted_model(
    config: PlantedConfig,
    run: "Run | None" = None,
    log_every: int = 50,
    checkpoint_every: int = 200,
    group: ProcessGroup = ONE_PROCESS,
) -> Path:
    """The folder of the planted model, as `from_pretrained` reads it; trained first if it is missing or damaged.

    planted.json holds its settings, held-out loss, the language's entropy, training time and the SHA-256 of every file.

    Args:
        config: shape and training.
        run: where losses and checkpoints of a training go.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: steps between two checkpoints.
        group: the processes that wait for it. The first trains it alone, with `THREADS`, so that its bits do not
            depend on who asks first.

    Raises:
        ValueError: the cache folder cannot be written.
    """
    folder = planted_folder(config)
    if group.broadcast(damage(folder)) is None:
        return folder
    with alone(folder) if group.rank == 0 else contextlib.nullcontext():
        problem = group.broadcast(damage(folder))  # another process may have trained it meanwhile
        if problem is not None:
            if folder.exists():
                say(f"the cached model {folder} is damaged ({problem}); training it again")
            else:
                say("training the planted language model, once; later runs find it in the cache")
            if group.rank == 0:
                train_planted(config, folder, run, log_every, checkpoint_every)
            group.broadcast(None)
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with a cached model, or None: every file must have the hash that planted.json records."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        hashes = dict(read_json(folder / "planted.json")["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return "planted.json cannot be read"
    if "model.safetensors" not in hashes:
        return "planted.json names no weights"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != expected:
            return f"{name} has changed"
    return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cached model, waiting for a process that trains it. A dead process holds no lock."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write the cache {folder.parent}: {error.strerror}; set SAERL_CACHE=DIR") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is training the planted language model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- filling it ------------------------------------------------------------------------------------------------------


def train_planted(
    config: PlantedConfig, folder: Path, run: "Run | None", log_every: int, checkpoint_every: int
) -> None:
    """Train the planted model and put it into the cache."""
    import torch

    from saerl_cli.planted.tokenizer import build_tokenizer
    from saerl_cli.planted.train import train_model

    start = time.monotonic()
    tokenizer = build_tokenizer(VOCABULARY, config.context_size)
    ids = tokenizer.get_vocab()
    training = [[ids[word] for word in document.words] for document in planted_documents(config, "train")]
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model = train_model(config, training, tokenizer, run, log_every, checkpoint_every)
    finally:
        torch.set_num_threads(threads)
    heldout = list(planted_documents(config, "heldout"))
    record = {
        "config": asdict(config),
        **measure(model, [[ids[word] for word in document.words] for document in heldout], tokenizer),
        "entropy": sum(document.nats for document in heldout) / sum(len(document.words) + 1 for document in heldout),
        "seconds": round(time.monotonic() - start, 1),
    }
    with atomic_folder(folder, replace=True) as partial:
        save_model(model, tokenizer, partial, record)


def measure(
    model: "GPTNeoXForCausalLM",
    heldout: list[list[int]],
    tokenizer: "PreTrainedTokenizerFast",
    group: ProcessGroup = ONE_PROCESS,
) -> dict[str, Any]:
    """Number of parameters, and loss in nats per token on held-out documents."""
    from saerl_cli.planted.train import end_id, heldout_loss

    loss = heldout_loss(model, heldout, end_id(tokenizer), group=group)
    return {"parameters": model.num_parameters(), "loss_heldout": loss}


def save_model(
    model: "GPTNeoXForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path, record: dict[str, Any]
) -> None:
    """Write a model folder, with `record`, versions and hashes in planted.json."""
    import torch
    import transformers

    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    transformers.GenerationConfig(do_sample=True, **special).save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
    tokenizer.save_pretrained(folder)
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(folder / "planted.json", {**record, "versions": versions, "sha256": hashes})
