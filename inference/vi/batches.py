"""Steps on some elements of a plate: their data scaled up to the plate, and the coordinates of their own latents only.

Latents outside the plate keep their joint Gaussian; those within it are independent of each other and of these, and
their parameters move when their element is in the batch. Discrete latents within the plate are summed in each element,
which is why the log-density of a batch is scaled as a whole.

Source: stochastic estimates of the bound, [Hoffman2013] section 2.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl.backend import Settings
from ppl.batches import Batch
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.inference.numerics.ascent import Ascent, advance
from ppl.inference.particles.lanes import Lanes, make_lanes, summed_latents
from ppl.inference.vi.bounds import Plain
from ppl.inference.vi.coordinates import LOCAL, Group, Origin, Part, to_values
from ppl.inference.vi.options import VI
from ppl.inference.vi.problem import Problem, State, Step, units

_KEPT = 1024  # parts whose factors stay lowered


@dataclass(frozen=True, eq=False)
class Divided:
    """A plate that is worked on in parts."""

    groups: tuple[Group, ...]
    bound: Bound
    options: VI
    inner: frozenset[str]  # factors within the plate
    outer: Lanes | None  # all others
    made: dict[int, Lanes]  # a cache: factors of the parts, lowered
    restarts: int
    draws: int
    particles: int = 1
    scale: float = 1.0

    @property
    def lanes(self) -> int:
        """Joint draws of a step."""
        return self.restarts * self.draws

    def __call__(
        self,
        us: Mapping[str, Tensor],
        log_qs: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        tempering: float = 1.0,
    ) -> Tensor:
        """The bound of each restart ``[R]`` on all elements together; no step needs it."""
        lanes = make_lanes(self.bound, self.lanes, self.options.enumerate_up_to)
        whole = Plain(self.groups, lanes, self.restarts, self.draws, 1)
        return whole(us, log_qs, params, tempering)


@dataclass(frozen=True, eq=False)
class OnBatch:
    """The bound of one batch, scaled up to the plate."""

    groups: tuple[Group, ...]
    divided: Divided
    batch: Lanes
    scale: float
    restarts: int
    draws: int
    particles: int = 1

    def __call__(
        self,
        us: Mapping[str, Tensor],
        log_qs: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        tempering: float = 1.0,
    ) -> Tensor:
        """The bound of each restart ``[R]``, averaged over draws."""
        values: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for group in self.groups:
            name = group.piece.name
            found, log_jacobian = to_values(group, us[name].flatten(0, 2))
            values |= found
            share = tempering * (self.scale if name == LOCAL else 1.0)
            total = total + share * (log_jacobian - log_qs[name].flatten())
        continuous = frozenset(values) if tempering != 1.0 else frozenset()
        values |= {n: p.repeat_interleave(self.draws, 0) for n, p in params.items()}
        total = total + self.scale * self.batch.log_joint(values, tempering, continuous)
        if self.divided.outer is not None:
            total = total + self.divided.outer.log_joint(values, tempering, continuous)
        assert isinstance(total, Tensor)
        return total.reshape(self.restarts, self.draws).mean(1)


def divide(
    groups: tuple[Group, ...], bound: Bound, options: VI, settings: Settings, plate: str
) -> Divided:
    """Sort the factors into those within the plate and the others.

    Raises:
        UnsupportedError: several particles, or a discrete latent outside the plate that its factors read.
    """
    if options.parallel or options.particle_count > 1:
        raise UnsupportedError(
            "vi: minibatch= estimates the ELBO, a sum over elements; the bounds of several particles are none. "
            "Leave particles= and parallel= out, or use method='qem'."
        )
    graph = bound.graph
    inner = frozenset(f.name for f in graph.densities if plate in graph.closure(f.plates))
    outer = frozenset(f.name for f in graph.densities) - inner
    for s in summed_latents(graph, options.enumerate_up_to):
        name = s.variable.name
        if name not in inner and any(f.name in inner and name in f.scope for f in graph.densities):
            raise UnsupportedError(
                f"vi: minibatch= over '{plate}', but the discrete latent '{name}' is shared by its elements, so the sum over its "
                "values does not part. Leave minibatch= out."
            )
    limit = options.enumerate_up_to
    lanes = settings.restarts * options.draw_count
    apart = make_lanes(bound, lanes, limit, settings.memory, only=outer) if outer else None
    return Divided(groups, bound, options, inner, apart, {}, settings.restarts, options.draw_count)


def step_on_batch(
    problem: Problem, state: State, tempering: float, batch: Batch, estimator: Step
) -> tuple[Ascent, Tensor]:
    """A step of the groups' parameters outside the plate and of those of the elements in the batch."""
    assert isinstance(problem.target, Divided)
    small, rows = _narrowed(problem, problem.target, batch)
    part = _narrowed_state(problem, state, batch, rows)
    moved, bound = estimator(small, part, tempering)
    whole = state.ascent
    names = ("theta", "first", "second", "counts")
    new = {n: getattr(whole, n).index_copy(-1, rows, getattr(moved, n)) for n in names}
    whole = advance(
        whole._replace(**new), problem.rule, lambda t: units(problem, t), moved_by_all(problem)
    )
    return whole, bound


