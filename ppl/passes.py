"""What backends ask of a graph: how factors touch variables, and how expressions depend on latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from ppl.distributions import MultivariateNormal, Normal
from ppl.graph import Access, Factor, Graph, Law, Node, Ref, refs


class Degree(IntEnum):
    """How an expression depends on a set of latents."""

    CONSTANT = 0
    AFFINE = 1
    BILINEAR = 2  # affine in each latent with the others held fixed
    NONLINEAR = 3


# torch functions that are linear in their only varying operand
_LINEAR = frozenset(
    """__neg__ neg negative sum mean reshape view flatten squeeze unsqueeze transpose permute t T mT getitem stack cat
    concat clone contiguous detach expand flip roll diff unbind select narrow positive constant _identity to double
    float cumsum movedim swapaxes expand_as broadcast_to split chunk diagonal diag_embed fft_fft fft_ifft fft_rfft
    fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn
    fft_fftshift fft_ifftshift real imag conj view_as_real view_as_complex pad tile repeat
    unfold fold trace tril triu rot90 fliplr flipud hstack vstack avg_pool1d avg_pool2d""".split()
)
_SUM = frozenset("add sub subtract __add__ __radd__ __sub__ __rsub__ rsub".split())
_PRODUCT = frozenset(
    """mul multiply __mul__ __rmul__ matmul __matmul__ __rmatmul__ mv mm dot vdot inner outer einsum linear vecdot kron
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""".split()
)
_QUOTIENT = frozenset("div divide true_divide __truediv__ __div__".split())


def accesses(graph: Graph, factor: Factor) -> dict[str, frozenset[Access]]:
    """For every variable of a factor's scope, the ways in which the factor reaches it."""
    found: dict[str, set[Access]] = {}
    laws = [factor.law, factor.chain[1] if factor.chain else None]
    roots: list[int] = list(refs((factor.value, *(law.arguments for law in laws if law))))
    memo: set[tuple[int, Access | None]] = set()
    queue: list[tuple[int, Access | None]] = [(i, None) for i in roots]
    while queue:
        i, mark = queue.pop()
        if (i, mark) in memo:
            continue
        memo.add((i, mark))
        node = graph.nodes[i]
        if node.op in ("variable", "previous"):
            kind = "lag" if node.op == "previous" else mark
            found.setdefault(node.name, set()).add(kind or _plain_access(graph, factor, node.name))
        for j, operand in enumerate(node.operands()):
            queue.append((operand, _mark(node, j) or mark))
    return {name: frozenset(kinds) for name, kinds in found.items()}


def _mark(node: Node, operand: int) -> Access | None:
    if node.op == "gather" and operand == 0:
        return "gather"
    if node.op in ("reduce", "dot", "collect"):
        return "all"
    if node.op == "shift":
        return "lag"
    return "gather" if node.op == "pick" else None


def _plain_access(graph: Graph, factor: Factor, name: str) -> Access:
    plates = set(graph.variables[name].plates)
    here = set(factor.plates)
    if plates == here:
        return "same"
    if plates <= here:
        return "broadcast"
    return "gather" if plates <= graph.closure(factor.plates) else "all"


def degree(
    graph: Graph, item: Any, latents: frozenset[str], memo: dict[int, Degree] | None = None
) -> Degree:
    """Degree of an expression in ``latents``; products with covariates and params stay affine.

    >>> @model
    ... def line():
    ...     slope, base = latent("slope", Normal(0.0, 1.0)), latent("base", Normal(0.0, 1.0))
    ...     with plate("point"):
    ...         deterministic("mean", base + slope * given("x"))
    ...         deterministic("square", slope * slope)
    >>> graph = line.graph({"x": [1.0, 2.0]})
    >>> both = frozenset({"slope", "base"})
    >>> degree(graph, graph.factors["mean"].value, both).name
    'AFFINE'
    >>> degree(graph, graph.factors["square"].value, both).name
    'NONLINEAR'
    """
    if not isinstance(item, Ref):
        return Degree.CONSTANT
    memo = {} if memo is None else memo
    if item.id not in memo:
        memo[item.id] = _node_degree(graph, graph.nodes[item.id], latents, memo)
    return memo[item.id]


