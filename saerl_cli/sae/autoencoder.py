"""A trained sparse autoencoder, or transcoder, as it is saved and spliced into a model.

    pre = (x - b_dec) W_enc + b_enc          x: [..., d_in], pre: [..., d_sae]; a transcoder takes x itself
    f   = act(pre)                           standard: ReLU;  topk: the k largest, then ReLU;
                                             jumprelu: pre where pre > threshold, else 0
    x^  = f W_dec + b_dec                    [..., d_out]; d_out = d_in but for a transcoder

Row i of `W_dec` is the direction of feature i. The SAE acts on raw activations: whatever scale training used has been
folded into the weights (`saerl_cli.sae.train`), and decoder rows have norm 1, so that f is in the units of x.
BatchTopK, Matryoshka and Gated SAEs are saved as the JumpReLU that they equal.
"""

from typing import Any

import torch
from torch import Tensor, nn

ARCHITECTURES = ("standard", "topk", "jumprelu")


class SAE(nn.Module):
    """A frozen sparse autoencoder for inference.

    Attributes:
        architecture: `standard` (ReLU), `topk` or `jumprelu`, the names of the SAELens format.
        k: active features a token, at most (topk); None otherwise.
        threshold: [d_sae], what a pre-activation must exceed (jumprelu); None otherwise.
        site: where the activations come from, for instance `mlp_out.3`.
        target: the site that a transcoder predicts from those at `site`; None for an autoencoder.
        metadata: what `saerl_cli.sae.files` keeps beside the weights.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        architecture: str = "standard",
        k: int | None = None,
        d_out: int | None = None,
    ):
        """Zero weights; `d_out` makes it a transcoder."""
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unknown SAE architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
        if (architecture == "topk") != (k is not None):
            raise ValueError(f"k belongs to topk and only to it, got architecture={architecture!r}, k={k}")
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae={d_sae}, got {k}")
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out or d_in
        self.architecture, self.k = architecture, k
        self.transcoder = d_out is not None
        self.site: str | None = None
        self.target: str | None = None
        self.metadata: dict[str, Any] = {}
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.threshold = nn.Parameter(torch.zeros(d_sae)) if architecture == "jumprelu" else None
        self.requires_grad_(False)

    def pre_activations(self, x: Tensor) -> Tensor:
        """`(x - b_dec) W_enc + b_enc` (a transcoder: `x W_enc + b_enc`): [..., d_in] -> [..., d_sae]."""
        # The offset is applied to the bias, which is one vector, and not to x, which is many.
        bias = self.b_enc if self.transcoder else self.b_enc - self.b_dec @ self.W_enc
        return nn.functional.linear(x, self.W_enc.T, bias)

    def activate(self, pre: Tensor) -> Tensor:
        """Feature activations of pre-activations, both [..., d_sae]; at least 0."""
        if self.k is not None:
            values, indices = pre.topk(self.k, dim=-1, sorted=False)  # [..., k]
            return torch.zeros_like(pre).scatter(-1, indices, values.relu())
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        return pre.relu()

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations f: [..., d_in] -> [..., d_sae]."""
        return self.activate(self.pre_activations(x))

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k candidates of a topk SAE: values (some may be 0) and feature indices, both [..., k].

        Raises:
            ValueError: the SAE is not topk.
        """
        if self.k is None:
            raise ValueError("encode_sparse needs a topk SAE")
        values, indices = self.pre_activations(x).topk(self.k, dim=-1, sorted=False)
        return values.relu(), indices

    def decode(self, f: Tensor) -> Tensor:
        """`f W_dec + b_dec`: [..., d_sae] -> [..., d_out]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction, or prediction, x^: [..., d_in] -> [..., d_out]."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """What `print` shows."""
        k = "" if self.k is None else f", k={self.k}"
        out = f", d_out={self.d_out}" if self.transcoder else ""
        return f"d_in={self.d_in}, d_sae={self.d_sae}{out}, architecture={self.architecture}{k}, site={self.site}"
