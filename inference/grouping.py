"""Which latents share a particle index, so that a contraction fits into memory."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from ppl.errors import UnsupportedError
from ppl.inference.layout import Layout
from ppl.inference.routes import make_route, read_scopes


def suggest_groups(
    scopes: Sequence[tuple[str, ...]],
    layout: Layout,
    memory: int,
    *,
    itemsize: int = 8,
    plates_of: Sequence[tuple[str, ...]] | None = None,
    apart: Collection[str] = (),
) -> tuple[tuple[str, ...], ...]:
    """Merge particle axes until the largest array fits: each group shares one particle index.

    Greedy: the merger that leaves the smallest largest array, of axes that meet in one factor
        before others.

    Args:
        scopes: as for ``make_plan``.
        layout: as for ``make_plan``.
        memory: budget in bytes.
        itemsize: bytes of one number.
        plates_of: as for ``make_plan``.
        apart: axes that may not be merged, such as those of enumerated latents.

    Returns:
        Groups of two or more axes; none if everything fits as it is.

    Raises:
        UnsupportedError: no merger of axes fits the budget.

    >>> layout = Layout({}, {"a": 10, "b": 10, "c": 10}, {"a": (), "b": (), "c": ()})
    >>> suggest_groups([("a", "b", "c")], layout, memory=800)
    (('a', 'b'),)
    """
    group_of = {axis: axis for axis in layout.owners}
    fixed = {*apart, *(c.axis for c in layout.chains)}
    while True:
        elements, axes, _ = _merged_cost(scopes, layout, plates_of, group_of)
        if elements * itemsize <= memory:
            members = [tuple(a for a, g in group_of.items() if g == name) for name in group_of]
            return tuple(m for m in members if len(m) > 1)
        options = []
        for a, b in itertools.combinations(
            [x for x in axes if x in group_of and x not in fixed], 2
        ):
            if layout.sizes[a] == layout.sizes[b] and layout.context_of[a] == layout.context_of[b]:
                merged = {axis: a if g == b else g for axis, g in group_of.items()}
                meet = any({a, b} <= {group_of.get(x, x) for x in scope} for scope in scopes)
                largest, _, flops = _merged_cost(scopes, layout, plates_of, merged)
                options.append((largest, not meet, flops, a, b, merged))
        if not options:
            raise UnsupportedError(
                f"no merger of particle axes fits {memory / 2**20:.3g} MiB: the array over "
                f"{', '.join(axes)} has {elements} entries. Use fewer particles or "
                "allow more memory."
            )
        group_of = min(options, key=lambda option: option[:5])[-1]


def _merged_cost(
    scopes: Sequence[tuple[str, ...]],
    layout: Layout,
    plates_of: Sequence[tuple[str, ...]] | None,
    group_of: Mapping[str, str],
) -> tuple[int, tuple[str, ...], int]:
    """Largest array (entries, axes) and work of the contraction with merged axes."""
    merged = [tuple(dict.fromkeys(group_of.get(a, a) for a in scope)) for scope in scopes]
    kept = set(group_of.values())
    owners = {a: plates for a, plates in layout.owners.items() if a in kept}
    smaller = Layout(layout.plates, layout.sizes, owners, layout.chains, layout.batch)
    inputs = read_scopes(merged, smaller, plates_of)
    route = make_route(inputs, smaller, tree=False, memory=None, itemsize=1)
    return *route.largest, route.program.flops
