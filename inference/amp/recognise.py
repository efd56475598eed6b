"""Find the generalised linear model in a graph: separable prior, one linear predictor a site, separable channel.

The *predictor* of an observed site is the largest expression in the parameters of its law that is affine in the
latents and params together. What stands above it must act on each element alone: that is the channel. The
latents below it are mixed by the linear map; discrete latents in *their* laws, or that multiply them, are
gates (group sparsity, chains of supports) and belong to :mod:`~ppl.inference.amp.structure`.

Source: the class of models is that of [Rangan2011].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ppl.backend import Reason
from ppl.distributions import MultivariateLaplace, Normal
from ppl.graph import Factor, Graph, Node, Ref, Variable, refs
from ppl.inference.amp.laws import reason as prior_reason
from ppl.operations import POINTWISE
from ppl.passes import Degree, degree, upstream

_TIMES = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
_PLUS = frozenset(("add", "sub", "subtract", "__add__", "__radd__", "__sub__", "__rsub__", "rsub"))
_SCALED = frozenset(("neg", "__neg__", "negative", "div", "divide", "true_divide", "__truediv__"))
_ACROSS = ("gather", "reduce", "dot", "pick", "shift", "collect")


@dataclass(frozen=True)
class Mixed:
    """A latent that the linear map mixes; ``name`` is that of its node, a product with a gate or the latent."""

    name: str
    latent: str
    gate: str = ""  # discrete latent that multiplies it


@dataclass(frozen=True)
class Output:
    """An observed site and the node of its linear predictor in the law's parameters."""

    site: str
    node: int


@dataclass(frozen=True, eq=False)
class Linear:
    """A recognised model. Products with gates are variables of their own in ``graph``."""

    graph: Graph
    mixed: tuple[Mixed, ...]
    outputs: tuple[Output, ...]
    gates: tuple[str, ...]  # discrete latents above the mixed ones, in the order of the program
    batch: tuple[str, ...]  # plates of right-hand sides: the same map, other numbers


def supports(graph: Graph) -> list[Reason]:
    """Why approximate message passing cannot fit this graph, by site; empty when it can."""
    found = recognise(graph)
    if not isinstance(found, Linear):
        return found
    return [*_law_reasons(found)]


def recognise(graph: Graph) -> Linear | list[Reason]:
    """The linear model in a graph, or every reason why it is none."""
    reasons = [*_factor_reasons(graph), *_site_reasons(graph)]
    if reasons:
        return reasons
    whole, products = _with_products(graph)
    outputs: list[Output] = []
    for factor in _observed(whole):
        found = _output(whole, factor)
        if isinstance(found, Output):
            outputs.append(found)
        else:
            reasons.append(found)
    below = frozenset().union(*(upstream(whole, o.node) for o in outputs))
    mixed = tuple(
        products.get(v.name, Mixed(v.name, v.name)) for v in whole.latents if v.name in below
    )
    gates = _gates(whole, mixed)
    reasons += _prior_reasons(whole, mixed, gates)
    if not reasons:
        reasons += _idle_reasons(whole, mixed, gates)
    if reasons:
        return reasons
    return Linear(whole, mixed, tuple(outputs), gates, _batch(whole, mixed, outputs))


def unknowns(graph: Graph) -> frozenset[str]:
    """Names of latents and params."""
    return frozenset(v.name for v in graph.role("latent", "param"))


def terms(graph: Graph, node: int, sign: float = 1.0) -> Iterator[tuple[float, int]]:
    """The summands of an expression with their signs."""
    here = graph.nodes[node]
    plain = here.op == "call" and all(isinstance(a, Ref) for a in here.args) and not here.kwargs
    if plain and here.name in ("neg", "__neg__", "negative"):
        yield from terms(graph, here.args[0].id, -sign)
    elif plain and here.name in _PLUS and len(here.args) == 2:
        left, right = (a.id for a in here.args)
        minus = "sub" in here.name
        flipped = here.name in ("__rsub__", "rsub")
        yield from terms(graph, left, -sign if flipped else sign)
        yield from terms(graph, right, -sign if minus and not flipped else sign)
    else:
        yield sign, node


# ---- factors and sites -------------------------------------------------------------------------


def _observed(graph: Graph) -> list[Factor]:
    return [f for f in graph.densities if f.kind == "conditional" and _role(graph, f) == "observed"]


def _role(graph: Graph, factor: Factor) -> str:
    return graph.variables[factor.name].role


