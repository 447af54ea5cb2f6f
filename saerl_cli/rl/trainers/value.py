"""A critic that runs inside the forward pass of a causal language model: a head, or a model of its own."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput, disable_dropout_in_model

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


class ValueModel(nn.Module):
    """V(s) by a language model of its own: a trunk [B, L] to [B, L, width], and a head."""

    def __init__(self, trunk: nn.Module, width: int):
        super().__init__()
        self.trunk, self.head = trunk, ValueHead(width)

    def forward(self, **inputs: Any) -> Tensor:
        """Token ids, mask and positions [B, L] to values [B, L], float32."""
        return self.head(self.trunk(**inputs).last_hidden_state)


def own_trunk(model: Any) -> nn.Module:
    """A trainable copy of a model's layers, without its head, in float32 and without dropout."""
    trunk = copy.deepcopy(model.base_model).float().requires_grad_(True)
    disable_dropout_in_model(trunk)
    return trunk


def add_value_head(model: Any, detach: bool = True, trunk: nn.Module | None = None) -> ValueHead | ValueModel:
    """Give a model with TRL's fused head a value head; its scoring passes then return `PolicyValueOutput`.

    The head runs inside the wrapped module's forward, which DDP needs to see every trainable parameter used.

    Args:
        model: a causal language model (below PEFT) on which `trl.trainer.utils.add_fused_lm_head` was called.
        detach: keep the value's gradient from the policy, so that it moves nothing but the head.
        trunk: of a separate critic; None for a head on the policy's own hidden state.

    Returns:
        The critic, float32, on the model's device.
    """
    width = model.config.get_text_config().hidden_size
    critic = (ValueHead(width) if trunk is None else ValueModel(trunk, width)).to(model.device)
    setattr(model, NAME, critic)
    fused = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against the signature
    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        if trunk is not None:
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
            values = getattr(model, NAME)(**inputs)
            return PolicyValueOutput(**fused(*args, fused_lm_head=True, **kwargs), state_values=values)
        hidden: list[Tensor] = []
        hook = model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
        try:
            out = fused(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        state = hidden[0].detach() if detach else hidden[0]  # [B, L, width]
        return PolicyValueOutput(**out, state_values=getattr(model, NAME)(state))

    model.forward = forward
    return critic


def is_value_parameter(name: str) -> bool:
    """Whether a parameter of the policy belongs to the value head."""
    return f".{NAME}." in f".{name}"


def without_value_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state without the value head, which is no part of the policy."""
    return {name: tensor for name, tensor in state.items() if not is_value_parameter(name)}