def moved_by_all(problem: Problem) -> Tensor | None:
    """Coordinates that every step moves; None: all, or there are no others to judge a run by."""
    local = sum(g.piece.size for g in problem.groups if g.piece.name == LOCAL)
    size = sum(g.piece.size for g in problem.groups)
    count = size + sum(p.where.stop - p.where.start for p in problem.params)
    if local in (0, count):
        return None
    kept = torch.cat([torch.arange(size - local), torch.arange(size, count)])
    return kept.to(problem.bound.device)


def _narrowed(problem: Problem, divided: Divided, batch: Batch) -> tuple[Problem, Tensor]:
    """The problem of one batch, and where its coordinates lie in the whole vector."""
    groups: list[Group] = []
    rows: list[Tensor] = []
    for group in problem.groups:
        offset = sum(len(r) for r in rows)
        piece = group.piece
        where = torch.arange(piece.offset, piece.offset + piece.size)
        if piece.name == LOCAL:
            own = _columns(group, batch)
            where = torch.cat([where[: piece.cells][own], where[piece.cells :][own]])
            group = _fewer(divided.bound, group, batch, len(own))
        groups.append(replace(group, piece=replace(group.piece, offset=offset)))
        rows.append(where)
    params = []
    for p in problem.params:
        offset = sum(len(r) for r in rows)
        rows.append(torch.arange(p.where.start, p.where.stop))
        params.append(replace(p, where=slice(offset, offset + len(rows[-1]))))
    target = problem.target
    bound = OnBatch(
        tuple(groups), divided, _lanes(divided, batch), batch.scale, target.restarts, target.draws
    )
    small = replace(problem, target=bound, params=tuple(params))
    return small, torch.cat(rows).to(divided.bound.device)


def _lanes(divided: Divided, batch: Batch) -> Lanes:
    if batch.part not in divided.made:
        if len(divided.made) >= _KEPT:
            divided.made.clear()
        own = divided.bound.narrowed(batch.rows)
        limit = divided.options.enumerate_up_to
        divided.made[batch.part] = make_lanes(own, divided.lanes, limit, only=divided.inner)
    return divided.made[batch.part]


def _columns(group: Group, batch: Batch) -> Tensor:
    """Coordinates of the elements in the batch, in the order of the parts."""
    found = []
    for part in group.parts:
        shape = (*part.sizes, *part.free_shape)
        index = torch.arange(part.start, part.stop).reshape(shape)
        for dim, plate in enumerate(part.inner):
            if plate in batch.rows:
                index = index.index_select(dim, batch.rows[plate].cpu())
        found.append(index.reshape(-1))
    return torch.cat(found)


def _fewer(bound: Bound, group: Group, batch: Batch, dims: int) -> Group:
    """The group with the elements in the batch only."""
    parts: list[Part] = []
    for part in group.parts:
        sizes = tuple(
            len(batch.rows[p]) if p in batch.rows else n
            for p, n in zip(part.inner, part.sizes, strict=True)
        )
        start = parts[-1].stop if parts else 0
        parts.append(replace(part, sizes=sizes, start=start))
    return replace(group, piece=replace(group.piece, dims=dims), parts=tuple(parts))


def _narrowed_state(problem: Problem, state: State, batch: Batch, rows: Tensor) -> State:
    ascent = state.ascent
    names = ("theta", "first", "second", "counts", "mean", "total", "squares", "before")
    origin = dict(state.origin)
    for group in problem.groups:
        if group.piece.name == LOCAL:
            own = _columns(group, batch).to(rows.device)
            origin[LOCAL] = Origin(*(t[..., own] for t in state.origin[LOCAL]))
    part = {n: getattr(ascent, n)[..., rows] for n in names}
    return State(ascent._replace(**part), origin, state.failures)
