"""The contraction engine: log-sums over all combinations of particle indices, with plates.

Plan once with ``make_plan``, then evaluate many times: the log of the sum, posterior weights of all
particles as its gradient, joint draws of indices. ``-log K`` and ``-log q`` are factors like any
other; the caller adds them.

Source: [Obermeyer2019] Algorithm 1; marginals as gradients of source terms, [Bowyer2023].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppl.binding import put, take
from ppl.errors import DataError, NumericalError, UnsupportedError
from ppl.inference.drawing import Chosen
from ppl.inference.grouping import suggest_groups
from ppl.inference.layout import Chain, Layout, LogFactor, PlateSpec, Term
from ppl.inference.program import Program
from ppl.inference.routes import (
    Input,
    Part,
    Route,
    make_route,
    read_scopes,
    source_of,
    unmentioned,
)

__all__ = ["Chain", "Layout", "LogFactor", "Plan", "PlateSpec", "make_plan", "suggest_groups"]

Rows = Mapping[str, Tensor]
Evaluate = Callable[[int, Rows | None], LogFactor]
Factors = Sequence[LogFactor] | Evaluate
Marginals = dict[str | tuple[str, str], Tensor]
Reduce = Callable[[list[Tensor]], list[Tensor]]


_LOST = "the log evidence is NaN or -inf: some factor has no finite value at any combination of particles"


class Plan:
    """A contraction planned for fixed scopes and sizes; make one with ``make_plan``."""

    def __init__(
        self,
        layout: Layout,
        inputs: list[Input],
        *,
        memory: int | None,
        itemsize: int,
        tree: bool | None,
        along: tuple[str, int | Sequence[int]] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self._layout, self._memory, self._itemsize, self._tree = layout, memory, itemsize, tree
        self._along, self._reduce = along, reduce
        self._count = len(inputs)
        zeros = unmentioned(layout, inputs)
        self._route = self._make_route([*inputs, *zeros], along)
        self._sourced: dict[Any, tuple[Route, dict[str | tuple[str, str], int]]] = {}

    # ---- what it will cost ----

    @property
    def largest(self) -> tuple[tuple[str, ...], int, int]:
        """Axes, entries and bytes of the largest array of one evaluation."""
        elements, axes = self._route.largest
        return axes, elements, elements * self._itemsize

    @property
    def flops(self) -> int:
        """Additions and exponentials of one evaluation, about."""
        return self._route.program.flops + sum(p.program.flops for p in self._route.parts)

    @property
    def split(self) -> str | None:
        """The plate that is processed in parts to fit the memory budget, if any."""
        return self._route.split

    @property
    def has_rules(self) -> bool:
        """Whether ``marginals`` takes no derivative by autograd."""
        return not self._route.parts and all(s.has_rule for s in self._route.program.steps)

    @property
    def parts(self) -> list[Rows]:
        """Elements of the plates that each part holds, in order; empty when nothing is split."""
        return [part.rows for part in self._route.parts]

    def __str__(self) -> str:
        axes, elements, size = self.largest
        lines = [
            f"largest array [{', '.join(axes)}]: {elements} entries, {size / 2**20:.3g} MiB; "
            f"about {self.flops:.3g} operations"
        ]
        if self._route.split:
            lines.append(
                f"plate {self._route.split} in {len(self._route.parts)} parts; the first part:"
            )
            lines += _table(self._route.parts[0].program)
            lines.append("then:")
        return "\n".join(lines + _table(self._route.program))

    # ---- evaluation ----

    def log_evidence(self, factors: Factors) -> Tensor:
        """Log of the sum over all combinations of particles of the product of all factors.

        Args:
            factors: one for every scope of the plan, in that order; or ``evaluate(i, rows)`` that
                makes factor ``i``, with the plates named in ``rows`` narrowed to those elements
                (``rows`` may be None: whole).

        Returns:
            ``[*batch]``; -inf if every combination is impossible.

        Raises:
            DataError: a factor has other axes or another shape than planned.
            NumericalError: the result is NaN or +inf.
        """
        return self._log_evidence(self._route, factors)

    def marginals(
        self,
        factors: Factors,
        joint: Sequence[tuple[str, str]] = (),
        *,
        overwrite: bool = False,
        power: float = 1.0,
        only: frozenset[str] | None = None,
    ) -> tuple[Tensor, Marginals]:
        """Log evidence and the posterior weights of all particles, by one backward pass.

        Args:
            factors: as for ``log_evidence``; nothing is differentiated but zero source terms.
            joint: pairs of particle axes whose joint weights are wanted too.
            overwrite: whether the memory of the factors may be used for intermediate arrays; their
                values are lost then, and an error cannot name the entry that caused it.
            power: exponent of what plates say of the axes outside all plates, for tempering; not where a plate is
                processed in parts. The weights of axes within plates are those of the untempered plate.
            only: particle axes whose weights are wanted; None for all. Where a plate is processed in parts, all.

        Returns:
            ``[*batch]``, and weights that sum to one for every plate element: for an axis
            ``[*batch, *plates, K]``, for a pair ``[*batch, *plates of both, K_a, K_b]``. Plates
            are the innermost ones, in the order of ``layout.plates``. The plate of a chain has one
            element less for ``(previous, axis)``.

        Raises:
            NumericalError: the evidence is zero, NaN or infinite.

        Source: weights are the gradient of log Z by log-factors that are zero, [Bowyer2023]
            section 4.
        """
        route, watched = self._with_sources(tuple(joint), None if self.split else only)
        if route.parts:
            log_z, weights = self._weights_in_parts(route, factors, len(watched))
            return log_z, dict(zip(watched, weights, strict=True))
        program = route.program
        with torch.no_grad():
            load = self._loader(route, factors)
            tensors = [load(program, k, i, None) for k, i in enumerate(route.outer)]
            results, pull = program.gradients(tensors, tuple(watched.values()), overwrite, power)
            log_z = _sum_outputs(self._layout, results, program.outputs)
            if not math.isfinite(float(log_z.sum())):
                raise NumericalError(_LOST if overwrite else self._explain(factors))
            copies = [log_z.numel() // r.numel() for r in results]
            grads = pull([torch.full_like(r, n) for r, n in zip(results, copies, strict=True)])
            found = {
                name: program.unload(g, k)
                for (name, k), g in zip(watched.items(), grads, strict=True)
            }
            if power != 1.0:  # what lies within plates has been pulled through their exponent
                dims = {name: (-1,) if isinstance(name, str) else (-2, -1) for name in found}
                found = {n: w / w.sum(dims[n], keepdim=True) for n, w in found.items()}
        return log_z, found

    def draw(
        self,
        factors: Factors,
        n: int,
        generator: torch.Generator | None = None,
        *,
        power: float = 1.0,
    ) -> dict[str, Tensor]:
        """Joint draws of particle indices from the weighted combinations.

        Args:
            factors: as for ``log_evidence``, without batch axes.
            n: number of draws.
            generator: source of randomness on the factors' device; None for torch's global one.
            power: as for ``marginals``.

        Returns:
            For every particle axis a long ``[n, *plates]``; plates as in ``marginals``.

        Raises:
            UnsupportedError: the plan has batch axes.
            NumericalError: the evidence is zero, NaN or infinite.

        Source: [Obermeyer2019] section 4.2; chains by backward sampling, [Bishop2006] section 13.2.
        """
        if self._layout.batch:
            raise UnsupportedError(
                f"draws along batch axes {self._layout.batch}: select one element of each first."
            )
        with torch.no_grad():
            return self._draw(factors, n, generator, power)

    # ---- inside ----

    def _draw(
        self, factors: Factors, n: int, generator: torch.Generator | None, power: float
    ) -> dict[str, Tensor]:
        route = self._route
        chosen: Chosen = {}
        load = self._loader(route, factors)
        tensors = self._outer_tensors(route, load)
        slots = route.program.run(tensors, power)
        self._check(_total(self._layout, slots, route.program), factors, possible=True)
        route.program.draw(slots, chosen, n, generator)
        outside = dict(chosen)
        for rows, program in route.parts:
            inside = dict(outside)
            below = program.run([load(program, k, i, rows) for k, i in enumerate(route.inner)])
            program.draw(below, inside, n, generator)
            self._scatter(inside, chosen, rows, n)
        return {axis: chosen[axis] for axis in self._layout.owners if axis in chosen}

    def _scatter(self, inside: Chosen, chosen: Chosen, rows: Rows, n: int) -> None:
        """Put the draws of one part in their places among those of the whole."""
        for axis, index in inside.items():
            plates = self._layout.innermost(self._layout.context_of[axis])
            if not set(plates) & set(rows):
                chosen.setdefault(axis, index)
                continue
            if axis not in chosen:
                chosen[axis] = index.new_zeros((n, *self._layout.shape(plates)))
            grid = [
                rows[p].to(index.device) if p in rows else torch.arange(size, device=index.device)
                for p, size in zip(plates, self._layout.shape(plates), strict=True)
            ]
            draws = torch.arange(n, device=index.device)
            chosen[axis][torch.meshgrid(draws, *grid, indexing="ij")] = index

    def _log_evidence(self, route: Route, factors: Factors) -> Tensor:
        tensors = self._outer_tensors(route, self._loader(route, factors))
        results = route.program.results(tensors)
        log_z = _sum_outputs(self._layout, results, route.program.outputs)
        return self._check(log_z, factors, possible=False)

    def _weights_in_parts(
        self, route: Route, factors: Factors, sources: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Log evidence and weights with one part at a time in memory.

        What a part says of the rest is the log-sum over its own particles. These messages are added up without
        gradients, and the gradient of the evidence by their sum is taken; it is the same for every part, so a second
        pass turns it into the weights within each part.
        """
        load = self._loader(route, _detached(factors))
        first = len(route.inputs) - sources
        with torch.no_grad():
            sums = self._messages(route, load)
        outside = [i for i in route.outer if i >= first]
        program = route.program
        with torch.enable_grad():
            tensors, watched = _with_zeros(program, route.outer, load, first, None, sums[0])
            sums = [s.requires_grad_() for s in sums]
            results = program.results([*tensors, *sums])
            log_z = _sum_outputs(self._layout, results, program.outputs)
            self._check(log_z, factors, possible=True)
            grads = torch.autograd.grad(log_z.sum(), [*watched, *sums])
        weights = dict(zip(outside, grads, strict=False))
        for part in route.parts:
            self._weigh_part(route, part, load, grads[len(outside) :], first, weights)
        return log_z.detach(), [weights[i] for i in range(first, len(route.inputs))]

    def _messages(self, route: Route, load: _Load) -> list[Tensor]:
        """The sum over all parts, of all processes, of what they say of the rest."""
        sums: list[Tensor] = []
        for rows, program in route.parts:
            new = program.results([load(program, k, i, rows) for k, i in enumerate(route.inner)])
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else list(new)
        return self._reduce(sums) if self._reduce else sums

    def _weigh_part(
        self,
        route: Route,
        part: Part,
        load: _Load,
        upstream: Sequence[Tensor],
        first: int,
        weights: dict[int, Tensor],
    ) -> None:
        """The weights of the particles of one part, put in their places among those of the whole."""
        program = part.program
        with torch.enable_grad():
            tensors, watched = _with_zeros(
                program, route.inner, load, first, part.rows, upstream[0]
            )
            if not watched:
                return
            results = program.results(tensors)
            found = torch.autograd.grad(results, watched, list(upstream))
        for i, grad in zip([i for i in route.inner if i >= first], found, strict=True):
            axes = route.inputs[i].scope
            if i not in weights:
                weights[i] = grad.new_zeros([self._length(axes, a) for a in axes])
            put(weights[i], axes, part.rows, grad)

    def _outer_tensors(self, route: Route, load: _Load) -> list[Tensor]:
        tensors = [load(route.program, k, i, None) for k, i in enumerate(route.outer)]
        if not route.parts:
            return tensors
        if not torch.is_grad_enabled():
            return tensors + self._messages(route, load)
        sums: list[Tensor] = []
        for rows, program in route.parts:

            def part(rows: Rows = rows, program: Program = program) -> tuple[Tensor, ...]:
                return tuple(
                    program.results([load(program, k, i, rows) for k, i in enumerate(route.inner)])
                )

            new = checkpoint(part, use_reentrant=False, preserve_rng_state=False)
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else list(new)
        return tensors + sums

    def _loader(self, route: Route, factors: Factors) -> _Load:
        if not callable(factors) and len(factors) != self._count:
            raise DataError(f"expected {self._count} log-factors, got {len(factors)}.")
        example: list[Tensor] = []

        def load(program: Program, k: int, i: int, rows: Rows | None) -> Tensor:
            if i >= self._count:
                if not example:
                    example.append((factors(0, None) if callable(factors) else factors[0]).log)
                factor = LogFactor(program.scopes[k], example[0].new_zeros(program.loads[k][0]))
            elif callable(factors):
                factor = factors(i, rows)
            else:
                factor = _narrowed(factors[i], rows)
            return program.load(factor, k)

        return load

    def _length(self, scope: tuple[str, ...], axis: str) -> int:
        shorter = any(c.plate == axis and c.previous in scope for c in self._layout.chains)
        return self._layout.size_of[axis] - shorter

    # ---- routes ----

    def _with_sources(
        self, joint: tuple[tuple[str, str], ...], only: frozenset[str] | None
    ) -> tuple[Route, dict[str | tuple[str, str], int]]:
        """A route, and the input whose gradient are the weights of each axis or pair: a zero factor, or, where nothing is
        split, one of the caller's that has the same scope.
        """
        if (joint, only) not in self._sourced:
            layout, known = self._layout, self._route
            inputs, first = list(known.inputs[: self._count]), self._count
            watched: dict[str | tuple[str, str], int] = {}
            singles = [a for a in layout.owners if only is None or a in only]
            names: list[str | tuple[str, str]] = [*singles, *joint]
            for name in names:
                source = source_of(layout, (name,) if isinstance(name, str) else name)
                alike = [] if known.parts else [i for i in range(first) if inputs[i] == source]
                watched[name] = alike[0] if alike else len(inputs)
                inputs += [] if alike else [source]
            inputs += unmentioned(layout, inputs)
            # The same parts, so that a maker of factors meets the same rows whatever it is asked for.
            parts = self._along or (known.split and (known.split, len(known.parts))) or None
            self._sourced[joint, only] = self._make_route(inputs, parts), watched
        return self._sourced[joint, only]

    def _make_route(
        self, inputs: list[Input], along: tuple[str, int | Sequence[int]] | None
    ) -> Route:
        return make_route(
            inputs,
            self._layout,
            tree=self._tree,
            memory=self._memory,
            itemsize=self._itemsize,
            along=along,
        )

    # ---- what went wrong ----

    def _check(self, log_z: Tensor, factors: Factors, *, possible: bool) -> Tensor:
        if bool(torch.isfinite(log_z).all()):
            return log_z
        if possible or not bool((log_z == -torch.inf).logical_or(log_z.isfinite()).all()):
            raise NumericalError(self._explain(factors))
        return log_z

    def _explain(self, factors: Factors) -> str:
        with torch.no_grad():
            for i in range(self._count):
                axes, log = factors(i, None) if callable(factors) else factors[i]
                bad = (log.isnan() | (log == torch.inf)).nonzero()
                if len(bad):
                    value = log[tuple(bad[0])].item()
                    return f"log-factor {i} over {list(axes)} is {value} at {_place(axes, bad[0])}."
            return self._explain_zero(factors)

    def _explain_zero(self, factors: Factors) -> str:
        """The first step whose result is zero for a plate element, whatever the other particles."""
        general = "every combination of particles has probability zero"
        if self._route.parts:
            return f"{general}."
        route = self._route
        slots = route.program.run(self._outer_tensors(route, self._loader(route, factors)))
        for step in route.program.steps:
            log, axes = slots[step.output.slot], step.output.axes
            dims = [d for d, a in enumerate(axes) if self._layout.is_particle(a)]
            bad = (log.amax(dims) if dims else log) == -torch.inf
            if bool(bad.any()):
                plates = [a for a in axes if not self._layout.is_particle(a)]
                where = _place(plates, bad.nonzero()[0])
                named = {a for t in step.inputs for a in t.axes if self._layout.is_particle(a)}
                what = f"all weights over {', '.join(sorted(named))} are zero"
                return f"{general}: {what}{where and ' at ' + where}."
        return f"{general}."


