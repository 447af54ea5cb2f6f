"""The architectures of SAEs, a file each: the loss and its gradients in closed form, and what is saved of it.

To add an architecture you write
  1. its name in `Architecture` (`saerl_cli/config/sae.py`), and in `SaeConfig` at the settings that it reads;
  2. NAME.py here with every part of `common.Parts`: `loss` below all, from what `common` has; where another one's part
     fits, that (`fold = relu.fold`). It is saved as one of the three forms of `saerl_cli.sae.autoencoder`;
  3. `conf/sae/NAME.yaml`.

With W the encoder and D the decoder, a feature a row, x_c the centred input and y the target (the input itself, but for
a transcoder), n tokens in the batch, and e = x^ - y:

    z = x_c W^T + b_enc      x^ = f D + b_dec      loss = 1/n sum (|e|^2 + weight * penalty)

    relu        f = relu(z)                        penalty = sum_i f_i |D_i|
    topk        f = relu(z) of the k features with the largest z_i |D_i|
    batchtopk   the same, k n of the batch
    matryoshka  batchtopk; |e|^2 summed over prefixes of the features, each reconstructing with b_dec alone
    jumprelu    f = z 1[z > theta]                 penalty of firing (`jumprelu`)
    gated       f = 1[z > 0] relu((z - b_enc) e^r_mag + b_mag)
                penalty = sum_i relu(z_i) |D_i|, and + |relu(z) D + b_dec - y|^2 with D and b_dec held constant

Sources: Bricken et al. 2023 and Anthropic, April 2024 (relu); Gao et al. 2024 (topk); Bussmann et al. 2024, 2025
(batchtopk, matryoshka); Rajamanoharan et al. 2024b and Anthropic, January 2025 (jumprelu); Rajamanoharan et al. 2024a
(gated). Choosing by z |D| is what the folded, unit-norm SAE that is saved does, so that norms are free.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from saerl_cli.config.sae import Architecture
from saerl_cli.sae.architectures.common import Parts


def parts_of(architecture: Architecture) -> Parts:
    """Return the file of an architecture.

    Raises:
        NotImplementedError: there is no such file, or it lacks a part.
    """
    place = f"saerl_cli/sae/architectures/{architecture.value}.py"
    name = f"{__name__}.{architecture.value}"
    if find_spec(name) is None:
        raise NotImplementedError(f"sae.architecture={architecture.value} has no file {place}")
    module: Any = import_module(name)
    missing = [part for part in Parts.__annotations__ if not hasattr(module, part)]
    if missing:
        raise NotImplementedError(f"{place} lacks {', '.join(missing)}: see saerl_cli/sae/architectures/__init__.py")
    return cast(Parts, module)
