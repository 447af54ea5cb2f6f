"""Log-probabilities out of a frozen vocabulary head, with one product in the backward pass less than TRL's, or two.

With z = (h W^T + b) / T and p = softmax(z), the gradient of a token's log-probability is known before anything comes
back from the loss,

    d logp / dh = (W_y - sum_v p_v W_v) / T

so the forward pass computes it while the logits of a tile of tokens are there, and the backward pass multiplies it by a
number a token. TRL computes the logits again, and on a CPU those of the prompt's tokens, too, which are not scored.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from trl.trainer.utils import FusedCausalLMOutput

from saerl_cli.config.algo import HELD

SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of models that change logits between head and softmax: those keep TRL's head."""


class FrozenHead(torch.autograd.Function):
    """Log-probability and entropy of every token; differentiable in `hidden` through the log-probability alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """hidden: [n, width], weight: [vocabulary, width], labels: [n] -> log-probabilities and entropies, [n]."""
        parts: list[tuple[Tensor, Tensor]] = []
        slopes = []
        tile = max(16, HELD // len(weight))
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
        """The gradient of `hidden`."""
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(ctx.dtype), None, None, None, None


def add_frozen_head(model: Any, temperature: float) -> None:
    """Score with `FrozenHead` where TRL's fused head would do the same: a plain frozen head, on a CPU.

    Args:
        model: a causal language model (below PEFT) on which `trl.trainer.utils.add_fused_lm_head` was called.
        temperature: as given there.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALES) or getattr(config, "num_experts", None):
        return
    fused = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        head = model.get_output_embeddings()
        ours = fused_lm_head and labels is not None and labels.device.type == "cpu" and not head.weight.requires_grad
        if not ours or kwargs.keys() & {"shift_labels", "num_items_in_batch", "output_router_logits"}:
            if labels is not None:
                kwargs["labels"] = labels
            return fused(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        assert labels is not None
        hidden = model.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        scored = mask.reshape(-1).nonzero()[:, 0]
        columns = FrozenHead.apply(
            hidden.flatten(0, 1).index_select(0, scored), head.weight, head.bias, labels[mask], temperature
        )
        log_probs, entropy = (column.new_zeros(mask.shape).masked_scatter(mask, column) for column in columns)
        loss = -log_probs.sum() / mask.sum().clamp(min=1)
        return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask)

    model.forward = forward