_Load = Callable[[Program, int, int, Rows | None], Tensor]


def make_plan(
    scopes: Sequence[tuple[str, ...]],
    layout: Layout,
    *,
    memory: int | None = None,
    itemsize: int = 8,
    plates_of: Sequence[tuple[str, ...]] | None = None,
    chain: Literal["auto", "scan", "tree"] = "auto",
    along: tuple[str, int | Sequence[int]] | None = None,
    reduce: Reduce | None = None,
) -> Plan:
    """Plan the sum over all particle indices of a product of log-factors.

    Args:
        scopes: axes of each factor's tensor, in its order of dimensions. A transition factor of a
            chain has both its axes; a factor with a chain's axis, outside its plate, is about the
            first state.
        layout: plates, particle axes, chains and batch axes.
        memory: budget in bytes of the largest array; a plate is processed in parts where it is
            needed.
        itemsize: bytes of one number.
        plates_of: plates over which each factor is repeated, if its tensor lacks some of them
            because it is constant along them; None: the plates in its scope.
        chain: chains by a forward scan or a tree of matrix products; auto is the tree for few states.
        along: a plate and the number of parts to process it in, or their boundaries, whatever the budget.
        reduce: what becomes of the sums over the parts of ``along`` before they are used: the sum over processes that
            each hold some of its elements.

    Raises:
        UnsupportedError: no polynomial elimination order exists, or the budget is too small.

    Source: [Obermeyer2019] Algorithm 1.

    >>> item = PlateSpec("item", 3)
    >>> layout = Layout({"item": item}, {"mu": 2, "z": 2}, {"mu": (), "z": ("item",)})
    >>> plan = make_plan([("mu",), ("item", "mu", "z")], layout)
    >>> both = LogFactor(("item", "mu", "z"), torch.zeros(3, 2, 2))
    >>> factors = [LogFactor(("mu",), torch.zeros(2)), both]
    >>> plan.log_evidence(factors).exp()  # 2 ** 4 combinations
    tensor(16.)
    """
    inputs = read_scopes(scopes, layout, plates_of)
    tree = None if chain == "auto" else chain == "tree"
    return Plan(
        layout, inputs, memory=memory, itemsize=itemsize, tree=tree, along=along, reduce=reduce
    )


