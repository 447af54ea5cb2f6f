"""Training of a small language model: packed rows, AdamW, cosine schedule; on the CPU the same bits every time.

Batches are a function of seed and step, so a run continues from a checkpoint as if it had never stopped.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saerl_cli.config.groups import PlantedConfig
from saerl_cli.planted.shape import model_shape
from saerl_cli.run import shards
from saerl_cli.run.files import write_safetensors
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.run.progress import progress

if TYPE_CHECKING:
    from saerl_cli.run.directory import Run

WARMUP = 0.05
"""Share of the steps over which the learning rate rises linearly."""
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05
"""Decoupled, on matrices only."""
MAX_GRAD_NORM = 1.0
IGNORED = -100
"""Label of positions that are not predicted."""


def train_model(
    config: PlantedConfig,
    documents: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    run: "Run | None" = None,
    log_every: int = 50,
    checkpoint_every: int = 200,
    device: torch.device | str = "cpu",
    group: ProcessGroup = ONE_PROCESS,
    split: bool = False,
) -> GPTNeoXForCausalLM:
    """A GPT-NeoX model trained from scratch to continue the documents.

    Args:
        config: shape, number of steps, learning rate, seed.
        documents: token ids of each document, without end tokens.
        tokenizer: gives the vocabulary size and the end token.
        run: where losses and checkpoints go; training continues from its latest checkpoint.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: steps between two checkpoints.
        device: where to train.
        group: the processes that share the rows of every batch; all end with the same weights.
        split: whether weights and AdamW's state are split over them meanwhile.

    Raises:
        ValueError: there is too little text for one row, or a row a process, or the loss is not finite.
    """
    rows = pack_rows(documents, config.context_size, end_id(tokenizer))
    if len(rows) < group.world_size:
        raise ValueError(f"the text fills {len(rows)} rows, fewer than launch.num_processes={group.world_size}")
    model = new_model(config, len(tokenizer))
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    if split:
        shards.split(model, model.gpt_neox.layers)
    optimizer = new_optimizer(model)
    start = resume(model, optimizer, run)
    for step in progress(range(start, config.steps), "language model"):
        batch = batch_of(rows, config, step).to(device)
        loss = train_step(model, optimizer, batch, learning_rate(config, step), group)
        done = step + 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done}; lower model.planted.lr={config.lr}")
        if run and (done % log_every == 0 or done == config.steps):
            run.log(done, loss=loss, lr=learning_rate(config, step), tokens=done * batch.numel())
        if run and done % checkpoint_every == 0 and done < config.steps:
            tensors = training_state(model, optimizer, run.writes)
            if run.writes:
                with run.save_checkpoint(done) as folder:
                    write_safetensors(folder / "training.safetensors", tensors)
    return whole_model(model, config, len(tokenizer)) if split else model.cpu().eval()


def whole_model(model: GPTNeoXForCausalLM, config: PlantedConfig, vocabulary_size: int) -> GPTNeoXForCausalLM:
    """A split model, whole in every process and on the CPU."""
    weights = shards.on_cpu(model.state_dict().items(), wanted=True)
    shards.leave(model)
    found = new_model(config, vocabulary_size)
    found.load_state_dict(weights)
    return found.eval()


def new_model(config: PlantedConfig, vocabulary_size: int) -> GPTNeoXForCausalLM:
    """The model with its initial weights, a function of `config.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPTNeoXForCausalLM(GPTNeoXConfig(**model_shape(config, vocabulary_size)))


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the end token, which also separates documents."""
    identity = tokenizer.eos_token_id
    assert isinstance(identity, int)
    return identity


# --- data ------------------------------------------------------------------------------------------------------------


def pack_rows(documents: Sequence[list[int]], context_size: int, end: int) -> Tensor:
    """Documents one after the other, an end token after each, cut into rows `[n_rows, context_size]`.

    A row starts where a document starts: one that does not fit is cut and begins the next row anew, so no text is lost,
    and the model learns the beginning of a document with and without an end token before it. A document longer than a
    row is cut into pieces first.

    Raises:
        ValueError: the text does not fill one row.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        for piece in pieces([*document, end], context_size):
            row += piece
            if len(row) >= context_size:
                overflow = len(row) > context_size
                rows.append(row[:context_size])
                row = list(piece) if overflow else []
    if not rows:
        raise ValueError(f"the text is shorter than one row of context_size={context_size} tokens")
    return torch.tensor(rows)


def pieces(tokens: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive pieces of at most `size` tokens."""
    return (list(tokens[start : start + size]) for start in range(0, len(tokens), size))


def batch_of(rows: Tensor, config: PlantedConfig, step: int) -> Tensor:
    """The rows of a step, `[batch_size, context_size]`: an order an epoch, incomplete batches left out."""
    size = min(config.batch_size, len(rows))
    epoch, index = divmod(step, len(rows) // size)
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[index * size : (index + 1) * size]]


# --- optimisation ----------------------------------------------------------------------------------------------------


def new_optimizer(model: GPTNeoXForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def learning_rate(config: PlantedConfig, step: int) -> float:
    """Linear rise over the first `WARMUP` of the steps, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def train_step(
    model: GPTNeoXForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    lr: float,
    group: ProcessGroup = ONE_PROCESS,
) -> float:
    """One step on `[batch, sequence]` tokens, every process on rows of its own; returns the loss in nats per token."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    own = batch[group.rank :: group.world_size]
    loss = next_token_loss(model, own, own, "mean") * (len(own) / len(batch))  # this process's part of the mean
    optimizer.zero_grad()
    if shards.is_split(model):
        (loss * group.world_size).backward()  # FSDP2 takes the mean of all processes' gradients
    else:
        loss.backward()
    if group.world_size > 1 and not shards.is_split(model):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        vector_to_parameters(group.all_reduce(parameters_to_vector(gradients)), gradients)
    shards.clip(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return group.all_reduce(loss.detach()).item()


def next_token_loss(model: GPTNeoXForCausalLM, tokens: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in nats of each token given those before it; `tokens` and `labels` are `[batch, sequence]`."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [batch, sequence - 1, vocabulary]
    return functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def heldout_loss(
    model: GPTNeoXForCausalLM,
    documents: Sequence[list[int]],
    end: int,
    batch_size: int = 64,
    group: ProcessGroup = ONE_PROCESS,
) -> float:
    """Nats per token over the documents and their end tokens, each read after one end token.

    What exceeds the context is read as a sequence of its own that starts at the last token already predicted.

    Args:
        model: the model, in evaluation mode.
        documents: token ids without end tokens.
        end: id of the end token.
        batch_size: sequences read at once.
        group: the processes that share the batches; all get the same number.
    """
    context_size = model.config.max_position_embeddings
    sequences = []
    for document in documents:
        tokens = [end, *document, end]
        sequences += [tokens[start : start + context_size] for start in range(0, len(tokens) - 1, context_size - 1)]

    def nats(part: slice) -> float:
        batch = [torch.tensor(sequence) for sequence in sequences[part]]
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED)  # [batch, longest]
        return next_token_loss(model, labels.clamp(min=0), labels, "sum").item()

    total = sum(group.map_batches(len(sequences), batch_size, nats))
    return total / sum(len(sequence) - 1 for sequence in sequences)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def training_state(model: GPTNeoXForCausalLM, optimizer: torch.optim.Optimizer, wanted: bool) -> dict[str, Tensor]:
    """What a restart needs beside the number of steps: weights and AdamW's state; for a process that writes them."""
    named = [(f"model.{name}", tensor) for name, tensor in model.state_dict().items()]
    for index, state in optimizer.state_dict()["state"].items():
        named += [(f"optimizer.{index}.{name}", tensor) for name, tensor in state.items()]
    return shards.on_cpu(named, wanted)


def resume(model: GPTNeoXForCausalLM, optimizer: torch.optim.Optimizer, run: "Run | None") -> int:
    """Load the run's latest checkpoint, if it has one; returns the number of steps done."""
    if run is None:
        return 0
    latest = run.latest_checkpoint()
    run.truncate(latest[0] if latest else 0)
    if latest is None:
        return 0
    step, folder = latest
    tensors = load_file(folder / "training.safetensors")
    for name, tensor in model.state_dict().items():
        tensor.copy_(shards.split_as(tensors[f"model.{name}"], tensor))
    moments = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    state = shards.optimizer_state(moments, optimizer)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
