"""What ``method="auto"`` runs, and why: exact where it is cheap, otherwise QEM."""

from __future__ import annotations

from ppl import backend as backends
from ppl.backend import Reason
from ppl.binding import Bound
from ppl.errors import UnsupportedError

_CHEAP = 3e11  # operations; some ten seconds on two CPU cores


def choose(bound: Bound) -> tuple[str, str]:
    """Name of the method to run, and the reason for it.

    Raises:
        UnsupportedError: no method can fit the model; the reasons of each are listed.

    >>> from ppl.model import model
    >>> from ppl import latent, Normal
    >>> @model
    ... def pick_one():
    ...     latent("x", Normal(0.0, 1.0))
    >>> choose(pick_one.bind())[0]
    'exact'
    """
    refused = {"exact": _exact_reasons(bound)}
    if not refused["exact"]:
        return "exact", "every latent can be integrated exactly, at little cost"
    qem = backends.load("qem")
    refused["qem"] = qem.supports(bound.graph)
    if not refused["qem"]:
        return "qem", f"exact cannot: {refused['exact'][0]}"
    lines = [f"{name}: {reason}" for name, reasons in refused.items() for reason in reasons]
    table = "\n    ".join(lines)
    raise UnsupportedError(f"no method can fit this model:\n    {table}")


def _exact_reasons(bound: Bound) -> list[Reason]:
    exact = backends.load("exact")
    reasons = exact.supports(bound.graph)
    if reasons:
        return reasons
    work = exact.cost(bound)  # type: ignore[attr-defined]
    if work <= _CHEAP:
        return []
    return [
        Reason(
            "", f"it would take about {work:.1g} operations.", "Ask for it by name if that is fine."
        )
    ]
