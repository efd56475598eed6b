"""Ways to run a contraction: at once, or one plate in parts so that a memory budget holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from ppl.errors import DataError, UnsupportedError
from ppl.inference.elimination import Compiler
from ppl.inference.layout import Context, Layout, Term
from ppl.inference.program import Program

_MOST_PARTS = (
    4000  # parts of different shape have programs of their own, a millisecond of planning each
)


class Input(NamedTuple):
    """A factor of the caller, or a zero factor of the engine, and the term it becomes."""

    scope: tuple[str, ...]  # as the caller orders it
    axes: tuple[str, ...]  # canonical, the axis of a chain's first state renamed
    context: Context


class Part(NamedTuple):
    rows: dict[str, Tensor]
    program: Program


class Route(NamedTuple):
    """How a list of inputs is contracted: at once, or the inputs below one plate in parts."""

    inputs: list[Input]
    outer: list[int]  # inputs of the program besides the sums over parts
    program: Program
    inner: list[int]
    parts: list[Part]
    split: str | None

    @property
    def largest(self) -> tuple[int, tuple[str, ...]]:
        programs = [self.program, *(p.program for p in self.parts)]
        return max(((p.elements, p.axes) for p in programs), key=lambda pair: pair[0])


def read_scopes(
    scopes: Sequence[tuple[str, ...]],
    layout: Layout,
    plates_of: Sequence[tuple[str, ...]] | None,
) -> list[Input]:
    """The terms that the caller's factors become.

    Raises:
        DataError: an axis is unknown, repeated or implied by another.
        UnsupportedError: a transition factor lies in plates that its chain does not.
    """
    plates = plates_of or [()] * len(scopes)
    return [_read(layout, tuple(s), p) for s, p in zip(scopes, plates, strict=True)]


def _read(layout: Layout, scope: tuple[str, ...], plates: Sequence[str]) -> Input:
    unknown = [a for a in scope if a not in layout.rank]
    if unknown or len(set(scope)) < len(scope):
        raise DataError(
            f"log-factor over {scope}: axes must be distinct and in the layout; unknown: {unknown}."
        )
    over = {*plates, *(a for a in scope if a in layout.plates)}
    over |= {c.plate for c in layout.chains if c.previous in scope}
    renamed = {c.axis: c.first for c in layout.chains if c.plate not in layout.closure(over)}
    named = [renamed.get(a, a) for a in scope]
    owners = [layout.context_of[a] for a in named if layout.is_particle(a)]
    context = layout.closure(over).union(*owners)
    moves = [c for c in layout.chains if c.previous in scope]
    if any(context != layout.context_of[c.axis] for c in moves):
        raise UnsupportedError(
            f"a transition factor over {scope} is repeated over plates "
            f"{', '.join(layout.innermost(context))}, more than those of its chain. "
            "Move what depends on the inner plate into a factor of its own."
        )
    for p in [a for a in scope if a in layout.plates]:
        if p not in layout.innermost(context) and layout.carrier(context, p) in scope:
            lower = layout.carrier(context, p)
            raise DataError(
                f"log-factor over {scope}: plate {p!r} is implied by {lower!r}. Leave it out."
            )
    return Input(scope, layout.canonical(named), context)


def source_of(layout: Layout, axes: Sequence[str]) -> Input:
    """A zero factor over particle axes and all their plates, with the batch axes."""
    context = frozenset().union(*(layout.context_of[a] for a in axes))
    scope = (*layout.batch, *layout.innermost(context), *axes)
    return Input(scope, layout.canonical(scope), context)


def unmentioned(layout: Layout, inputs: Sequence[Input]) -> list[Input]:
    """Zero factors for particle axes that no factor mentions, to count their particles."""
    known = {a for i in inputs for a in i.axes}
    lone = [a for a in layout.owners if a not in known]
    return [Input((a,), (a,), layout.context_of[a]) for a in lone]


def make_route(
    inputs: list[Input],
    layout: Layout,
    *,
    tree: bool | None,
    memory: int | None,
    itemsize: int,
    along: tuple[str, int | Sequence[int]] | None = None,
) -> Route:
    """The route that holds the budget with the fewest parts, or with those that ``along`` asks for.

    Raises:
        UnsupportedError: no split of one plate fits, or no polynomial elimination order exists.
    """
    if along is not None:
        return _split_route(inputs, layout, *along, tree)
    whole = _compile(layout, inputs, tree)
    route = Route(inputs, list(range(len(inputs))), whole, [], [], None)
    if memory is None or route.largest[0] * itemsize <= memory:
        return route
    split = _split(route, layout, tree, memory // itemsize)
    if split:
        return split
    elements, axes = route.largest
    raise UnsupportedError(
        f"the largest array of the contraction, over {', '.join(axes)}, has {elements} entries and "
        f"takes {elements * itemsize / 2**20:.3g} MiB; the budget is {memory / 2**20:.3g} MiB, "
        "and no split of one plate fits it. Use fewer particles, let latents share one particle "
        "index (groups=...), or allow more memory (memory=...)."
    )


def _split(route: Route, layout: Layout, tree: bool | None, budget: int) -> Route | None:
    best: Route | None = None
    ordered = {c.plate for c in layout.chains}
    present = set().union(*(i.context for i in route.inputs))
    for plate in layout.canonical(present - ordered):
        below = {p for p, above in layout.ancestry.items() if plate in above}
        if layout.plates[plate].size > 1 and not ordered & below:
            fewer_than = len(best.parts) if best else _MOST_PARTS + 1
            best = _fit(route, layout, plate, tree, budget, fewer_than) or best
    return best


def _fit(
    route: Route, layout: Layout, plate: str, tree: bool | None, budget: int, fewer_than: int
) -> Route | None:
    """Split ``plate`` into the fewest parts that fit, found by doubling; None if none do."""
    most = min(layout.plates[plate].size, _MOST_PARTS)
    finest = _split_route(route.inputs, layout, plate, most, tree, first_only=True)
    count = max(2, min(most, math.ceil(route.largest[0] / max(budget, 1))))
    while finest.largest[0] <= budget and count < fewer_than:
        found = _split_route(route.inputs, layout, plate, count, tree)
        if found.largest[0] <= budget:
            return found
        if count == most:
            break
        count = min(most, 2 * count)
    return None


def _compile(
    layout: Layout, inputs: Sequence[Input], tree: bool | None, stop: str | None = None
) -> Program:
    terms = [Term(slot, i.axes, i.context) for slot, i in enumerate(inputs)]
    return Compiler(layout, tree=tree, stop=stop).compile([i.scope for i in inputs], terms)


def _split_route(
    inputs: list[Input],
    layout: Layout,
    plate: str,
    count: int | Sequence[int],
    tree: bool | None,
    *,
    first_only: bool = False,
) -> Route:
    """Inputs below ``plate`` in ``count`` parts, or cut there; the first of them alone is enough for a look."""
    inner = [i for i, x in enumerate(inputs) if plate in x.context]
    outer = [i for i, x in enumerate(inputs) if plate not in x.context]
    size, parts = layout.plates[plate].size, []
    programs: dict[Any, Program] = {}
    cuts = [k * size // count for k in range(count + 1)] if isinstance(count, int) else count
    for start, stop in list(pairwise(cuts))[: 1 if first_only else None]:
        rows = layout.rows_below(plate, start, stop)
        narrow = layout.narrowed(rows)
        shape = _shape_of(narrow)
        if shape not in programs:
            programs[shape] = _compile(narrow, [inputs[i] for i in inner], tree, plate)
        parts.append(Part(rows, programs[shape]))
    sums = [Input(t.axes, t.axes, t.context) for t in parts[0].program.outputs]
    program = _compile(layout, [*(inputs[i] for i in outer), *sums], tree)
    return Route(inputs, outer, program, inner, parts, plate)


def _shape_of(layout: Layout) -> tuple[object, ...]:
    """What tells the plates of two parts apart: a program serves all parts that agree in it."""
    return tuple(
        (p.size, *((q, m.numpy().tobytes()) for q, m in p.parents.items()))
        for p in layout.plates.values()
    )
