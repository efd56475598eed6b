"""The factor graph: immutable records of plates, variables, factors and the expressions between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ppl.distributions import Distribution
from ppl.errors import Where

Role = Literal["latent", "observed", "given", "param", "deterministic"]
Access = Literal["same", "broadcast", "gather", "lag", "all"]


@dataclass(frozen=True)
class Ref:
    """An operand of a node: the node with this id."""

    id: int


@dataclass(frozen=True)
class Plate:
    """A named axis of independent repeats.

    ``parents`` are the plates of ``within=``; ``column`` names the data column with the membership of each parent.
    """

    name: str
    size: int | None = None
    parents: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()  # one data column a parent
    ordered: bool = False
    where: Where = Where("", 0)


@dataclass(frozen=True, eq=False)
class Node:
    """One recorded operation; ``args`` and ``kwargs`` hold :class:`Ref` in the place of operands."""

    id: int
    op: Literal[
        "variable",
        "call",
        "item",
        "gather",
        "reduce",
        "dot",
        "pick",
        "shift",
        "collect",
        "previous",
    ]
    func: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    where: Where
    name: str = ""  # of the variable, plate or torch function

    def operands(self) -> tuple[int, ...]:
        """Ids of the nodes that this one reads."""
        return self._operands

    @cached_property
    def _operands(self) -> tuple[int, ...]:
        # Passes walk the graph many times, and a nested structure is slow to look through.
        return tuple(refs((self.args, self.kwargs)))


@dataclass(frozen=True, eq=False)
class Variable:
    """A named quantity: one array over its plates.  ``event_shape`` is the shape of one element."""

    name: str
    role: Role
    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    support: Any = None  # a torch.distributions constraint
    is_discrete: bool = False
    cardinality: int | None = None  # number of values, when finite and known
    index_of: str | None = None
    initial: Any = None  # of a param
    where: Where = Where("", 0)

    @property
    def dims(self) -> int:
        """Number of scalars in one element."""
        count = 1
        for size in self.event_shape:
            count *= size
        return count


@dataclass(frozen=True, eq=False)
class Law:
    """A distribution and where its parameters come from: ``arguments`` replace the leaves of ``family`` in order."""

    family: Distribution
    arguments: tuple[Any, ...]  # Ref, number or tensor

    def __str__(self) -> str:
        return type(self.family).__name__


@dataclass(frozen=True, eq=False)
class Factor:
    """A log-density of the graph, replicated over ``plates``.

    ``conditional``: child given its parents. ``potential``: a free log-density, or a law at an expression.
    ``deterministic``: a reported quantity; it carries no density.
    """

    name: str
    kind: Literal["conditional", "potential", "deterministic"]
    plates: tuple[str, ...]
    scope: tuple[str, ...]  # variable names, child first
    law: Law | None = None
    value: Any = (
        None  # Ref of the child or expression; the log-density of a potential without a law
    )
    chain: tuple[str, Law] | None = (
        None  # ordered plate and transition law; `law` is then that of the first element
    )
    where: Where = Where("", 0)


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model. ``print(graph)`` shows plates, variables, factors and every implied gather."""

    name: str
    plates: Mapping[str, Plate]
    variables: Mapping[str, Variable]
    factors: Mapping[str, Factor]
    nodes: tuple[Node, ...] = field(repr=False)

    def role(self, *roles: Role) -> tuple[Variable, ...]:
        """Variables of these roles, in the order of the program."""
        return tuple(v for v in self.variables.values() if v.role in roles)

    @property
    def latents(self) -> tuple[Variable, ...]:
        """What is to be inferred."""
        return self.role("latent")

    @property
    def densities(self) -> tuple[Factor, ...]:
        """Factors that carry a log-density, in the order of the program."""
        return tuple(f for f in self.factors.values() if f.kind != "deterministic")

    @property
    def is_improper(self) -> bool:
        """Whether a law is improper (``Flat``), so that the evidence has no meaning by itself."""
        laws = (f.law for f in self.densities if f.law is not None)
        return any(getattr(law.family, "is_improper", False) for law in laws)

    @property
    def deterministics(self) -> tuple[str, ...]:
        """Names of reported quantities."""
        return tuple(f.name for f in self.factors.values() if f.kind == "deterministic")

    def ancestors(self, plate: str) -> tuple[str, ...]:
        """Every plate that ``plate`` lies within, nearest first."""
        return ancestors(self.plates, plate)

    def maximal(self, plates: tuple[str, ...] | frozenset[str]) -> tuple[str, ...]:
        """The plates that are not implied by another one of them, in the order of declaration."""
        return maximal(self.plates, plates)

    def closure(self, plates: tuple[str, ...]) -> frozenset[str]:
        """These plates and everything they lie within."""
        return frozenset(plates).union(*(self.ancestors(p) for p in plates))

    def parents(self, site: str) -> tuple[str, ...]:
        """The variables that the law of ``site`` reads."""
        return tuple(name for name in self.factors[site].scope if name != site)

    def children(self, name: str) -> tuple[str, ...]:
        """The factors that read variable ``name``, its own law left out."""
        return tuple(f.name for f in self.factors.values() if name in f.scope and f.name != name)

    def access(self, factor: str, variable: str) -> frozenset[Access]:
        """How a factor touches a variable: directly, by broadcasting, gathering, a lag, or over a whole plate."""
        return self._access[factor].get(variable, frozenset())

    @cached_property
    def _access(self) -> dict[str, dict[str, frozenset[Access]]]:
        from ppl.passes import accesses  # passes reads graphs; the cache belongs to the graph

        return {f.name: accesses(self, f) for f in self.factors.values()}

    def fingerprint(self) -> str:
        """A digest of structure, not of data: the same program gives the same text in every process."""
        lines = [f"{v.name} {v.role} {v.plates} {v.event_shape}" for v in self.variables.values()]
        lines += [f"{f.name} {f.kind} {f.plates} {f.scope} {f.law}" for f in self.factors.values()]
        lines += [f"{p.name} {p.parents} {p.ordered}" for p in self.plates.values()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        from ppl.render import as_text  # drawing reads graphs

        return as_text(self)

    def to_mermaid(self) -> str:
        """The graph in Mermaid's text form, which GitHub and notebooks draw."""
        from ppl.render import as_mermaid

        return as_mermaid(self)

    def to_dot(self) -> str:
        """The graph in Graphviz' text form; plates are boxes."""
        from ppl.render import as_dot

        return as_dot(self)

    def render(self, file: str | None = None) -> Any:
        """Draw with Graphviz: returns a ``graphviz.Source``, or writes ``file`` (its ending names the format)."""
        from ppl.render import render

        return render(self, file)


def refs(tree: Any) -> Iterator[int]:
    """Ids of all :class:`Ref` in a nested structure of tuples, lists and mappings."""
    if isinstance(tree, Ref):
        yield tree.id
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from refs(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from refs(value)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))


def substitute(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of a nested structure with ``replace`` applied to every leaf."""
    if isinstance(tree, Mapping):
        return {key: substitute(value, replace) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)) and not isinstance(tree, Tensor):
        items = [substitute(value, replace) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*items)
        # torch.Size holds nothing but whole numbers; a copy need not.
        return tuple(items) if isinstance(tree, torch.Size) else type(tree)(items)
    if isinstance(tree, slice):
        return slice(replace(tree.start), replace(tree.stop), replace(tree.step))
    return replace(tree)


def ancestors(plates: Mapping[str, Plate], name: str) -> tuple[str, ...]:
    """Every plate that ``name`` lies within, nearest first."""
    found: list[str] = []
    queue = list(plates[name].parents)
    while queue:
        plate = queue.pop(0)
        if plate not in found:
            found.append(plate)
            queue.extend(plates[plate].parents)
    return tuple(found)


def maximal(
    plates: Mapping[str, Plate], names: tuple[str, ...] | frozenset[str]
) -> tuple[str, ...]:
    """Drop every plate that another one of ``names`` lies within; keep the order of declaration."""
    implied = {a for name in names for a in ancestors(plates, name)}
    return tuple(p for p in plates if p in names and p not in implied)
