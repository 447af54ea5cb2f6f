"""Standard errors of ratios of sums, without assuming that tokens are independent: those of one text are not."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Sums = dict[str, Tensor]
"""Sums over the tokens of each row, float64 [rows, ...], by name; `n` counts the tokens."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def by_row(values: Mapping[str, Tensor], row: Tensor, rows: int) -> Sums:
    """Sums of per-token values [n, ...] over the tokens of each row.

    Args:
        values: by name.
        row: the row of each token, [n].
        rows: how many there are.
    """
    return {
        name: value.new_zeros(rows, *value.shape[1:], dtype=torch.float64).index_add_(0, row, value.double())
        for name, value in values.items()
    }


def joined(parts: list[Sums]) -> Sums:
    """The rows of several parts as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pooled(rows: Sums, reduce: Reduce = alone) -> Sums:
    """Sums over all rows of all processes, [...]."""
    return {name: reduce(value.sum(0)) for name, value in rows.items()}


def jackknife(
    rows: Sums, statistics: Callable[[Sums], Mapping[str, Tensor]], reduce: Reduce = alone
) -> dict[str, float]:
    """Statistics of the pooled sums, each followed by `NAME_se`, its standard error with a row deleted at a time.

    With theta_r the statistic without row r and m its mean over R rows: se^2 = (R - 1) / R sum_r (theta_r - m)^2
    (Efron 1982). A row is a context, so that whatever ties its tokens together is in the error. Rows without tokens
    do not count; with a single row there are no errors, and they are left out.

    Args:
        rows: with several processes, this process's.
        statistics: of sums with any leading dimensions: [..., ] -> by name [...].
        reduce: sums a tensor over all processes.
    """
    total = pooled(rows, reduce)
    without = statistics({name: total[name] - value for name, value in rows.items()})
    used = rows["n"] > 0
    count = float(reduce(used.sum().double()))
    numbers = {}
    for name, value in statistics(total).items():
        numbers[name] = float(value)
        left_out = without[name][used]
        centre = reduce(left_out.sum()) / max(count, 1)
        squares = float(reduce((left_out - centre).square().sum()))
        if count > 1:
            numbers[f"{name}_se"] = ((count - 1) / count * squares) ** 0.5
    return numbers
