"""One node for a matrix of weights times a vector, however it is written.

``x @ w.T``, ``w @ x``, ``torch.mv(w, x)`` and ``torch.nn.functional.linear(x, w)`` are recorded as ``linear(x, w)``
where ``w`` is a matrix of latents or params, so that what a method knows of layers holds for a user's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppl.value import Value, prototype

if TYPE_CHECKING:
    from ppl.trace import Trace

_PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "mm", "mv"))
_TRANSPOSED = frozenset(("T", "mT", "t"))
_SWAPPED = frozenset(("transpose", "swapaxes", "swapdims"))


def as_linear(trace: Trace, name: str, args: tuple[Any, ...]) -> tuple[Tensor, Value] | None:
    """Vector and matrix of a product that is ``linear(x, w)``; None where the call is something else.

    >>> @model
    ... def line():
    ...     w = latent("w", Normal(0.0, 1.0), shape=(1, 2))
    ...     with plate("row"):
    ...         observe("y", Normal((given("x") @ w.T)[0], 1.0))
    >>> graph = line.graph({"x": [[1.0, 2.0]], "y": [1.0]})
    >>> [node.name for node in graph.nodes if node.op == "call"]
    ['T', 'linear', 'getitem']
    """
    if name not in _PRODUCTS or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return None
    left, right = args if name != "__rmatmul__" else (args[1], args[0])
    weight = _transposed(trace, right)
    if weight is not None and left.ndim in (1, 2):
        return left, weight
    if right.ndim == 1 and left.ndim == 2 and _is_learned(trace, left):
        return right, left
    return None


def _transposed(trace: Trace, x: Tensor) -> Value | None:
    """What ``x`` is the transpose of, where that is a matrix of weights."""
    node = getattr(x, "node", None)
    if node is None or x.ndim != 2 or node.op != "call":
        return None
    axes = tuple(a % 2 for a in node.args[1:] if isinstance(a, int))
    if node.name not in _TRANSPOSED and not (node.name in _SWAPPED and sorted(axes) == [0, 1]):
        return None
    source = trace.nodes[node.args[0].id]
    value = Value.make(prototype(x).mT, source)
    return value if _is_learned(trace, value) else None


def _is_learned(trace: Trace, x: Tensor) -> bool:
    node = getattr(x, "node", None)
    if node is None:
        return False
    source = trace.nodes[node.args[0].id] if node.op == "collect" else node
    return source.op == "variable" and trace.variables[source.name].role in ("latent", "param")


__all__ = ["as_linear"]
