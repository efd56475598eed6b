"""Plated variable elimination: turn the scopes of log-factors into a list of steps.

The deepest context (closed set of plates) among the factors goes first: the particle axes that
live exactly there are summed in probability space, component by component, then the product over
its copies is taken down to the plates that the remaining axes live in.

Source: [Obermeyer2019] Algorithm 1, with log-sum-exp for the sum, flat indices for nested plates,
and chains along ordered plates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import opt_einsum

from ppl.errors import UnsupportedError
from ppl.inference.chain_steps import ChainSum, Pad
from ppl.inference.layout import Chain, Context, Layout, Term
from ppl.inference.program import Program
from ppl.inference.steps import Combine, Lift, Product, Reduce, Step, Weigh

_FUSED_ELEMENTS = 1 << 16  # entries up to which sums of factors are one step
_PRODUCT_ELEMENTS = 100_000  # joint entries from which a two-factor step is a matrix product


class Compiler:
    """Grows a list of steps; ``stop`` names a plate below whose contexts elimination ends."""

    def __init__(self, layout: Layout, *, tree: bool | None, stop: str | None = None) -> None:
        self.layout, self.tree, self.stop = layout, tree, stop
        self.steps: list[Step] = []
        self.count = 0
        self.outputs: list[Term] = []
        self.live: list[Term] = []
        self.chain_axes = {a for c in layout.chains for a in (c.axis, c.previous, c.first)}

    def compile(self, scopes: Sequence[tuple[str, ...]], terms: Sequence[Term]) -> Program:
        """Plan the elimination of input terms whose slots are ``0 .. len(terms) - 1``."""
        self.count = len(terms)
        self.live = []
        for term in terms:
            self._keep(term)
        while self.live:
            context = self._next_context()
            group = [t for t in self.live if t.context == context]
            self.live = [t for t in self.live if t.context != context]
            self._process(context, group)
        steps = _fused(self.steps, self.outputs)
        return Program(self.layout, scopes, list(terms), steps, self.outputs)

    def _keep(self, term: Term) -> None:
        open_axes = [a for a in term.axes if a not in self.layout.batch]
        done = self.stop not in term.context if self.stop else not (open_axes or term.context)
        (self.outputs if done else self.live).append(term)

    def _emit(
        self,
        make: type[Step],
        inputs: Sequence[Term],
        axes: Iterable[str],
        context: Context,
        **more: Any,
    ) -> Term:
        output = Term(self.count, self.layout.canonical(axes), context)
        self.count += 1
        self.steps.append(make(layout=self.layout, inputs=tuple(inputs), output=output, **more))
        return output

    def _particles(self, term: Term) -> list[str]:
        return [a for a in term.axes if self.layout.is_particle(a)]

    # ---- order of contexts ----

    def _next_context(self) -> Context:
        contexts = list(dict.fromkeys(t.context for t in self.live))
        deepest = [c for c in contexts if not any(c < other for other in contexts)]
        plain = [c for c in deepest if not self._chains_of(c)]
        ready = plain + [c for c in deepest if all(map(self._is_ready, self._chains_of(c)))]
        if not ready:
            names = ", ".join(sorted({c.axis for d in deepest for c in self._chains_of(d)}))
            raise UnsupportedError(
                f"the chains over {names} start from one another, and neither can be summed first. "
                "Let the first state of each depend on plain latents only, or use another method."
            )
        return ready[0]

    def _chains_of(self, context: Context) -> list[Chain]:
        return [c for c in self.layout.chains if self.layout.context_of[c.axis] == context]

    def _is_ready(self, chain: Chain) -> bool:
        home = self.layout.context_of[chain.first]
        return all(t.context == home for t in self.live if chain.first in t.axes)

    # ---- one context ----

    def _process(self, context: Context, group: list[Term]) -> None:
        owned = self._owned(context, group)
        chains = self._chains_of(context)
        links = {a for c in chains for a in (c.axis, c.previous)}
        loose: list[Term] = []
        linked: list[Term] = []
        for part in _components(group, owned):
            term = self._eliminate(context, part, owned)
            (linked if links & set(term.axes) else loose).append(term)
        for term in loose:
            self._descend(term)
        if chains:
            self._sum_chains(context, chains, linked)

    def _owned(self, context: Context, group: Sequence[Term]) -> set[str]:
        found = {a for t in group for a in self._particles(t)}
        return {a for a in found - self.chain_axes if self.layout.context_of[a] == context}

    def _eliminate(self, context: Context, part: list[Term], owned: set[str]) -> Term:
        """Sum the owned axes of one connected component, along a path of pairs of factors."""
        axes = owned & {a for t in part for a in t.axes}
        if not axes:
            return part[0]
        terms = self._padded(part)
        if len(terms) > 1:
            terms = [self._lifted(t) for t in terms]
        terms = self._gathered(context, terms, axes)
        terms = [self._sum_private(t, [o for o in terms if o is not t], axes) for t in terms]
        for pair in self._path(terms, axes):
            picked = [terms[i] for i in pair]
            terms = [t for i, t in enumerate(terms) if i not in pair]
            terms.append(self._join(context, picked, terms, axes))
        return terms[0]

    def _gathered(self, context: Context, terms: Sequence[Term], owned: set[str]) -> list[Term]:
        """Add every factor to the smallest other one that has all its axes.

        Never costs more than the larger of the two, and leaves pairs that can be matrix products. Axes that no
        other factor mentions are summed in the same step, which saves an array of the larger one's size.
        """
        waiting = self._by_size(terms)
        out: list[Term] = []
        while waiting:
            term = waiting.pop(0)
            home = next((o for o in waiting if set(term.axes) <= set(o.axes)), None)
            if home is None:
                out.append(term)
                continue
            waiting.remove(home)
            elsewhere = {a for o in (*out, *waiting) for a in o.axes}
            private = [a for a in home.axes if a in owned and a not in elsewhere]
            waiting = self._by_size([*waiting, self._sum(context, [term, home], private)])
        return out

    def _by_size(self, terms: Iterable[Term]) -> list[Term]:
        return sorted(terms, key=lambda t: math.prod(self.layout.shape(t.axes)))

    def _path(self, terms: Sequence[Term], owned: set[str]) -> list[tuple[int, ...]]:
        if len(terms) == 1:
            return []
        names = self.layout.canonical(a for t in terms for a in t.axes)
        letter = {a: opt_einsum.get_symbol(i) for i, a in enumerate(names)}
        scopes = [frozenset(letter[a] for a in t.axes) for t in terms]
        kept = frozenset(letter[a] for a in names if a not in owned)
        return opt_einsum.paths.auto(
            scopes, kept, {letter[a]: self.layout.size_of[a] for a in names}
        )

    def _sum_private(self, term: Term, others: Sequence[Term], owned: set[str]) -> Term:
        private = [a for a in term.axes if a in owned and not any(a in o.axes for o in others)]
        return self._sum(term.context, [term], private) if private else term

    def _join(
        self, context: Context, picked: list[Term], rest: list[Term], owned: set[str]
    ) -> Term:
        mentioned = {a for t in rest for a in t.axes}
        here = self.layout.canonical(a for t in picked for a in t.axes)
        return self._sum(context, picked, [a for a in here if a in owned and a not in mentioned])

    def _sum(self, context: Context, picked: list[Term], summed: Sequence[str]) -> Term:
        """Add factors and sum some axes; pairs with a large joint array as a matrix product."""
        while (
            len(picked) > 2
        ):  # opt_einsum joins the last few at once when it falls back on greedy search
            first, second, *rest = picked
            picked = [self._sum(context, [first, second], ()), *rest]
        here = self.layout.canonical(a for t in picked for a in t.axes)
        axes = [a for a in here if a not in summed]
        shared = [a for a in here if all(a in t.axes for t in picked)]
        sides = [math.prod(self.layout.shape(set(t.axes) - set(shared))) for t in picked]
        large = math.prod(self.layout.shape(here)) > _PRODUCT_ELEMENTS
        product = (
            large and len(picked) == 2 and min(sides) > 1 and summed and set(summed) <= set(shared)
        )
        return self._emit(
            Product if product else Combine, picked, axes, context, summed=tuple(summed)
        )

    def _lifted(self, term: Term) -> Term:
        """The term with every plate axis repeated over the innermost plate below it."""
        inner = self.layout.innermost(term.context)
        out = term
        for plate in inner:
            above = self._ancestors_in(out, plate)
            if above:
                axes = [plate, *(a for a in out.axes if a not in above)]
                out = self._emit(Lift, [out], axes, term.context, plate=plate, ancestors=above)
        return out

    def _ancestors_in(self, term: Term, plate: str) -> tuple[str, ...]:
        known = self.layout.ancestry[plate]
        return tuple(
            a for a in term.axes if a in known and self.layout.carrier(term.context, a) == plate
        )

    # ---- products over plates ----

    def _descend(self, term: Term) -> None:
        """Multiply a term over the plates that none of its remaining axes lives in."""
        owners = {a: self.layout.context_of[a] for a in self._particles(term)}
        target = frozenset().union(*owners.values())
        if owners and target == term.context:
            raise UnsupportedError(_crossing(self.layout, owners, target))
        for plate in self.layout.innermost(term.context):
            if plate not in target:
                term = self._reduce(term, plate, target)
        self._keep(term._replace(context=target))

    def _reduce(self, term: Term, plate: str, target: Context) -> Term:
        """Multiply over one innermost plate, within its ancestors that are in ``target``."""
        above = [p for p in self.layout.ancestry[plate] if p in target]
        kept = self.layout.innermost(frozenset(above))
        for p in kept:
            self.layout.carrier(term.context, p)
        present = self._ancestors_in(term, plate)
        if plate not in term.axes and (len(present) > 1 or not set(kept) <= self._within(present)):
            if present:
                term = self._lifted(term)
        rest = [a for a in term.axes if a != plate]
        if plate in term.axes:
            axes = [*rest, *kept]
            return self._emit(Reduce, [term], axes, term.context, plate=plate, targets=kept)
        base = present or kept
        weighed = self._emit(
            Weigh, [term], [*rest, *base], term.context, plate=plate, ancestors=base
        )
        if not present or present == kept:
            return weighed
        axes = [*(a for a in rest if a not in present), *kept]
        return self._emit(Reduce, [weighed], axes, term.context, plate=present[0], targets=kept)

    def _within(self, plates: Sequence[str]) -> set[str]:
        return set(self.layout.closure(plates))

    # ---- chains ----

    def _padded(self, part: list[Term]) -> list[Term]:
        """Transition factors with an element for the first state, so that all lengths agree."""
        normalised: set[str] = set()
        out = []
        for term in part:
            moves = [c for c in self.layout.chains if c.previous in term.axes]
            if moves:
                first_time = tuple(c.previous for c in moves if c.previous not in normalised)
                normalised.update(first_time)
                axes = [*term.axes, moves[0].plate]
                term = self._emit(
                    Pad, [term], axes, term.context, chain=moves[0], normalised=first_time
                )
            out.append(term)
        return out

    def _sum_chains(self, context: Context, chains: Sequence[Chain], linked: list[Term]) -> None:
        firsts = {c.first for c in chains}
        starts = [t for t in self.live if firsts & set(t.axes)]
        self.live = [t for t in self.live if not firsts & set(t.axes)]
        busy = {a for t in linked for a in t.axes}
        for chain in chains:
            starts = self._absorb(chain, starts, busy)
        groups = [{c} for c in chains]
        for term in (*linked, *starts):  # chains that meet in a factor have one joint state
            met = [
                g for g in groups if any({c.axis, c.previous, c.first} & set(term.axes) for c in g)
            ]
            groups = [g for g in groups if g not in met] + [set().union(*met)]
        for group in groups:
            coupled = tuple(c for c in chains if c in group)
            names = {a for c in coupled for a in (c.axis, c.previous, c.first)}
            self._sum_paths(
                context, coupled, [t for t in (*linked, *starts) if names & set(t.axes)]
            )

    def _sum_paths(self, context: Context, coupled: tuple[Chain, ...], terms: list[Term]) -> None:
        plates = {c.plate for c in coupled}
        names = {a for c in coupled for a in (c.axis, c.previous, c.first)}
        home = context - plates
        terms = [self._lifted(t) for t in terms]
        outer = {a for t in terms for a in t.axes if a not in names and a not in plates}
        owners = {a: self.layout.context_of[a] for a in outer if self.layout.is_particle(a)}
        stuck = {a: c for a, c in owners.items() if not c <= home}
        if stuck or len(plates) > 1:
            own = {c.axis: context for c in coupled}
            raise UnsupportedError(_crossing(self.layout, own | stuck, context))
        term = self._emit(ChainSum, terms, outer, home, chains=coupled, tree=self.tree)
        self._keep(term)

    def _absorb(self, chain: Chain, starts: list[Term], busy: set[str]) -> list[Term]:
        """Sum axes that touch a chain at its first state only; else they ride along every step.

        Done where the result is no larger than what it replaces.
        """
        home = self.layout.context_of[chain.first]
        for axis in self.layout.canonical(
            self._owned(home, [t for t in starts if chain.first in t.axes])
        ):
            touching = [t for t in (*starts, *self.live) if axis in t.axes]
            if axis in busy or any(t.context != home for t in touching):
                continue
            union = self.layout.canonical(a for t in touching for a in t.axes)
            before = max(math.prod(self.layout.shape(t.axes)) for t in touching)
            if math.prod(self.layout.shape(a for a in union if a != axis)) > before:
                continue
            self.live = [t for t in self.live if t not in touching]
            starts = [t for t in starts if t not in touching]
            starts.append(self._eliminate(home, touching, {axis}))
        return starts


def _fused(steps: list[Step], outputs: Sequence[Term]) -> list[Step]:
    """Small sums of factors taken into the one step that reads them: calls cost more than the additions."""
    readers = Counter(t.slot for s in steps for t in s.inputs) + Counter(t.slot for t in outputs)
    added: dict[int, tuple[Term, ...]] = {}
    out: list[Step] = []
    for step in steps:
        if type(step) is Combine and any(t.slot in added for t in step.inputs):
            parts = [p for t in step.inputs for p in added.pop(t.slot, (t,))]
            step = replace(step, inputs=tuple(parts))
        others = [t.slot for t in step.inputs if t.slot in added]
        out += [_written(added.pop(slot), slot, steps) for slot in others]
        slot, final = step.output.slot, {t.slot for t in outputs}
        small = step.elements <= _FUSED_ELEMENTS
        if (
            type(step) is Combine
            and not step.summed
            and small
            and readers[slot] == 1
            and slot not in final
        ):
            added[slot] = step.inputs
        else:
            out.append(step)
    return out


def _written(parts: tuple[Term, ...], slot: int, steps: Sequence[Step]) -> Step:
    """The sum by itself after all, for a reader that is not a sum."""
    made = next(s for s in steps if s.output.slot == slot)
    return replace(made, inputs=parts)


def _components(group: Sequence[Term], owned: set[str]) -> list[list[Term]]:
    """Factors connected through owned axes, in order of their first factor."""
    parts: list[tuple[set[str], list[Term]]] = []
    for term in group:
        axes, members = owned & set(term.axes), [term]
        apart = []
        for other_axes, other in parts:
            if axes & other_axes:
                axes, members = axes | other_axes, other + members
            else:
                apart.append((other_axes, other))
        parts = [*apart, (axes, members)]
    return [members for _, members in parts]


def _crossing(layout: Layout, owners: dict[str, Context], context: Context) -> str:
    names = ", ".join(
        f"{a!r} (plates {', '.join(layout.innermost(c)) or 'none'})"
        for a, c in sorted(owners.items())
    )
    return (
        f"particle axes {names} meet in one factor over plates "
        f"{', '.join(layout.innermost(context))}, where each has a separate index for every "
        "element of crossing plates: no order of elimination is polynomial. Leave one side without "
        "latents, or use another method."
    )
