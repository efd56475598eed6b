"""Log-factors from sufficient statistics: plates summed before particles are combined.

A factor whose innermost plate holds no particles is a sum over its elements. As it stands it is an array
``[elements, K, K, ...]``; from statistics it is ``[K, K, ...]`` at once:

- the residual of a Normal is a sum of parts, each of which varies with few particle axes: its square needs the products
  of two parts, summed over the plate by a matrix product;
- the log-odds of a Bernoulli are such a sum, too: what is linear in them is summed part by part, and rows with
  equal covariates are counted;
- any other law is evaluated once for each distinct row, and multiplied by the number of its copies.

A Normal of three or more parts that keeps its plates becomes a factor for each two of them, so that elimination never holds
the array over all.

Source: sums of statistics of exponential families, [Wainwright2008] section 3.
"""

from __future__ import annotations

from ppl.densities import is_foreign
from ppl.distributions import Normal
from ppl.graph import Factor
from ppl.inference.particles.copies import coin, counted, is_coin
from ppl.inference.particles.parts import Piece, Setting
from ppl.inference.particles.squares import moves, normal, steps
from ppl.lower import Compiler, variables_of

__all__ = ["Piece", "Setting", "pieces"]


def pieces(c: Compiler, factor: Factor, later: bool, setting: Setting) -> list[Piece] | None:
    """The factor as log-factors from statistics; None where that does not pay or is not possible."""
    law = factor.law if not later else factor.chain and factor.chain[1]
    if law is None or c.rules != "all" or is_foreign(law.family) or factor.kind != "conditional":
        return None
    if factor.chain is not None:
        if not later:
            return None
        return (
            steps(c, factor, law, setting)
            if factor.name in c.paths
            else moves(c, factor, law, setting)
        )
    plate = _closed_plate(c, factor, setting)
    if type(law.family) is Normal:
        return normal(c, factor, law, plate, setting)
    if is_coin(c, factor, law, setting.coins):
        return [Piece(coin(c, factor, law), factor.plates)]
    return None if plate is None else counted(c, factor, law, plate, setting)


def _closed_plate(c: Compiler, factor: Factor, setting: Setting) -> str | None:
    """An innermost plate of an observed factor in which nothing with particles lives."""
    graph = c.graph
    if graph.variables[factor.name].role != "observed" or graph.variables[factor.name].event_shape:
        return None
    names = variables_of(graph, factor)
    particle = {a for n in names for a in c.axes[n] if a in setting.owners}
    busy = graph.closure(tuple(p for a in particle for p in setting.owners[a]))
    open_plates = [
        p
        for p in factor.plates
        if p not in busy
        and p != setting.apart
        and not graph.ancestors(p)
        and not any(p in graph.ancestors(q) for q in factor.plates)
        and p in c.axes[factor.name]
    ]
    return max(open_plates, key=lambda p: setting.sizes[p], default=None)
