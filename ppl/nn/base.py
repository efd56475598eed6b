"""What layers with weights share: a name, the plates that their weights lie in, one set of weights a model.

Weights lie in plates of the layer (``fc1.out`` and ``fc1.in``) and in those that the layer was *built* in,
never in the plates that are open where it is called. So a network that is built before ``with row:`` is one
network for all rows, and one that is built inside ``with user:`` is a family, a network for every user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ppl.errors import ModelError
from ppl.nn.priors import Prior, Slot
from ppl.plates import PlateHandle, plate, plate_name
from ppl.trace import TRACE, Trace, active
from ppl.value import Value

Plates = tuple[PlateHandle | str, ...] | None


class Layer:
    """A layer with weights.

    Args:
        name: of the layer, in front of the names of its sites and plates.
        plates: that its weights lie in: ``(user,)`` for a family of networks, ``()`` for one network. By default those
            that are open where the layer is built.
    """

    def __init__(self, name: str, plates: Plates) -> None:
        kind = type(self).__name__
        if not isinstance(name, str) or not name:
            raise ModelError(f"{kind} needs a name: expected a non-empty string, got {name!r}.")
        self.name, self.label = name, f"{kind}('{name}')"
        self._around = _around(plates)
        self._is_asked = plates is None
        self._arrays: WeakKeyDictionary[Trace, tuple[Value | None, ...]] = WeakKeyDictionary()

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        """The arrays that the layer needs, each with its prior; None for one that it goes without."""
        raise NotImplementedError

    def arrays(self) -> tuple[Value | None, ...]:
        """The arrays of :meth:`slots` in the model that is being traced; declared on the first call."""
        trace = active(f"nn.{type(self).__name__}")
        if trace not in self._arrays:
            around = tuple(str(plate_name(trace, p)) for p in self._around)
            self._check_place(trace, around)
            trace.claim(trace.full_name(f"{self.name}.weight"))  # before its plates are
            with _only(trace, around):
                self._arrays[trace] = tuple(
                    None if found is None else found[1].declare(found[0])
                    for found in self.slots(trace)
                )
        return self._arrays[trace]

    def units(self, trace: Trace, side: str, size: int) -> PlateHandle:
        """A plate of the layer's own; layers of two scopes have plates of their own."""
        return plate(f"{trace.full_name(self.name)}.{side}", size)

    def _check_place(self, trace: Trace, around: tuple[str, ...]) -> None:
        if self._is_asked and around and set(around) == set(trace.open):
            inner = around[-1]
            raise ModelError(
                f"{self.label} is built and called inside plate '{inner}': one network for every element of it, or one for "
                f"all? For one, build it before 'with {inner}:', or say plates=(). For one each, say plates=({inner},)."
            )


def check_count(layer: str, what: str, size: Any) -> None:
    """Raise unless ``size`` is a positive whole number."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelError(f"{layer} needs a positive whole number of {what}, got {size!r}.")


def check_rank(layer: str, x: Any, ranks: tuple[int, ...], expected: str) -> None:
    """Raise unless one element has one of these numbers of axes."""
    if not isinstance(x, Tensor) or x.ndim not in ranks:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ModelError(
            f"{layer} takes {expected}, got one element of shape {got}. Inside a plate, code sees one element; add an axis "
            "with x[None], or take one away with nn.Flatten()."
        )


def _around(plates: Plates) -> tuple[PlateHandle | str, ...]:
    if plates is not None:
        if isinstance(plates, (str, PlateHandle)):
            raise ModelError(f"plates= is a tuple of plates, got {plates!r}. Write plates=(user,).")
        return tuple(plates)
    trace = TRACE.get()
    return () if trace is None else tuple(trace.open)


@contextmanager
def _only(trace: Trace, plates: tuple[str, ...]) -> Iterator[None]:
    before, trace.open = trace.open, list(plates)
    try:
        yield
    finally:
        trace.open = before


__all__ = ["Layer", "Plates", "check_count", "check_rank"]
