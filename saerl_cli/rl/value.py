"""A value head that runs inside the forward pass of a causal language model."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

NAME = "v_head"
"""The head's attribute on the base model, hence part of its parameters' names."""


@dataclass
class PolicyValueOutput(FusedCausalLMOutput):
    """TRL's output of a scoring pass, and the value of the state at every position.

    A declared field, because an undeclared key is lost when DDP rebuilds the output; not called `values`, because that
    would hide the method of the dictionary it is.
    """

    state_values: Tensor | None = None


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


def add_value_head(model: Any, detach: bool = True) -> ValueHead:
    """Give a model with TRL's fused head a value head; its scoring passes then return `PolicyValueOutput`.

    The head runs inside the wrapped module's forward, which DDP needs to see every trainable parameter used.

    Args:
        model: a causal language model (below PEFT) on which `trl.trainer.utils.add_fused_lm_head` was called.
        detach: keep the value's gradient from the trunk, so that it moves nothing but the head.

    Returns:
        The head, float32, on the model's device.
    """
    head = ValueHead(model.config.get_text_config().hidden_size).to(model.device)
    setattr(model, NAME, head)
    fused = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        hidden: list[Tensor] = []
        hook = model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
        try:
            out = fused(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        state = hidden[0].detach() if detach else hidden[0]  # [B, L, width]
        return PolicyValueOutput(**out, state_values=getattr(model, NAME)(state))

    model.forward = forward
    return head


def is_value_parameter(name: str) -> bool:
    """Whether a parameter of the policy belongs to the value head."""
    return f".{NAME}." in f".{name}"


def without_value_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state without the value head, which is no part of the policy."""
    return {name: tensor for name, tensor in state.items() if not is_value_parameter(name)}