def _with_zeros(
    program: Program,
    inputs: Sequence[int],
    load: _Load,
    first: int,
    rows: Rows | None,
    like: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of a program's inputs, and those to differentiate by: its inputs from ``first`` on are zero."""
    tensors: list[Tensor] = []
    watched = []
    for k, i in enumerate(inputs):
        if i < first:
            tensors.append(load(program, k, i, rows))
            continue
        zero = like.new_zeros(program.loads[k][0]).requires_grad_()
        watched.append(zero)
        tensors.append(program.load(LogFactor(program.scopes[k], zero), k))
    return tensors, watched


def _narrowed(factor: LogFactor, rows: Rows | None) -> LogFactor:
    if not rows:
        return factor
    return LogFactor(factor.axes, take(factor.log, factor.axes, rows))


def _detached(factors: Factors) -> Factors:
    if callable(factors):
        return lambda i, rows: LogFactor(*_detach(factors(i, rows)))
    return [_detach(f) for f in factors]


def _detach(factor: LogFactor) -> LogFactor:
    return LogFactor(factor.axes, factor.log.detach())


def _total(layout: Layout, slots: Sequence[Tensor], program: Program) -> Tensor:
    return _sum_outputs(layout, [slots[t.slot] for t in program.outputs], program.outputs)


def _sum_outputs(layout: Layout, logs: Sequence[Tensor], terms: Sequence[Term]) -> Tensor:
    """Sum of what is left, ``[*batch]``."""
    shape = layout.shape(layout.batch)
    total = logs[0].new_zeros(()) if logs else torch.zeros(())
    for log, term in zip(logs, terms, strict=True):
        aligned = log.reshape(
            [n if a in term.axes else 1 for a, n in zip(layout.batch, shape, strict=True)]
        )
        total = total + aligned
    return total.expand(shape)


def _place(axes: Sequence[str], index: Tensor) -> str:
    return ", ".join(f"{a} {i}" for a, i in zip(axes, index.tolist(), strict=True))


def _table(program: Program) -> list[str]:
    return [f"  {step.elements:>12}  {step}" for step in program.steps]
