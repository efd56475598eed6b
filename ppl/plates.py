"""Plates, and the operations along them: reductions, ``dot``, ``pick`` and ``shift``."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ppl.errors import ModelError, user_line
from ppl.graph import Plate, ancestors, maximal
from ppl.trace import Trace, active
from ppl.value import Value, is_traced, prototype


class PlateHandle:
    """What :func:`plate` returns: a context manager that opens the plate; opening it twice is fine."""

    def __init__(self, name: str, trace: Trace) -> None:
        self.name = name
        self._trace = trace

    def __enter__(self) -> PlateHandle:
        self._trace.open.append(self.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        position = len(self._trace.open) - 1 - self._trace.open[::-1].index(self.name)
        del self._trace.open[position]

    @property
    def size(self) -> int:
        """The declared size; sizes that come from the data are not known inside a model."""
        declared = self._trace.plates[self.name].size
        if declared is None:
            raise ModelError(
                f"plate '{self.name}' takes its size from the data, which a model cannot read. Give it: "
                f"plate('{self.name}', size), with the size as a parameter of the model."
            )
        return declared

    def __repr__(self) -> str:
        return f"plate('{self.name}')"

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        raise ModelError(
            f"plate '{self.name}' is opened, not iterated over: write 'with {self.name}:' and the code of one element."
        )


def plate(
    name: str,
    size: int | None = None,
    *,
    within: PlateHandle | tuple[PlateHandle, ...] = (),
    by: str | tuple[str, ...] | None = None,
    ordered: bool = False,
) -> PlateHandle:
    """Declare a named axis of repeats; ``with`` opens it, and code inside is written for one element.

    Args:
        name: public name; the same name is the same plate.
        size: number of elements; read from the data when left out.
        within: the plate, or plates, that every element belongs to one element of (ragged groups, crossed designs).
        by: data column of the membership, one a parent; the parent's name by default. Integers or labels.
        ordered: whether neighbours have a meaning (time); needed by Markov latents, ``shift`` and ``forecast``.

    Raises:
        ModelError: the name was declared differently before, or ``by`` does not match ``within``.

    >>> @model
    ... def grouped():
    ...     school = plate("school")
    ...     pupil = plate("pupil", within=school)
    ...     with school:
    ...         level = latent("level", Normal(0.0, 1.0))
    ...     with pupil:
    ...         observe("score", Normal(level, 1.0))
    >>> data = {"score": [1.0, 2.0, 0.5], "school": ["a", "b", "a"]}
    >>> grouped.graph(data).plates["school"].size
    2
    """
    trace = active("plate")
    parents = within if isinstance(within, tuple) else (within,)
    if isinstance(size, bool) or not (size is None or (isinstance(size, int) and size > 0)):
        raise ModelError(f"plate '{name}' needs a positive whole size, got {size!r}.")
    names = tuple(_parent_name(name, p) for p in parents)
    made = Plate(name, size, names, _columns(name, names, by), ordered, user_line())
    known = trace.plates.get(name)
    if known is None:
        trace.plates[name] = made
    elif _differs(known, made):
        raise ModelError(
            f"plate '{name}' is declared twice: {_declaration(known)} at {known.where}, now {_declaration(made)}. Keep the "
            "handle of the first one and open that."
        )
    return PlateHandle(name, trace)


def _differs(known: Plate, again: Plate) -> bool:
    """Whether a second declaration says something else; what it leaves out is as in the first."""
    parents = again.parents and (known.parents, known.columns) != (again.parents, again.columns)
    size = again.size is not None and known.size != again.size
    return bool(parents or size or (again.ordered and not known.ordered))


def _declaration(p: Plate) -> str:
    by = f" by {', '.join(p.columns)}" if p.columns != p.parents else ""
    within = f" within {', '.join(p.parents)}{by}" if p.parents else ""
    return f"{'ordered, ' if p.ordered else ''}size {p.size}{within}"


def plate_name(trace: Trace, handle: PlateHandle | str | None) -> str | None:
    """Name of a plate given by handle or name; an error when there is none of that name."""
    if handle is None:
        return None
    name = handle.name if isinstance(handle, PlateHandle) else handle
    if name not in trace.plates:
        raise ModelError(
            f"there is no plate '{name}'. Declared: {', '.join(trace.plates) or 'none'}."
        )
    return name


def sum(x: Tensor, *, over: PlateHandle | str) -> Value:  # noqa: A001 - the word of the language
    """Sum over a plate; inside an open ancestor of it, the sum of each group.

    >>> @model
    ... def total():
    ...     with plate("item", 4) as item:
    ...         weight = latent("weight", Normal(1.0, 0.1))
    ...     observe("scale", Normal(sum(weight, over=item), 0.01))
    >>> sorted(total.graph({"scale": 4.2}).access("scale", "weight"))
    ['all']
    """
    return _reduce("sum", x, over)


def mean(x: Tensor, *, over: PlateHandle | str) -> Value:
    """Mean over a plate; inside an open ancestor of it, the mean of each group."""
    return _reduce("mean", x, over)


def logsumexp(x: Tensor, *, over: PlateHandle | str) -> Value:
    """Log of the sum of exponentials over a plate, without overflow."""
    return _reduce("logsumexp", x, over)


def dot(a: Tensor, b: Tensor, *, over: PlateHandle | str) -> Value:
    """Inner product over a plate, as one node of the graph: no product of the two plates is formed.

    Args:
        a: varies over the plate, and over others (a matrix), or not.
        b: likewise.
        over: the plate to sum over.
    """
    trace = active("dot")
    name = plate_name(trace, over)
    assert name is not None
    for x in (a, b):
        _check_reduced(trace, x, name, "dot")
    assert isinstance(a, Value) and isinstance(b, Value)
    result = trace.evaluate(torch.mul, "dot", (a, b), {}, [a, b])
    plates = _plates_after(trace, [*a.node.plates, *b.node.plates], name)
    return trace.add_node(
        "dot", result, (trace.operand(a), trace.operand(b)), plates=plates, name=name
    )


def pick(x: Tensor, **at: int) -> Value:
    """One element of a plate by position: ``pick(x, pose=0)``."""
    trace = active("pick")
    for name, position in at.items():
        plate_name(trace, name)
        if isinstance(position, bool) or not isinstance(position, int):
            raise ModelError(
                f"pick takes a position, a whole number: got {name}={position!r}. To pick by a value, declare the index: "
                f"x[i] with i = given('i', index={name})."
            )
        _check_reduced(trace, x, name, "pick")
        plates = tuple(p for p in x.node.plates if p != name)  # type: ignore[attr-defined]
        x = trace.add_node(
            "pick", prototype(x), (trace.operand(x), position), plates=plates, name=name
        )
    return x  # type: ignore[return-value]


def shift(x: Tensor, along: PlateHandle | str, k: int = 1) -> Value:
    """The value of the neighbour ``k`` places on in an ordered plate.

    Elements without that neighbour drop out of the factors that use it.
    """
    trace = active("shift")
    name = plate_name(trace, along)
    assert name is not None
    if not trace.plates[name].ordered:
        raise ModelError(
            f"shift needs an ordered plate. Declare it: plate('{name}', ordered=True)."
        )
    refuse_ragged(trace, name, "shift")
    if not is_traced(x) or name not in x.node.plates:  # type: ignore[attr-defined]
        raise ModelError(f"shift along '{name}' needs a value that varies over that plate.")
    trace.check_visible(x)  # type: ignore[arg-type]
    plates = x.node.plates  # type: ignore[attr-defined]
    return trace.add_node("shift", prototype(x), (trace.operand(x), k), plates=plates, name=name)


def collect(x: Tensor, *, over: tuple[PlateHandle | str, ...]) -> Value:
    """All elements of some plates as one array: the plates become leading event axes, in the order given.

    This is how a layer makes a matrix of weights; the plates need not be open.

    Args:
        x: one element; varies over all of these plates.
        over: plates of known size.

    >>> @model
    ... def layer():
    ...     rows, columns = plate("out", 2), plate("in", 3)
    ...     with rows, columns:
    ...         weight = latent("weight", Normal(0.0, 1.0))
    ...     deterministic("matrix", collect(weight, over=(rows, columns)))
    >>> graph = layer.graph()
    >>> graph.nodes[graph.factors["matrix"].value.id].event_shape
    (2, 3)
    """
    trace = active("collect")
    handles = [PlateHandle(str(plate_name(trace, p)), trace) for p in over]
    names = tuple(h.name for h in handles)
    for name in names:
        _check_reduced(trace, x, name, "collect", frozenset(names))
    element = prototype(x)
    result = element.expand(*(h.size for h in handles), *element.shape).clone()
    plates = tuple(p for p in x.node.plates if p not in names)  # type: ignore[attr-defined]
    return trace.add_node(
        "collect", result, (trace.operand(x),), plates=plates, name=",".join(names)
    )


def refuse_ragged(trace: Trace, plate: str, word: str) -> None:
    """Raise when an ordered plate lies within another: its neighbours may belong to different groups."""
    parents = trace.plates[plate].parents
    if parents:
        raise ModelError(
            f"{word} runs along plate '{plate}', which lies within '{parents[0]}': neighbours may belong to different "
            f"elements of it. Make a grid, with {parents[0]}: with {plate}: ...; or, when one series runs through all of "
            f"them, leave out within= and index: x[i] with i = given('i', index={parents[0]})."
        )


def _reduce(kind: str, x: Tensor, over: PlateHandle | str) -> Value:
    trace = active(kind)
    name = plate_name(trace, over)
    assert name is not None
    _check_reduced(trace, x, name, kind)
    plates = _plates_after(trace, list(x.node.plates), name)  # type: ignore[attr-defined]
    return trace.add_node(
        "reduce", prototype(x), (trace.operand(x), kind), plates=plates, name=name
    )


def _plates_after(trace: Trace, plates: list[str], over: str) -> tuple[str, ...]:
    # With an ancestor of the reduced plate open, the result is one number for each of its elements.
    visible = trace.visible_plates(trace.open_but(over))
    groups = [p for p in ancestors(trace.plates, over) if p in visible]
    return maximal(trace.plates, frozenset([p for p in plates if p != over] + groups))


def _check_reduced(
    trace: Trace, x: Any, plate: str, word: str, gone: frozenset[str] = frozenset()
) -> None:
    if not is_traced(x) or plate not in x.node.plates:
        varies = ", ".join(x.node.plates) if is_traced(x) and x.node.plates else "no plate"
        raise ModelError(
            f"{word} over plate '{plate}' needs a value that varies over it, got one that varies over {varies}. "
            f"Make it with plate '{plate}' open, or use a torch reduction for event axes."
        )
    trace.check_visible(x, gone | {plate})


def _parent_name(name: str, parent: Any) -> str:
    if not isinstance(parent, PlateHandle):
        raise ModelError(
            f"plate '{name}': within= needs plates, got {type(parent).__name__}. Write within=plate('county'), or a tuple."
        )
    return parent.name


def _columns(
    name: str, parents: tuple[str, ...], by: str | tuple[str, ...] | None
) -> tuple[str, ...]:
    columns = parents if by is None else (by,) if isinstance(by, str) else tuple(by)
    if len(columns) != len(parents):
        raise ModelError(
            f"plate '{name}': by= names {len(columns)} columns for {len(parents)} parents. Give one column a parent, in order."
        )
    return columns


__all__ = [
    "PlateHandle",
    "collect",
    "dot",
    "logsumexp",
    "mean",
    "pick",
    "plate",
    "plate_name",
    "shift",
    "sum",
]