def _factor_reasons(graph: Graph) -> Iterator[Reason]:
    for f in graph.densities:
        if f.kind == "potential":
            yield Reason(
                f.name,
                "is a free factor, and amp knows priors and observations only.",
                "Write it as observe(name, law) with data, or use method='qem'.",
            )
        elif f.chain is not None and not graph.variables[f.name].is_discrete:
            yield Reason(
                f.name,
                "is a Markov chain of continuous values, and amp's priors are separable.",
                "Write it through its innovations, x = cumsum(step); or use method='gbp'.",
            )
        elif f.law is not None and f.law.family.event_dim > 0 and not _is_vector_prior(graph, f):
            yield Reason(
                f.name,
                f"{f.law} is a joint law of several numbers, and amp's rules are scalar.",
                "Use a law of single elements (Normal, ...), or method='qem'.",
            )
    if not _observed(graph):
        yield Reason(
            "", "no site is observed.", "Give amp data, or draw from the prior with model.sample."
        )
    if not graph.latents:
        yield Reason("", "the model has no latent.", "Use method='qem' to learn params alone.")


def _is_vector_prior(graph: Graph, factor: Factor) -> bool:
    """Whether a joint law is one of those that a rule exists for: the group Lasso's."""
    assert factor.law is not None
    is_latent = factor.kind == "conditional" and _role(graph, factor) == "latent"
    return is_latent and type(factor.law.family) is MultivariateLaplace


def _site_reasons(graph: Graph) -> Iterator[Reason]:
    for v in graph.latents:
        if v.is_discrete and v.cardinality is None:
            yield Reason(
                v.name,
                "is discrete without a fixed finite number of values.",
                "Use Bernoulli or Categorical, or method='qem'.",
            )


# ---- products with gates -----------------------------------------------------------------------


def _with_products(graph: Graph) -> tuple[Graph, dict[str, Mixed]]:
    """The graph with every ``gate * latent`` below an observed law as a variable of its own."""
    nodes, variables, products = list(graph.nodes), dict(graph.variables), {}
    for i in _below_laws(graph):
        found = _product(graph, graph.nodes[i])
        if found is None:
            continue
        node, source = graph.nodes[i], graph.variables[found.latent]
        nodes[i] = replace(node, op="variable", func=None, args=(), kwargs={}, name=found.name)
        variables[found.name] = replace(source, name=found.name, plates=node.plates)
        products[found.name] = found
    return replace(graph, nodes=tuple(nodes), variables=variables), products


def _below_laws(graph: Graph) -> list[int]:
    roots = [i for f in _observed(graph) if f.law for i in refs(f.law.arguments)]
    found: set[int] = set()
    while roots:
        i = roots.pop()
        if i not in found:
            found.add(i)
            roots.extend(graph.nodes[i].operands())
    return sorted(found)


def _product(graph: Graph, node: Node) -> Mixed | None:
    """``gate * latent``, both by name, where the gate is Bernoulli and the latent Normal."""
    ids = list(node.operands())
    if node.op != "call" or node.name not in _TIMES or len(ids) != 2 or len(node.args) != 2:
        return None
    both = [graph.nodes[i] for i in ids]
    if any(n.op != "variable" or graph.variables[n.name].role != "latent" for n in both):
        return None
    gate, latent = sorted((graph.variables[n.name] for n in both), key=lambda v: not v.is_discrete)
    if not gate.is_discrete or gate.cardinality != 2 or latent.is_discrete:
        return None
    if tuple(node.plates) != latent.plates or node.event_shape != latent.event_shape:
        return None
    return Mixed(f"{gate.name} * {latent.name}", latent.name, gate.name)


# ---- predictor and channel ---------------------------------------------------------------------


