"""Converting the coefficients of published recipes to the one loss that is trained.

In the canonical form squared errors are summed over dimensions, penalties over features, and both averaged over tokens:

    loss = mean_t |x - x^|^2 + l1 mean_t sum_i f_i |W_dec_i|

A recipe in another form has the same gradient, up to a factor of the whole loss that Adam does not see, with
`canonical_l1`. Derivations: divide the recipe's loss by what its squared error is divided by.
"""

from typing import Any

from saerl_cli.config.sae import AuxkUnit, L1Unit, SaeConfig
from saerl_cli.config.settings import applies


def canonical_l1(config: SaeConfig, d_in: int, variance: float | None = None) -> float:
    """`config.l1` in the canonical form.

    Args:
        config: settings; `l1_unit` says what the recipe's coefficient is a multiple of.
        d_in: number of dimensions of the error (d_out of a transcoder).
        variance: mean squared distance of the scaled inputs from their mean; needed for `l1_unit=fvu` alone.

    Raises:
        ValueError: the variance is needed and missing, or not positive.
    """
    return config.l1 * _factor(config, d_in, variance)[0]


def conversion_line(config: SaeConfig, d_in: int, variance: float | None = None) -> str | None:
    """One line that says what `l1` is in the canonical form; None where it already is, or is not used.

    Example:
        `l1 = 0.00086 with the error averaged over dimensions is 0.44 in the canonical form (x d_in = 512)`
    """
    if not applies(config, "l1") or config.l1_unit is L1Unit.canonical:
        return None
    forms = {
        L1Unit.mean_over_dims: "the error averaged over dimensions",
        L1Unit.batch_sum: "the L1 summed over the batch",
        L1Unit.fvu: "the error divided by the variance of the inputs",
    }
    form = f"l1 = {config.l1:g} with {forms[config.l1_unit]}"
    if config.l1_unit is L1Unit.fvu and variance is None:
        return f"{form} is {config.l1:g} x that variance in the canonical form"
    factor, name = _factor(config, d_in, variance)
    return f"{form} is {config.l1 * factor:.3g} in the canonical form (x {name} = {factor:g})"


def _factor(config: SaeConfig, d_in: int, variance: float | None) -> tuple[float, str]:
    """What `l1` is multiplied by, and its name."""
    if config.l1_unit is L1Unit.mean_over_dims:
        return d_in, "d_in"
    if config.l1_unit is L1Unit.batch_sum:
        return config.batch_size, "batch_size"
    if config.l1_unit is L1Unit.fvu:
        if variance is None or not variance > 0:
            raise ValueError(f"sae.l1_unit=fvu needs the variance of the inputs, > 0, got {variance}")
        return variance, "variance"
    return 1, ""


def auxk_weight(config: SaeConfig, variance: Any, residual_variance: Any) -> Any:
    """What AuxK's squared error is multiplied by in the canonical form.

    Args:
        config: settings; `auxk_unit` says what `auxk` is relative to.
        variance: mean squared distance of the targets from their mean, a number or a tensor.
        residual_variance: that of the error of the main reconstruction.
    """
    if config.auxk_unit is AuxkUnit.relative:
        return config.auxk * variance / residual_variance
    return config.auxk / residual_variance if config.auxk_unit is AuxkUnit.residual else config.auxk
