"""How far the beliefs are from what a direct solve of the same factors gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.gbp.final import Final
from ppl.inference.numerics.sparse import NotPositive

CHEAP = 300_000, 10_000_000  # pairs of elements, entries of the factor: a second or two
_ALIKE = 0.9  # ratio of standard deviations down to which messages count as right
_NEAR = 0.1  # standard deviations that a mean may be away from the optimum
_UNMEASURED = (
    "standard deviations are those of messages on a graph with loops, mostly too small, and were not measured: the graph "
    "is large. variance='check' measures them, variance='exact' solves for them"
)


def checked(final: Final, notes: dict[str, Any], alarms: list[str]) -> bool:
    """Compare the beliefs with a direct solve where that is wanted or cheap; whether to report its variances."""
    problem, wanted = final.problem, final.problem.options.variance
    if problem.plan.is_tree and final.state.run.converged:
        notes["variances"] = "exact for the linearised factors: the graph is a tree"
        return False
    if wanted == "gbp" or (wanted == "auto" and not final.is_within(CHEAP)):
        notes["variances"] = (
            "of the messages: too small on a graph with loops; variance='check' measures by how much, "
            "variance='exact' solves for them"
        )
        if wanted == "auto":
            alarms.append(_UNMEASURED)
        return False
    try:
        exact, away = final.exact, _away(final)
    except NotPositive as error:
        raise NumericalError(_free(final, error)) from None
    notes["means"] = f"at most {away:.2g} sd from a direct solve of the factors linearised at them"
    if not away <= _NEAR:
        alarms.append(
            f"the messages have not reached the optimum: {notes['means']}. Use method='laplace'"
        )
    _compared(final, exact, notes, alarms)
    return wanted != "check"


def _compared(
    final: Final, exact: Mapping[str, Tensor], notes: dict[str, Any], alarms: list[str]
) -> None:
    """Say what share of the exact variances those of the beliefs are."""
    is_reported = final.problem.options.variance != "check"
    said = "exact, by a sparse solve" if is_reported else "of the messages, not exact"
    if is_reported and not final.is_proper:
        notes["variances"] = f"{said}; the messages have not informed every variable yet"
        return
    ratio = torch.cat(
        [(_variances(final.covariances[n]) / _variances(c)).flatten() for n, c in exact.items()]
    )
    notes["variances"] = (
        f"{said}; ratio of the messages' variances to exact ones: min {float(ratio.min()):.3g}, "
        f"median {float(ratio.median()):.3g}, max {float(ratio.max()):.3g}"
    )
    low, high = float(ratio.min()) ** 0.5, float(ratio.max()) ** 0.5
    if not is_reported and not (low >= _ALIKE and high <= 1 / _ALIKE):
        alarms.append(
            f"standard deviations are those of messages, {low:.2g} to {high:.2g} of the exact ones; "
            "variance='exact' reports those"
        )


def _variances(covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1)


def _free(final: Final, error: NotPositive) -> str:
    return (
        f"{final.equations.at.label(int(error.columns[0]))} has no absolute information: the factors leave a direction free "
        "on which its law is flat. Give it a proper law, or observe one element (an anchor)."
    )


def _away(final: Final) -> float:
    """Largest distance of a mean from the exact solve of the factors linearised there, in standard deviations."""
    at, slope = final.equations.at, final.equations.gradient(final.linearised)
    step = final.factor.solve(slope.detach().to("cpu", torch.float64).numpy())
    worst = 0.0
    for name, move in at.split(torch.from_numpy(np.asarray(step)).unsqueeze(-1)).items():
        sd = _variances(final.exact[name]).sqrt()
        worst = max(worst, float((move.squeeze(-1).to(sd) / sd).abs().max()))
    return worst


__all__ = ["CHEAP", "checked"]