def _output(graph: Graph, factor: Factor) -> Output | Reason:
    """The predictor of an observed site, or why there is none."""
    assert factor.law is not None
    latents = frozenset(v.name for v in graph.latents)
    roots = [i for i in refs(factor.law.arguments) if upstream(graph, i) & latents]
    if not roots:
        return Reason(
            factor.name,
            "its law does not depend on any latent.",
            "Leave it out, or pass it by given().",
        )
    frontier, above = _frontier(graph, roots, latents)
    core = {_core(graph, i, latents) for i in frontier}
    if (
        len(frontier) > 1 and len(core) == 1
    ):  # cut points: the same predictor against several params
        frontier = [core.pop()]
    reason = _stray(graph, factor, frontier, latents) or _path_reason(graph, factor, above)
    if reason is not None:
        return reason
    site, node = graph.variables[factor.name], graph.nodes[frontier[0]]
    if node.event_shape != site.event_shape and node.event_shape != ():
        return Reason(
            factor.name,
            f"its elements have shape {site.event_shape}, its linear predictor {node.event_shape}.",
            "Give both one shape, or open a plate over the elements.",
        )
    if node.event_shape != site.event_shape:
        return Reason(
            factor.name,
            "several numbers of one element share one linear predictor.",
            "Open a plate over them, so that each is an observation of its own.",
        )
    return Output(factor.name, node.id)


def _frontier(
    graph: Graph, roots: list[int], latents: frozenset[str]
) -> tuple[list[int], list[Node]]:
    """The largest affine expressions that involve latents, and the nodes above them."""
    names, memo = unknowns(graph), {}  # type: ignore[var-annotated]
    found: list[int] = []
    above: list[Node] = []
    queue, seen = list(roots), set()
    while queue:
        i = queue.pop(0)
        if i in seen or not upstream(graph, i) & latents:
            continue
        seen.add(i)
        if degree(graph, Ref(i), names, memo) <= Degree.AFFINE:
            found.append(i)
        else:
            above.append(graph.nodes[i])
            queue.extend(graph.nodes[i].operands())
    return found, above


def _core(graph: Graph, node: int, latents: frozenset[str]) -> int:
    """An expression without what is added to it and multiplied with it that is free of latents."""
    while graph.nodes[node].op == "call" and graph.nodes[node].name in _PLUS | _TIMES | _SCALED:
        live = [i for i in graph.nodes[node].operands() if upstream(graph, i) & latents]
        if len(live) != 1:
            break
        node = live[0]
    return node


def _stray(
    graph: Graph, factor: Factor, frontier: list[int], latents: frozenset[str]
) -> Reason | None:
    """Latents in the law apart from the one predictor: scales, products of latents, two predictors."""
    if len(frontier) == 1:
        return None
    sets = [upstream(graph, i) & latents for i in frontier]
    assert factor.law is not None
    alone = [upstream(graph, i) & latents for i in refs(factor.law.arguments)]
    single = [next(iter(names)) for names in alone if len(names) == 1]
    scale = next((graph.variables[n] for n in single if _is_scale(graph.variables[n])), None)
    if scale is not None:
        return Reason(
            scale.name,
            f"is a latent in the law of '{factor.name}' outside its linear predictor; amp learns such constants.",
            f"Write {scale.name} = param('{scale.name}', init), which EM learns; or use method='qem'.",
        )
    names = " and ".join(sorted({n for s in sets for n in s}))
    return Reason(
        factor.name,
        f"its law depends on {len(frontier)} different linear expressions of {names}; amp has channels of one.",
        "Keep one linear predictor (make the others params), or use method='qem'.",
    )


def _is_scale(v: Variable) -> bool:
    """Whether a latent that fills an argument of a law alone looks like a scale: positive."""
    return not v.is_discrete and "real" not in str(v.support).lower()


def _path_reason(graph: Graph, factor: Factor, above: list[Node]) -> Reason | None:
    vector = bool(graph.variables[factor.name].event_shape)
    for node in above:
        if node.op in _ACROSS or node.op == "item":
            what = (
                f"{node.op} over '{node.name}'"
                if node.op in _ACROSS
                else "a function of several results"
            )
        elif vector and node.name not in POINTWISE:
            what = f"torch's {node.name}"
        else:
            continue
        return Reason(
            factor.name,
            f"{what} ({node.where}) is neither affine in the latents nor acts on single elements of the predictor.",
            "Write the predictor as a linear expression of latents with fixed numbers, or use method='qem'.",
        )
    return None


# ---- priors ------------------------------------------------------------------------------------


def _gates(graph: Graph, mixed: tuple[Mixed, ...]) -> tuple[str, ...]:
    """Discrete latents above the mixed ones, through any number of discrete levels."""
    found: set[str] = {m.gate for m in mixed if m.gate}
    queue = [*found, *(m.latent for m in mixed)]
    while queue:
        name = queue.pop()
        for parent in graph.factors[name].scope:
            v = graph.variables[parent]
            if parent != name and v.role == "latent" and v.is_discrete and parent not in found:
                found.add(parent)
                queue.append(parent)
    return tuple(v.name for v in graph.latents if v.name in found)


