"""Spreads of Gaussian laws that no Gaussian has: scales that are not positive, matrices that are not positive definite."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import DataError
from ppl.inference.groups.laws import Residual
from ppl.inference.groups.parts import Part
from ppl.inference.groups.records import _coordinates
from ppl.inference.groups.whitening import is_illegal

_SHOWN = 16  # entries of a spread that a message quotes


def check_spread(bound: Bound, part: Part, residual: Residual, keep: Tensor | None) -> None:
    """Refuse a spread that is computed from data alone and is illegal in a row that counts.

    Binding looks at covariates that are a parameter as they stand; here are the expressions of them.

    Args:
        bound: the model with its data.
        part: whose rows these are.
        residual: its law.
        keep: entries that count ``[F, *batch]``.

    Raises:
        DataError: it names the site and the rows.
    """
    (spread,) = residual.spread([], {})
    bad = is_illegal(residual.name, spread)
    if keep is not None and bool(bad.any()):
        counts = (keep != 0).reshape(*keep.shape, *(1,) * (bad.ndim - keep.ndim))
        bad = bad & counts
    rows = bad.reshape(len(bad), -1).any(1)
    if not bool(rows.any()):
        return
    first = int(torch.nonzero(rows)[0])
    rule = "positive" if residual.name == "scale" else "positive definite"
    where = ""
    if len(rows) > 1:
        place = _coordinates(first, part.plates, part.sizes, part.row_labels)
        where = f" in {int(rows.sum())} of {len(rows)} rows, the first at {place or f'row {first}'}"
    shown = f": {spread[first].tolist()}" if spread[first].numel() <= _SHOWN else ""
    raise DataError(
        f"'{part.factor.name}': the {residual.name} of {type(residual.family).__name__} is not {rule}{where}{shown}. Correct "
        "the data that it is computed from, or drop those rows."
    )


__all__ = ["check_spread"]
