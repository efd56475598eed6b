"""The linear map of a recognised model as an operator, and how arrays over plates become vectors.

``dot(A, x, over=...)``, ``A @ x`` and ``(A * x).sum(-1)`` give the matrix itself. Any other linear expression is
lowered and applied as it is; its transpose is derived. Several latents stand beside each other as blocks of columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Graph, Node, Ref, Variable
from ppl.inference.amp.operators import Operator, beside, dense, matrix_free, rescaled, sparse
from ppl.inference.amp.recognise import Linear, terms, unknowns
from ppl.lower import Compiler, Lowered, map_name
from ppl.passes import upstream

LEAD = (
    "draw"  # restarts, probes, unit vectors: lowering lets chains share this axis with their past
)
_SMALL = 1 << 20  # entries up to which any linear expression is written out as a matrix
_FEW_COLUMNS = 64  # intercepts and group effects: written out beside any matrix
_SPARSE = 0.05  # share of non-zero entries below which a large matrix is kept sparse
_MATMULS = frozenset(("matmul", "__matmul__", "__rmatmul__", "mv", "dot", "inner", "vecdot"))
_TIMES = frozenset(("mul", "multiply", "__mul__", "__rmul__"))


@dataclass(frozen=True)
class Frame:
    """How an array ``[L, *plates, *event]`` becomes ``[L, B, k]``: ``B`` right-hand sides, ``k`` unknowns or rows."""

    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    event: tuple[int, ...]
    batch: tuple[str, ...]

    @property
    def order(self) -> list[int]:
        """Positions of the plates, those of the batch first."""
        first = [self.plates.index(p) for p in self.batch]
        return first + [i for i, p in enumerate(self.plates) if p not in self.batch]

    @property
    def repeats(self) -> int:
        """Number of right-hand sides."""
        return math.prod(self.sizes[self.plates.index(p)] for p in self.batch)

    @property
    def count(self) -> int:
        """Scalars in one right-hand side."""
        return math.prod((*self.sizes, *self.event)) // self.repeats

    def flat(self, array: Tensor, trailing: int = 0) -> Tensor:
        """``[L, *plates, *event, *rest] -> [L, B, k, *rest]``; axes of length one stay so where they can."""
        if trailing == 0 and array.numel() == 1:  # a number for all: most parameters of most laws
            return array.reshape(1, 1, 1)
        p, first = len(self.sizes), 1 + len(self.batch)
        rank = 1 + p + len(self.event) + trailing
        array = array[(None,) * (rank - array.ndim)]
        array = array.permute(0, *(1 + i for i in self.order), *range(1 + p, rank))
        whole = [self.sizes[i] for i in self.order] + list(self.event)
        stop = rank - trailing
        lead = _merged(array.shape[1:first], whole[: first - 1])
        own = _merged(array.shape[first:stop], whole[first - 1 :])
        rest = array.shape[stop:]
        array = array.expand(-1, *lead, *own, *rest)
        return array.reshape(array.shape[0], math.prod(lead), math.prod(own), *rest)

    def shaped(self, vector: Tensor) -> Tensor:
        """``[L, B, k] -> [L, *plates, *event]``, whole."""
        vector = vector.expand(-1, self.repeats, self.count)
        sizes = [self.sizes[i] for i in self.order]
        array = vector.reshape(vector.shape[0], *sizes, *self.event)
        back = [1 + self.order.index(i) for i in range(len(self.sizes))]
        return array.permute(0, *back, *range(1 + len(self.sizes), array.ndim))


def _merged(have: Sequence[int], full: Sequence[int]) -> list[int]:
    """Sizes to expand to: all of them, or ones where nothing varies."""
    return list(full) if any(h != 1 for h in have) else [1] * len(full)


def frame(bound: Bound, variable: Variable, batch: tuple[str, ...]) -> Frame:
    """The frame of a latent or an observed site."""
    sizes = tuple(bound.size(p) for p in variable.plates)
    return Frame(variable.plates, sizes, variable.event_shape, batch)


def static_arrays(bound: Bound) -> dict[str, Tensor]:
    """Data and memberships, the inputs of lowered expressions."""
    return dict(bound.dense) | {map_name(*key): m for key, m in bound.maps.items()}


def compiler(bound: Bound, linear: Linear, extra: Sequence[str] = ()) -> Compiler:
    """Lowering with one leading axis on every latent and param."""
    graph = linear.graph
    axes = {
        v.name: (LEAD, *v.plates) if v.role in ("latent", "param") else v.plates
        for v in graph.variables.values()
    }
    order = (LEAD, *graph.plates, *extra)
    return Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)


def fixed(lowered: Lowered, bound: Bound) -> Lowered:
    """The function with data in place."""
    static = static_arrays(bound)
    return lowered.given({k: v for k, v in static.items() if k in lowered.inputs})


@dataclass(frozen=True, eq=False)
class Offset:
    """The predictor at zero latents as a function of the params."""

    lowered: tuple[Lowered | None, ...]  # one an output
    frames: tuple[Frame, ...]
    names: tuple[str, ...]  # params that it reads

    def __call__(self, params: Mapping[str, Tensor]) -> list[Tensor | None]:
        """One array ``[R | 1, B | 1, m | 1]`` an output, None where it is always zero."""
        return [
            None if low is None else f.flat(low({k: params[k] for k in low.inputs})[0])
            for low, f in zip(self.lowered, self.frames, strict=True)
        ]


def make_offset(bound: Bound, linear: Linear) -> Offset:
    """Lower every predictor as a function of the params, latents at zero."""
    zeros = _zeros(bound, linear)
    lowered = [_predictor(bound, linear, o.site, [(1.0, o.node)]) for o in linear.outputs]
    frames = tuple(
        frame(bound, linear.graph.variables[o.site], linear.batch) for o in linear.outputs
    )
    names = {n for o in linear.outputs for n in upstream(linear.graph, o.node)}
    params = tuple(v.name for v in linear.graph.role("param") if v.name in names)
    latents = {v.name: zeros[v.name] for v in linear.graph.role("latent")}
    fixed_in = [x.given({k: v for k, v in latents.items() if k in x.inputs}) for x in lowered]
    return Offset(tuple(_unless_zero(x) for x in fixed_in), frames, params)


def _unless_zero(lowered: Lowered) -> Lowered | None:
    always = not lowered.inputs and not torch.count_nonzero(lowered({})[0])
    return None if always else lowered


class Mixing(NamedTuple):
    """The linear map of coefficients and rows in units in which they are alike.

    Variances that all coefficients share speak of columns of one norm; an intercept beside a hundred
    covariates would be taken for as badly known as they are. Likewise rows of several sites.
    """

    operator: Operator
    columns: tuple[
        float, ...
    ]  # of each block: a coefficient times its unit has a column of norm one
    rows: tuple[float, ...]  # of each site: a predictor over its unit has a row of one norm


def make_operator(bound: Bound, linear: Linear) -> Mixing:
    """The linear map from all mixed latents, beside each other, to all rows, below each other.

    A single block, and a single site, keep their own scale: unit 1.
    """
    grid = [
        [_block(bound, linear, o.site, o.node, m.name) for o in linear.outputs]
        for m in linear.mixed
    ]
    blocks = [_below(rows) for rows in grid]
    columns, rows = [1.0] * len(blocks), [1.0] * len(linear.outputs)
    if len(blocks) > 1:
        columns = [(b.squared_frobenius / b.shape[1]) ** 0.5 or 1.0 for b in blocks]
    if len(rows) > 1:
        shares = [
            sum(b[i].squared_frobenius / u**2 for b, u in zip(grid, columns, strict=True))
            for i in range(len(rows))
        ]
        rows = [(f / grid[0][i].shape[0]) ** 0.5 or 1.0 for i, f in enumerate(shares)]
    if len(blocks) == len(rows) == 1:
        return Mixing(blocks[0], (1.0,), (1.0,))
    like = torch.ones((), dtype=bound.dtype, device=bound.device)
    left = torch.cat([(like / w).expand(o.shape[0]) for w, o in zip(rows, grid[0], strict=True)])
    scaled = [
        rescaled(b, rows=left, columns=(like / u).expand(b.shape[1]))
        for b, u in zip(blocks, columns, strict=True)
    ]
    return Mixing(beside(scaled), tuple(columns), tuple(rows))


# ---- blocks ------------------------------------------------------------------------------------


def _block(bound: Bound, linear: Linear, site: str, node: int, name: str) -> Operator:
    """The map from one latent to one site."""
    graph, here = linear.graph, linear.graph.variables
    out, source = (frame(bound, here[v], linear.batch) for v in (site, name))
    own = [(s, i) for s, i in terms(graph, node) if name in upstream(graph, i)]
    if not own:
        zero = torch.zeros(out.count, source.count, dtype=bound.dtype, device=bound.device)
        return dense(zero)
    matrices = [_written_out(bound, linear, site, s, i, name) for s, i in own]
    found = [m for m in matrices if m is not None]
    if len(found) == len(matrices):
        return _kept(found[0] if len(found) == 1 else _summed(found))
    lowered = _predictor(bound, linear, site, own)
    operator = _matrix_free(bound, linear, lowered, out, name)
    if source.count <= _FEW_COLUMNS or source.count * out.count <= _SMALL:
        return _kept(operator.to_dense())
    return operator


def _summed(matrices: Sequence[Tensor]) -> Tensor:
    if any(m.layout == torch.strided for m in matrices):
        matrices = [m.to_dense() for m in matrices]
    return functools.reduce(torch.add, matrices)


def _kept(matrix: Tensor) -> Operator:
    """A matrix that is mostly zeros as CSR, if it is large; some entries in a hundred tell for most matrices."""
    if matrix.layout != torch.strided:
        return sparse(matrix)
    if matrix.numel() > _SMALL and _is_sparse(matrix.flatten()[::101]) and _is_sparse(matrix):
        return sparse(matrix.to_sparse_csr())
    return dense(matrix.contiguous())


def _is_sparse(entries: Tensor) -> bool:
    return int(torch.count_nonzero(entries)) < _SPARSE * entries.numel()


def _below(operators: Sequence[Operator]) -> Operator:
    """``[A1; A2; ...]``: the rows of several sites."""
    if len(operators) == 1:
        return operators[0]
    if all(o.kind == "dense" for o in operators):
        return dense(torch.cat([o.to_dense() for o in operators]))
    sizes = [o.shape[0] for o in operators]

    def back(z: Tensor) -> Tensor:
        parts = z.split(sizes, -1)
        return torch.stack([o.rmv(p) for o, p in zip(operators, parts, strict=True)]).sum(0)

    first = operators[0]
    return matrix_free(
        lambda x: torch.cat([o.mv(x) for o in operators], -1),
        first.shape[1],
        dtype=first.dtype,
        device=first.device,
        batched=True,
        transpose=back,
    )


def _predictor(
    bound: Bound, linear: Linear, site: str, summands: Sequence[tuple[float, int]]
) -> Lowered:
    """The signed sum of some expressions with the axes of a site."""
    c, v = compiler(bound, linear), linear.graph.variables[site]
    lead, event = (LEAD, *v.plates), len(v.event_shape)
    total = None
    for sign, node in summands:
        part = c.align(c.operand(Ref(node)), lead, event)
        slot = part.slot if sign > 0 else c.emit(torch.neg, part.slot)
        total = slot if total is None else c.emit(torch.add, total, slot)
    assert total is not None
    return fixed(c.finish([part._replace(slot=total)]), bound)


def _zeros(bound: Bound, linear: Linear) -> dict[str, Tensor]:
    """Every latent at zero with one entry a batch plate, every param at its start."""
    arrays = {}
    for v in linear.graph.role("latent", "param"):
        sizes = [1 if p in linear.batch else bound.size(p) for p in v.plates]
        arrays[v.name] = torch.zeros(1, *sizes, *v.event_shape, dtype=bound.dtype).to(bound.device)
        if v.role == "param":
            arrays[v.name] = arrays[v.name] + torch.as_tensor(v.initial).to(arrays[v.name])
    return arrays


def _matrix_free(bound: Bound, linear: Linear, lowered: Lowered, out: Frame, name: str) -> Operator:
    v, zeros = linear.graph.variables[name], _zeros(bound, linear)
    arrays = {k: zeros[k] for k in lowered.inputs}
    source = Frame(v.plates, tuple(zeros[name].shape[1 : 1 + len(v.plates)]), v.event_shape, ())
    # Right-hand sides share the map: it is applied to the first of them, standing for all.
    sizes = tuple(1 if p in linear.batch else s for p, s in zip(out.plates, out.sizes, strict=True))
    single = Frame(out.plates, sizes, out.event, ())
    base: list[Tensor] = []

    def raw(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, x.shape[-1])
        (value,) = lowered({**arrays, name: source.shaped(flat)})
        value = value[(None,) * (1 + len(sizes) + len(out.event) - value.ndim)]
        for at, plate in enumerate(out.plates):
            if plate in linear.batch:
                value = value.narrow(1 + at, 0, 1)
        shape = (flat.shape[0], 1, single.count)
        return single.flat(value).expand(shape).reshape(*x.shape[:-1], single.count)

    def apply(x: Tensor) -> Tensor:
        return raw(x) - base[0]

    base.append(raw(torch.zeros(source.count, dtype=bound.dtype, device=bound.device)))
    apply = raw if not torch.count_nonzero(base[0]) else apply
    return matrix_free(
        apply,
        source.count,
        dtype=bound.dtype,
        device=bound.device,
        batched=True,
        transpose=_transpose(apply, source.count),
    )


def _transpose(function: Callable[[Tensor], Tensor], n: int) -> Callable[[Tensor], Tensor]:
    """The pullback of a linear function: the same at every point, so that one recorded pass serves all calls.

    ``torch.func.vjp`` would record it anew in each call, and loads the compiler on the first.
    """
    recorded: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def back(z: Tensor) -> Tensor:
        lead = tuple(z.shape[:-1])
        if lead not in recorded:
            with torch.enable_grad():
                x = z.new_zeros(*lead, n).requires_grad_()
                recorded.clear()
                recorded[lead] = (x, function(x))
        x, value = recorded[lead]
        return torch.autograd.grad(value, x, z, retain_graph=True)[0]

    return back


# ---- matrices that stand in the expression -----------------------------------------------------


def _written_out(
    bound: Bound, linear: Linear, site: str, sign: float, node: int, name: str
) -> Tensor | None:
    """The matrix ``[m, n]`` of a summand that is a product of fixed numbers and the latent by name."""
    found = _contraction(linear.graph, linear.graph.nodes[node], name, linear.batch)
    if found is None:
        return None
    other, over, transposed = found
    v = linear.graph.variables[site]
    plates = tuple(p for p in v.plates if p not in linear.batch)
    given = _sparse_itself(bound, linear.graph, other, (*plates, *over))
    if given is not None:
        given = given if not transposed else given.to_sparse_coo().t().to_sparse_csr()
        return sign * given
    c = compiler(bound, linear)
    operand = c.operand(other)
    missing = [a for a in operand.axes if a not in (*plates, *over)]
    covered = {a for p in plates for a in linear.graph.ancestors(p)}
    if any(a not in covered for a in missing):
        return None
    axes = (*plates, *over)
    lowered = fixed(c.finish([c.align(operand, axes)]), bound)
    (value,) = lowered({})
    value = value[(None,) * (len(axes) + operand.event_ndim - value.ndim)]
    value = value.expand(*(bound.size(a) for a in axes), *value.shape[len(axes) :])
    if transposed:
        value = value.mT
    rows = frame(bound, v, linear.batch).count
    columns = frame(bound, linear.graph.variables[name], linear.batch).count
    if value.numel() != rows * columns:
        return None  # one number for a whole vector: left to broadcasting
    matrix = value.reshape(rows, columns)
    return sign * matrix if sign != 1.0 else matrix


def _sparse_itself(
    bound: Bound, graph: Graph, item: object, axes: tuple[str, ...]
) -> Tensor | None:
    """The data matrix that stands alone in a product, if it is sparse and its axes are those of the product."""
    if not isinstance(item, Ref) or graph.nodes[item.id].op != "variable":
        return None
    name = graph.nodes[item.id].name
    value = bound.values.get(name)
    if value is None or value.layout == torch.strided:
        return None
    return value if graph.variables[name].plates in (axes, ()) else None


def _contraction(
    graph: Graph, node: Node, name: str, batch: tuple[str, ...]
) -> tuple[object, tuple[str, ...], bool] | None:
    """What multiplies the latent, the plate summed over (if any), and whether columns come first."""
    v, inner = graph.variables[name], node
    if node.op == "call" and node.name == "sum" and _sums_last(graph, node):
        inner = graph.nodes[node.args[0].id]
        if inner.op != "dot" and (inner.op != "call" or inner.name not in _TIMES):
            return None
    elif node.op != "dot" and not (node.op == "call" and node.name in _MATMULS):
        return None
    if len(inner.args) != 2 or inner.kwargs:
        return None
    at = [i for i, a in enumerate(inner.args) if _is_variable(graph, a, name)]
    if len(at) != 1:
        return None
    other = inner.args[1 - at[0]]
    if isinstance(other, Ref) and upstream(graph, other.id) & unknowns(graph):
        return None
    own = tuple(p for p in v.plates if p not in batch)
    rank = len(_event_shape(graph, other))
    if inner.op == "dot":  # of vectors: dot(a, x, over=group).sum(-1)
        grouped = any(p in inner.plates for p in graph.ancestors(inner.name))
        same = _event_shape(graph, other) == v.event_shape and rank == int(inner is not node)
        return (other, own, False) if own == (inner.name,) and same and not grouped else None
    if own or len(v.event_shape) != 1 or rank not in (1, 2):
        return None
    if inner is not node:  # (a * x).sum(-1)
        return (other, (), False) if _event_shape(graph, other)[-1] == v.event_shape[0] else None
    latent_first = (at[0] == 0) != (node.name == "__rmatmul__")
    return other, (), latent_first and rank == 2


def _is_variable(graph: Graph, item: object, name: str) -> bool:
    return (
        isinstance(item, Ref)
        and graph.nodes[item.id].op == "variable"
        and graph.nodes[item.id].name == name
    )


def _event_shape(graph: Graph, item: object) -> tuple[int, ...]:
    if isinstance(item, Ref):
        return graph.nodes[item.id].event_shape
    return tuple(item.shape) if isinstance(item, Tensor) else ()


def _sums_last(graph: Graph, node: Node) -> bool:
    """Whether ``sum`` runs over the last event axis only."""
    if not isinstance(node.args[0], Ref):
        return False
    rank = len(graph.nodes[node.args[0].id].event_shape)
    rest = [*node.args[1:], *node.kwargs.values()]
    if not rest:
        return rank == 1
    return len(rest) == 1 and rest[0] in (-1, rank - 1, (-1,), (rank - 1,), [-1])