def _node_degree(
    graph: Graph, node: Node, latents: frozenset[str], memo: dict[int, Degree]
) -> Degree:
    if node.op in ("variable", "previous"):
        return Degree.AFFINE if node.name in latents else Degree.CONSTANT
    parts = [degree(graph, Ref(i), latents, memo) for i in node.operands()]
    top = max(parts, default=Degree.CONSTANT)
    if top == Degree.CONSTANT:
        return top
    if node.op == "gather":
        return parts[0] if len(parts) == 1 or parts[1] == Degree.CONSTANT else Degree.NONLINEAR
    if node.op in ("item", "pick", "shift", "collect"):
        return top
    if node.op == "reduce":
        return top if node.args[1] in ("sum", "mean") else Degree.NONLINEAR
    if node.op == "dot":
        return _product(graph, list(node.operands()), parts, latents)
    return _call_degree(graph, node, parts, top, latents)


def _call_degree(
    graph: Graph, node: Node, parts: Sequence[Degree], top: Degree, latents: frozenset[str]
) -> Degree:
    if node.name == "getitem":
        return parts[0] if all(p == Degree.CONSTANT for p in parts[1:]) else Degree.NONLINEAR
    if node.name in _LINEAR or node.name in _SUM:
        return top
    if node.name in _PRODUCT:
        operands, bias = list(node.operands()), Degree.CONSTANT
        if node.name == "linear" and len(node.args) > 2 and isinstance(node.args[2], Ref):
            operands, parts, bias = operands[:-1], parts[:-1], parts[-1]  # x @ weight + bias
        return max(_product(graph, operands, parts, latents), bias)
    if node.name in _QUOTIENT and isinstance(node.args[0], Ref):
        denominator = parts[1] if len(parts) > 1 else Degree.CONSTANT
        return parts[0] if denominator == Degree.CONSTANT else Degree.NONLINEAR
    return Degree.NONLINEAR


def _product(
    graph: Graph, operands: Sequence[int], parts: Sequence[Degree], latents: frozenset[str]
) -> Degree:
    varying = [i for i, p in zip(operands, parts, strict=True) if p != Degree.CONSTANT]
    if not varying:
        return Degree.CONSTANT
    if len(varying) == 1:
        return max(parts)
    if len(varying) > 2 or max(parts) > Degree.AFFINE:
        return Degree.NONLINEAR
    left, right = (upstream(graph, i) & latents for i in varying)
    return Degree.NONLINEAR if left & right else Degree.BILINEAR


def upstream(graph: Graph, node: int) -> frozenset[str]:
    """Variables that a node depends on."""
    found: set[str] = set()
    queue, seen = [node], set()
    while queue:
        here = graph.nodes[queue.pop()]
        if here.id in seen:
            continue
        seen.add(here.id)
        if here.op in ("variable", "previous"):
            found.add(here.name)
        queue.extend(here.operands())
    return frozenset(found)


def gaussian_given(graph: Graph, law: Law, latents: frozenset[str]) -> bool:
    """Whether a law is Normal with a mean affine in ``latents`` and a spread free of them."""
    if type(law.family) not in (Normal, MultivariateNormal):
        return False
    for leaf, argument in zip(law.family.leaves(), law.arguments, strict=True):
        allowed = Degree.AFFINE if leaf.path == "loc" else Degree.CONSTANT
        if degree(graph, argument, latents) > allowed:
            return False
    return True


def implied_gathers(graph: Graph) -> Mapping[str, tuple[str, ...]]:
    """For each factor, the variables it looks up through ``within=`` or an index."""
    found: dict[str, tuple[str, ...]] = {}
    for f in graph.factors.values():
        names = tuple(v for v in f.scope if v != f.name and "gather" in graph.access(f.name, v))
        if names:
            found[f.name] = names
    return found
