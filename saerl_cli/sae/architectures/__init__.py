"""The losses of the architectures and their gradients, in closed form. A file a family.

With W the encoder and D the decoder, a feature a row, x_c the centred input and y the target (the input itself, but for
a transcoder), n tokens in the batch, and e = x^ - y:

    z = x_c W^T + b_enc      x^ = f D + b_dec      loss = 1/n sum (|e|^2 + weight * penalty)

    relu        f = relu(z)                        penalty = sum_i f_i |D_i|
    topk        f = relu(z) of the k features with the largest z_i |D_i|
    batchtopk   the same, k n of the batch
    matryoshka  batchtopk; |e|^2 summed over prefixes of the features, each reconstructing with b_dec alone
    jumprelu    f = z 1[z > theta]                 penalty of firing (`forms.jumprelu`)
    gated       f = 1[z > 0] relu((z - b_enc) e^r_mag + b_mag)
                penalty = sum_i relu(z_i) |D_i|, and + |relu(z) D + b_dec - y|^2 with D and b_dec held constant

Sources: Bricken et al. 2023 and Anthropic, April 2024 (relu); Gao et al. 2024 (topk); Bussmann et al. 2024, 2025
(batchtopk, matryoshka); Rajamanoharan et al. 2024b and Anthropic, January 2025 (jumprelu); Rajamanoharan et al. 2024a
(gated). Choosing by z |D| is what the folded, unit-norm SAE that is saved does, so that norms are free.
"""

from saerl_cli.config.sae import Architecture
from saerl_cli.sae.architectures.gated import gated
from saerl_cli.sae.architectures.jumprelu import jumprelu
from saerl_cli.sae.architectures.matryoshka import matryoshka
from saerl_cli.sae.architectures.relu import relu
from saerl_cli.sae.architectures.topk import batchtopk, topk

FORMS = {
    Architecture.relu: relu,
    Architecture.topk: topk,
    Architecture.batchtopk: batchtopk,
    Architecture.matryoshka: matryoshka,
    Architecture.jumprelu: jumprelu,
    Architecture.gated: gated,
}
"""Architecture -> `form(parameters, batch, config, weight) -> Outcome`."""
