"""Do SAEs of the same site, trained apart, find the same directions?

For decoder rows a_i and b_j of norm 1:

    mmcs      mean over features of the largest cosine with a feature of the other SAE, averaged over both ways
    matched   mean cosine of the one-to-one pairing of features with the largest total (Hungarian algorithm)
    shared    share of those pairs with a cosine above 0.7 (Paulo and Belrose 2025)

The same of two sets of random directions is what chance gives at this width: `mmcs_random`, `matched_random`,
`shared_random`. `seeds` are those of the two trainings, where recorded: SAEs of one seed begin with the same random
directions, so that their agreement says nothing.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saerl_cli.sae.metrics import COSINES_AT_ONCE

if TYPE_CHECKING:
    from saerl_cli.sae.autoencoder import SAE

MATCHED_UP_TO = 8192
"""Features above which no pairing is computed: its time grows with their number to the third."""
SHARED = 0.7


def stability(saes: "Mapping[str, SAE]", seed: int = 0) -> list[dict[str, Any]]:
    """`compared` for every two SAEs of the same site, target and width.

    Args:
        saes: by any name.
        seed: of the random directions.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, sae in saes.items():
        groups.setdefault((sae.site, sae.target, sae.d_sae, sae.d_out), []).append(name)
    found = []
    for (site, _, d_sae, d_out), names in groups.items():
        if len(names) < 2:
            continue
        generator = torch.Generator().manual_seed(seed)
        chance = compared(*(torch.randn(d_sae, d_out, generator=generator) for _ in range(2)))
        for first, second in combinations(names, 2):
            seeds = [seed_of(saes[first]), seed_of(saes[second])]
            pair = {"saes": [first, second], "site": site, "d_sae": d_sae, "seeds": seeds}
            numbers = compared(saes[first].W_dec, saes[second].W_dec)
            random = {f"{key}_random": value for key, value in chance.items()}
            found.append(pair | numbers | random)
    return found


def seed_of(sae: "SAE") -> int | None:
    """The seed that an SAE's training began with, where recorded."""
    return ((sae.metadata.get("saerl") or {}).get("training") or {}).get("seed")


@torch.no_grad()
def compared(a: Tensor, b: Tensor) -> dict[str, float]:
    """mmcs, matched and shared of two decoders, both [d_sae, d_out]; only mmcs where they are very wide."""
    a, b = (normalize(decoder.float(), dim=-1) for decoder in (a, b))
    numbers = {"mmcs": (mean_max(a, b) + mean_max(b, a)) / 2}
    if len(a) <= MATCHED_UP_TO:
        from scipy.optimize import linear_sum_assignment

        cosines = (a @ b.T).cpu()
        pairs = torch.stack([torch.from_numpy(index) for index in linear_sum_assignment(cosines.numpy(), True)])
        chosen = cosines[pairs[0], pairs[1]]
        numbers["matched"] = float(chosen.double().mean())
        numbers["shared"] = float((chosen > SHARED).double().mean())
    return numbers


def mean_max(a: Tensor, b: Tensor) -> float:
    """Mean over rows of a of the largest cosine with a row of b; rows have norm 1."""
    return sum(float((part @ b.T).max(dim=1).values.double().sum()) for part in a.split(COSINES_AT_ONCE)) / len(a)
