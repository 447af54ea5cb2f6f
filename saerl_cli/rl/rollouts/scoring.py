"""One forward pass that scores given tokens: their log-probabilities and entropies, and the critic's values.

`add_scoring_head` replaces a model's `forward` once, so that all of it runs inside what DDP wraps, which needs to see
every trainable parameter used. Log-probabilities come from TRL's fused head or, where the vocabulary head is plain and
frozen, from `FrozenHead`: with z = (h W^T + b) / T and p = softmax(z), the gradient of a token's log-probability is
known before anything comes back from the loss,

    d logp / dh = (W_y - sum_v p_v W_v) / T

so the forward pass computes it while the logits of a tile of tokens are there, and the backward pass multiplies it by a
number a token. TRL computes the logits again, and on a CPU those of the prompt's tokens, too, which are not scored.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from trl.trainer.utils import FusedCausalLMOutput, disable_dropout_in_model

from saerl_cli.config.algo import LOGITS_HELD

NAME = "v_head"
"""The critic's attribute on the base model, hence part of its parameters' names."""
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of models that change logits between head and softmax: those keep TRL's head."""


@dataclass
class ScoredOutput(FusedCausalLMOutput):
    """TRL's output of a scoring pass, and the value of the state at every position.

    A declared field, because an undeclared key is lost when DDP rebuilds the output; not called `values`, because that
    would hide the method of the dictionary it is.
    """

    state_values: Tensor | None = None


# --- the critic ------------------------------------------------------------------------------------------------------


class ValueHead(nn.Module):
    """V(s) as a linear function of the last hidden state, zero at the start; [..., width] to [...]."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., width] to values [...], float32."""
        return self.out(hidden.float()).squeeze(-1)


class ValueModel(nn.Module):
    """V(s) by a language model of its own: a trunk [batch, seq] to [batch, seq, width], and a head."""

    def __init__(self, trunk: nn.Module, width: int):
        super().__init__()
        self.trunk, self.head = trunk, ValueHead(width)

    def forward(self, **inputs: Any) -> Tensor:
        """Token ids, mask and positions [batch, seq] to values [batch, seq], float32."""
        return self.head(self.trunk(**inputs).last_hidden_state)


def copy_trunk(model: Any) -> nn.Module:
    """Copy a model's layers without its head, trainable, in float32 and without dropout: a separate critic's."""
    trunk = copy.deepcopy(model.base_model).float().requires_grad_(True)
    disable_dropout_in_model(trunk)
    return trunk


def add_critic(model: Any, trunk: nn.Module | None = None) -> ValueHead | ValueModel:
    """Give a causal language model (below PEFT) a critic, float32, on its device; `add_scoring_head` runs it.

    Args:
        model: the language model.
        trunk: of a separate critic (`copy_trunk`); None for a head on the policy's own hidden state.
    """
    width = model.config.get_text_config().hidden_size
    critic = (ValueHead(width) if trunk is None else ValueModel(trunk, width)).to(model.device)
    setattr(model, NAME, critic)
    return critic


def is_value_parameter(name: str) -> bool:
    """Tell whether a parameter of the policy belongs to the critic."""
    return f".{NAME}." in f".{name}"


def without_critic(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave the critic, which is no part of the policy, out of a model's state."""
    return {name: tensor for name, tensor in state.items() if not is_value_parameter(name)}


# --- the head --------------------------------------------------------------------------------------------------------


class FrozenHead(torch.autograd.Function):
    """Log-probability and entropy of every token; differentiable in `hidden` through the log-probability alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """hidden: [n, width], weight: [vocabulary, width], labels: [n] -> log-probabilities and entropies, [n]."""
        parts: list[tuple[Tensor, Tensor]] = []
        slopes = []
        tile = max(16, LOGITS_HELD // len(weight))
        for h, y in zip(hidden.split(tile), labels.split(tile), strict=True):
            logits = linear(h, weight, bias).float()  # [tile, vocabulary]
            if temperature != 1:
                logits = logits / temperature
            normaliser = logits.logsumexp(-1)
            chosen = logits.gather(-1, y[:, None]).squeeze(-1)
            p = (logits - normaliser[:, None]).exp_()
            parts.append((chosen - normaliser, normaliser - torch.linalg.vecdot(p, logits)))
            if ctx.needs_input_grad[0]:
                p.scatter_add_(-1, y[:, None], p.new_full((len(y), 1), -1.0))
                slopes.append((p.to(weight.dtype) @ weight).float() / -temperature)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        ctx.dtype = hidden.dtype
        logps, entropies = (torch.cat(columns) for columns in zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Compute the gradient of `hidden`."""
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.dtype), None, None, None, None


def score_frozen(head: Any, hidden: Tensor, labels: Tensor, temperature: float) -> FusedCausalLMOutput:
    """Score tokens with a frozen head.

    Args:
        head: linear, [width] to [vocabulary].
        hidden: last hidden states, [batch, seq, width].
        labels: [batch, seq], -100 where nothing is scored.
        temperature: logits are divided by it.

    Returns:
        log_probs and entropy [batch, seq - 1], 0 where nothing is scored.
    """
    labels = labels[:, 1:]
    mask = labels != -100
    scored = mask.reshape(-1).nonzero()[:, 0]
    rows = hidden[:, :-1].flatten(0, 1).index_select(0, scored)
    columns = FrozenHead.apply(rows, head.weight, head.bias, labels[mask], temperature)
    log_probs, entropy = (column.new_zeros(mask.shape).masked_scatter(mask, column) for column in columns)
    loss = -log_probs.sum() / mask.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask)


def add_scoring_head(model: Any, temperature: float, detach: bool = True, entropy_gradient: bool = False) -> None:
    """Make `model(..., labels=..., fused_lm_head=True)` return a `ScoredOutput`.

    Args:
        model: a causal language model (below PEFT) on which `trl.trainer.utils.add_fused_lm_head` was called, with a
            critic (`add_critic`) or without.
        temperature: as given there.
        detach: keep the value's gradient from the policy, so that it moves nothing but the critic.
        entropy_gradient: whether entropies need a gradient, which only TRL's head gives.
    """
    config = model.config.get_text_config()
    scaled = any(getattr(config, name, None) is not None for name in SCALES) or getattr(config, "num_experts", None)
    fused = model.forward

    def head_of(labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """The vocabulary head, where it can be scored with as it is: on a CPU, frozen."""
        head = model.get_output_embeddings()
        plain = labels is not None and labels.device.type == "cpu" and not head.weight.requires_grad
        if scaled or entropy_gradient or kwargs.keys() & {"shift_labels", "num_items_in_batch", "output_router_logits"}:
            return None
        return head if plain else None

    @functools.wraps(type(model).forward)  # generate() validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        given = {} if labels is None else {"labels": labels}
        if not fused_lm_head:
            return fused(*args, **given, **kwargs)
        head, critic = head_of(labels, kwargs), getattr(model, NAME, None)
        hidden: list[Tensor] = []
        hook = model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
        try:
            if head is None:
                out = fused(*args, fused_lm_head=True, **given, **kwargs)
            else:
                model.base_model(*args, **kwargs, use_cache=False)
                assert labels is not None
                out = score_frozen(head, hidden[0], labels, temperature)
        finally:
            hook.remove()
        values = None
        if isinstance(critic, ValueModel):
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
            values = critic(**inputs)
        elif critic is not None:
            values = critic(hidden[0].detach() if detach else hidden[0])  # [batch, seq]
        return ScoredOutput(**out, state_values=values)

    model.forward = forward
