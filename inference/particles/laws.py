"""Laws of latents lowered over particles of their parents, for proposals that draw from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppl.binding import Bound
from ppl.densities import is_foreign
from ppl.distributions import Distribution
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Variable
from ppl.inference.particles.blocks import RESTART, Block, Member
from ppl.inference.particles.forms import Prior, Sites, Tilted
from ppl.lower import Compiler
from ppl.lowered import Lowered, Operand, map_name


@dataclass(frozen=True, eq=False)
class LoweredLaw:
    """The law of one latent at every combination of its parents' particles."""

    variable: Variable
    family: Distribution
    ranks: tuple[int, ...]  # event axes of each parameter
    parameters: Lowered
    density: Lowered  # at every particle of the latent too
    shape: tuple[int, ...]  # [*restart, *plates]
    combinations: tuple[int, ...]  # particles of every parent
    likelihood: Lowered | None = (
        None  # of sites: log-densities of the children at points of their own
    )

    def at(self, arrays: Mapping[str, Tensor]) -> Distribution:
        """The law with parameters ``[*restart, *plates, combinations, *event]``."""
        leaves = self.parameters({k: arrays[k] for k in self.parameters.inputs})
        grid = (*self.shape, *self.combinations)
        full = [
            x.expand(*grid, *x.shape[x.ndim - r :]).reshape(*self.shape, -1, *x.shape[x.ndim - r :])
            for x, r in zip(leaves, self.ranks, strict=True)
        ]
        return self.family.replace(full)

    def log_density(self, arrays: Mapping[str, Tensor], k: int) -> Tensor:
        """Log-density of ``k`` particles, ``[*restart, *plates, K, combinations]``."""
        log = self.density({name: arrays[name] for name in self.density.inputs})[0]
        return log.expand(*self.shape, k, *self.combinations).reshape(*self.shape, k, -1)


def lower_laws(
    bound: Bound,
    blocks: Sequence[Block],
    axes: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    restarts: int,
) -> dict[str, LoweredLaw]:
    """The laws that proposals of the forms ``Prior`` and ``Tilted`` draw from, by latent.

    Args:
        bound: graph and data.
        blocks: all blocks.
        axes: leading axes of every variable's array.
        sizes: particles of every block.
        restarts: 0 for no restart axis.
    """
    return {
        m.name: _lower(bound, blocks, block, m, axes, sizes, restarts)
        for block in blocks
        if isinstance(block.form, (Prior, Tilted, Sites))
        for m in block.members
    }


def _lower(
    bound: Bound,
    blocks: Sequence[Block],
    block: Block,
    member: Member,
    axes: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    restarts: int,
) -> LoweredLaw:
    graph, lead = bound.graph, (RESTART,) if restarts else ()
    factor = graph.factors[member.name]
    check_law(factor, block)
    assert factor.law is not None
    parents = [b.axis for b in blocks if set(b.names) & set(block.reads)]
    order = (*lead, *graph.plates, block.axis, *(a for a in sizes if a != block.axis))

    def compiler() -> Compiler:
        return Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)

    first, second = compiler(), compiler()
    arguments = first.arguments(factor.law)
    ranks = _ranks(member.variable, factor.law.family, arguments)
    grid = (*lead, *block.plates, *parents)
    outputs = [first.align(a, grid, r) for a, r in zip(arguments, ranks, strict=True)]
    density = second.align(second.density(factor), (*lead, *block.plates, block.axis, *parents))
    static = dict(bound.values) | {map_name(*key): m for key, m in bound.maps.items()}
    made = [first.finish(outputs), second.finish([density])]
    held = [f.given({k: v for k, v in static.items() if k in f.inputs}) for f in made]
    shape = ((restarts,) if restarts else ()) + tuple(bound.size(p) for p in block.plates)
    return LoweredLaw(
        member.variable,
        factor.law.family,
        tuple(ranks),
        held[0],
        held[1],
        shape,
        tuple(sizes[a] for a in parents),
        _likelihood(bound, blocks, block, axes, lead) if isinstance(block.form, Sites) else None,
    )


def _likelihood(
    bound: Bound,
    blocks: Sequence[Block],
    block: Block,
    axes: Mapping[str, tuple[str, ...]],
    lead: tuple[str, ...],
) -> Lowered:
    """Log-densities of a latent's children where it and its parents have points ``[*lead, *plates, points]`` of their own."""
    graph = bound.graph
    points = (*lead, *block.plates, block.axis)
    near = {n for b in blocks if set(b.names) & set(block.reads) for n in b.names}
    moved = {**axes, **dict.fromkeys((*block.names, *near), points)}
    order = (*lead, *graph.plates, block.axis)
    made = Compiler(
        graph, moved, order, dtype=bound.dtype, device=bound.device, masks=tuple(bound.masks)
    )
    (name,) = block.names
    outputs = [made.density(f) for f in graph.densities if f.name != name and name in f.scope]
    static = dict(bound.values) | {map_name(*key): m for key, m in bound.maps.items()}
    static |= {name + "@mask": mask for name, mask in bound.masks.items()}
    done = made.finish(outputs).pruned()
    return done.given({k: v for k, v in static.items() if k in done.inputs})


def check_law(factor: Factor, block: Block) -> None:
    """Refuse laws that cannot be drawn from.

    Raises:
        UnsupportedError: with the remedy.
    """
    law, form = factor.law, type(block.form).__name__
    if law is None or getattr(law.family, "is_improper", False):
        raise UnsupportedError(
            f"q={{'{factor.name}': {form}()}}: '{factor.name}' has no proper law to draw from. Leave it out of q."
        )
    if is_foreign(law.family):
        raise UnsupportedError(
            f"q={{'{factor.name}': {form}()}}: {type(law.family).__name__} is drawn element by element. Leave it out of q."
        )


def _ranks(variable: Variable, family: Distribution, arguments: Sequence[Operand]) -> list[int]:
    batch = len(variable.event_shape) - family.event_dim
    return [
        max(batch + leaf.event_dim, a.event_ndim)
        for leaf, a in zip(family.leaves(), arguments, strict=True)
    ]
