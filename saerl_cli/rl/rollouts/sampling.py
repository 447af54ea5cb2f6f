"""Sampling completions: one pass over the prompts, then one token a row and step.

`generate()` of transformers does the same with many options; here nothing is left but temperature, so that what is
sampled is what is scored, and a step costs little more than the model. Every row's random numbers are drawn
beforehand: what it samples follows from its own numbers and its own prompt, whatever the other rows do, and rows that
have ended are dropped from the batch.

Coefficients change a layer's output at the current token alone and nothing below it, so keys and values are cached as
in the base model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer

DROP_AT = 1 / 4
"""Share of the rows that must have ended before they are dropped: selecting rows copies all keys and values."""


def keeps_past(model: Any) -> bool:
    """Whether a model keeps its past in keys and values that grow by a token a step; others read all tokens again."""
    return model._supports_default_dynamic_cache() and not model._is_stateful and not model.config.is_encoder_decoder


@torch.no_grad()
def sample(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    eos_token_ids: Iterable[int],
    temperature: float | None,
    uniforms: Tensor | None = None,
) -> list[list[int]]:
    """One completion a row, up to and including its first end token.

    Args:
        model: a causal language model, or a PEFT model around one.
        ids: prompts padded on the left, [B, P].
        mask: 1 where there is a token, [B, P].
        max_new_tokens: longest completion.
        eos_token_ids: every id that ends one.
        temperature: logits are divided by it; None: the likeliest token is taken.
        uniforms: [B, max_new_tokens] in [0, 1), float64, what a token is drawn with; by default from the process's
            CPU generator.
    """
    device, ends = ids.device, torch.tensor(list(eos_token_ids), device=ids.device)
    if uniforms is None:
        uniforms = torch.rand(len(ids), max_new_tokens, dtype=torch.float64)
    uniforms = uniforms.to(device)
    rows = torch.arange(len(ids), device=device)  # which completions are still being written
    positions = token_positions(mask)  # [B, P]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if keeps_past(model) else None
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    tokens = torch.zeros(len(ids), max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((len(ids),), max_new_tokens, device=device)
    for step in range(max_new_tokens):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None, **last,
        )  # fmt: skip
        token = choose(out.logits[:, -1], temperature, uniforms[rows, step])  # [rows]
        tokens[rows, step] = token
        running = ~torch.isin(token, ends) & (lengths[rows] > step)
        lengths[rows[~running]] = lengths[rows[~running]].clamp(max=step + 1)
        alive = int(running.sum())
        if alive == 0:
            break
        if len(rows) - alive >= DROP_AT * len(rows):
            kept = running.nonzero()[:, 0]
            if cache is not None:
                cache.batch_select_indices(kept)
            rows, token, ids, mask, positions = (tensor[kept] for tensor in (rows, token, ids, mask, positions))
        following = token[:, None], positions[:, -1:] + 1
        if cache is None:
            following = torch.cat([ids, following[0]], 1), torch.cat([positions, following[1]], 1)
        ids, positions = following
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def choose(logits: Tensor, temperature: float | None, uniforms: Tensor) -> Tensor:
    """Token ids [B] from logits [B, vocabulary]: where the distribution function passes a uniform number [B]."""
    if temperature is None:
        return logits.argmax(-1)
    sums = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    # The last sum is 1 but for rounding; a number below it never finds a token of probability 0.
    found = torch.searchsorted(sums, (uniforms * sums[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the left; returns ids and mask, both [n, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right; returns ids and mask, both [n, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def token_positions(mask: Tensor) -> Tensor:
    """Number every token among those that are no padding; [batch, seq]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def reset_generation_config(model: Any, eos_token_ids: Iterable[int], pad_token_id: Any) -> None:
    """Drop generation settings that came with a model (top-k, penalties, suppressed tokens ...).

    Scoring knows the temperature alone, so anything else would make samples that the policy did not produce.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos_token_ids), pad_token_id=pad_token_id, bos_token_id=model.config.bos_token_id
    )


@contextmanager
def compact(model: nn.Module) -> Iterator[None]:
    """Splice with no more of each SAE than the coefficients of now need; they must not change inside.

    Features without a coefficient are neither encoded nor decoded (`needed_features`).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SparseCoeffLayer)]
    try:
        for layer in layers:
            layer.fix()
        yield
    finally:
        for layer in layers:
            layer.fixed = None