def _prior_reasons(
    graph: Graph, mixed: tuple[Mixed, ...], gates: tuple[str, ...]
) -> Iterator[Reason]:
    own = {m.latent for m in mixed}
    for m in mixed:
        factor, v = graph.factors[m.latent], graph.variables[m.latent]
        if v.is_discrete and m.latent in gates:
            yield Reason(
                m.latent,
                "is both mixed linearly and a parent of another latent.",
                "Use two latents, or method='qem'.",
            )
        if v.is_discrete and factor.chain is not None:
            yield Reason(
                m.latent,
                "is a chain of discrete values mixed linearly; amp mixes separable priors.",
                "Let the chain gate a latent: Normal(...) * on, or SpikeSlab(on, slab).",
            )
        if m.gate and (factor.law is None or type(factor.law.family) is not Normal):
            yield Reason(
                m.latent,
                f"is multiplied by the gate '{m.gate}', but its law is {factor.law}, not Normal.",
                f"Write one latent: SpikeSlab({m.gate}, slab=Normal(...)).",
            )
        if m.gate and m.latent in {x.latent for x in mixed if x is not m}:
            yield Reason(
                m.latent,
                "is mixed with and without a gate.",
                "Use two latents, or method='qem'.",
            )
    for name in (*(m.latent for m in mixed), *gates):
        yield from _parent_reasons(graph, name, own)


def _parent_reasons(graph: Graph, name: str, mixed: set[str]) -> Iterator[Reason]:
    for parent in graph.parents(name):
        v = graph.variables[parent]
        if v.role == "observed":
            yield Reason(
                name,
                f"its law depends on the observed site '{parent}'.",
                f"Pass '{parent}' by given(), or use method='qem'.",
            )
        if v.role != "latent" or v.is_discrete:
            continue
        if parent in mixed:
            problem = f"is in the law of '{name}' and in the predictor."
            remedy = f"Write '{name}' around it: a latent with mean zero, and {parent} + {name} in the predictor."
        else:
            problem = f"is a latent in the law of '{name}'; amp learns constants of laws, it does not infer them."
            remedy = (
                f"Write {parent} = param('{parent}', init), which EM learns; a mean may also stand in the predictor, "
                f"{parent} + {name}, with '{name}' centred at zero; or use method='qem'."
            )
        yield Reason(parent, problem, remedy)


def _idle_reasons(
    graph: Graph, mixed: tuple[Mixed, ...], gates: tuple[str, ...]
) -> Iterator[Reason]:
    known = {*gates, *(m.name for m in mixed), *(m.latent for m in mixed)}
    for v in graph.latents:
        if v.name not in known:
            yield Reason(
                v.name,
                "has no part in the linear predictor of any observed site.",
                "Leave it out, or use method='qem'.",
            )


def _law_reasons(linear: Linear) -> Iterator[Reason]:
    """Families that no rule can be made of."""
    for m in linear.mixed:
        law = linear.graph.factors[m.latent].law
        problem = None if law is None else prior_reason(law.family)
        if problem is not None:
            yield Reason(m.latent, f"{problem}.", "Give it a wide Normal, or use method='qem'.")


# ---- right-hand sides --------------------------------------------------------------------------


def _batch(graph: Graph, mixed: tuple[Mixed, ...], outputs: list[Output]) -> tuple[str, ...]:
    """Plates that every mixed latent and every observed site varies over, but not the linear map."""
    shared = set(graph.plates)
    for name in (*(m.name for m in mixed), *(o.site for o in outputs)):
        shared &= set(graph.variables[name].plates)
    for output in outputs:
        shared -= _crossed(graph, output.node)
    return tuple(p for p in graph.plates if p in shared)


def _crossed(graph: Graph, node: int) -> set[str]:
    """Plates that the linear map reads across, or whose elements have maps of their own."""
    names, crossed = unknowns(graph), set()
    queue, seen = [node], set()
    while queue:
        here = graph.nodes[queue.pop()]
        if here.id in seen:
            continue
        seen.add(here.id)
        if here.op in _ACROSS:
            crossed |= set(here.name.split(","))
        additive = here.op == "call" and here.name in _PLUS
        for i in here.operands():
            if upstream(graph, i) & names:
                queue.append(i)
            elif not additive:
                crossed |= graph.closure(graph.nodes[i].plates)
    return crossed
