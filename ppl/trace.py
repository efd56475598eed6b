"""Run a model function once and record its factor graph.

The :class:`Trace` knows which plates are open, makes a node of every torch call on values, and checks each
operand for visibility at the user's own line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from ppl.distributions import Distribution
from ppl.errors import ModelError, PPLError, nearest, trim_traceback, user_line
from ppl.graph import (
    Factor,
    Graph,
    Law,
    Node,
    Plate,
    Ref,
    Role,
    Variable,
    ancestors,
    maximal,
    substitute,
)
from ppl.products import as_linear
from ppl.value import RECORDER, Value, function_name, is_traced, prototype


class Column(Protocol):
    """What tracing needs to know of a data array before any size is bound."""

    def element(self, plates: tuple[str, ...], dtype: torch.dtype) -> Tensor: ...
    def event_shape(self, plates: tuple[str, ...]) -> tuple[int, ...]: ...


_TO_DEVICE = frozenset(("cpu", "cuda"))
_TO_FLOAT = frozenset(("float", "double", "half", "bfloat16"))
_COMPARISONS = frozenset(("equal", "allclose", "is_nonzero"))

TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)


def active(word: str) -> Trace:
    """The trace that is under way, or an error that names the word used outside of one."""
    trace = TRACE.get()
    if trace is None:
        raise ModelError(
            f"'{word}' is a word of a model. Use it inside a function decorated with @model."
        )
    return trace


class Trace:
    """State of one run of a model function; :meth:`graph` is what it leaves behind."""

    def __init__(
        self, columns: Mapping[str, Column], interventions: Iterable[str], dtype: torch.dtype
    ) -> None:
        self.columns = columns
        self.interventions = frozenset(interventions)
        self.dtype = dtype
        self.plates: dict[str, Plate] = {}
        self.open: list[str] = []
        self.nodes: list[Node] = []
        self.variables: dict[str, Variable] = {}
        self.factors: dict[str, Factor] = {}
        self.values: dict[str, Value] = {}
        self.prefix: tuple[str, ...] = ()
        self.roots: list[frozenset[str]] = []  # variables upstream of each node
        self.generator = torch.Generator().manual_seed(0)

    # ---- plates -------------------------------------------------------------------------------------------

    def open_plates(self) -> tuple[str, ...]:
        """Open plates without those implied by another open one, in the order of opening."""
        implied = {a for name in self.open for a in ancestors(self.plates, name)}
        return tuple(dict.fromkeys(p for p in self.open if p not in implied))

    def visible_plates(self, opened: Sequence[str] | None = None) -> frozenset[str]:
        """Open plates, or those that ``opened`` names, and everything they lie within."""
        names = self.open if opened is None else opened
        return frozenset(names).union(*(ancestors(self.plates, p) for p in names), ())

    def open_but(self, plate: str) -> list[str]:
        """Open plates without ``plate`` and whatever lies within it."""
        return [p for p in self.open if p != plate and plate not in ancestors(self.plates, p)]

    def joint_plates(self, groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        """Plates of a result whose operands vary over ``groups``.

        Two plates that meet only because an open plate lies within both of them (a rating of a user and a film)
        give that open plate, never their grid.
        """
        union = {p for group in groups for p in group}
        for name in self.open_plates():
            covered = union.intersection(ancestors(self.plates, name))
            if name not in union and len(maximal(self.plates, frozenset(covered))) > 1:
                union.add(name)
        return maximal(self.plates, frozenset(union))

    def check_visible(self, value: Value, reduced: frozenset[str] = frozenset()) -> None:
        """Raise at the user's line when ``value`` varies over a plate that is not open."""
        hidden = [
            p for p in value.node.plates if p not in self.visible_plates() and p not in reduced
        ]
        if not hidden:
            self._check_unambiguous(value, reduced)
            return
        what, plate = self.name_of(value), hidden[0]
        open_now = ", ".join(self.open) or "none"
        raise ModelError(
            f"{what} varies over plate '{plate}', which is not open here (open: {open_now}). Open it; or nest the "
            f"open plate with within={plate}; or index it: x[i] with i = given('i', index={plate}); or reduce it: "
            f"mean(x, over={plate})."
        )

    def _check_unambiguous(self, value: Value, reduced: frozenset[str]) -> None:
        # In the grid of two plates that lie within one, an element of that one can be reached by either.
        here = self.open_plates()
        for plate in value.node.plates:
            ways = [p for p in here if plate in ancestors(self.plates, p)]
            if plate not in reduced and plate not in here and len(ways) > 1:
                raise ModelError(
                    f"{self.name_of(value)} varies over plate '{plate}', and both '{ways[0]}' and '{ways[1]}' lie within "
                    f"it: it is not clear whose {plate} is meant. Index it: x[i] with i = given('i', index={plate})."
                )

    def name_of(self, value: Value) -> str:
        """How an error names a value: its site, or the torch function that made it."""
        node = value.node
        if node.op == "variable":
            return f"'{node.name}'"
        maker = node.name if node.op in ("call", "item") else f"{node.op} over '{node.name}'"
        return f"the result of {maker} ({node.where})"

    # ---- nodes --------------------------------------------------------------------------------------------

    def add_node(
        self,
        op: Any,
        result: Tensor,
        args: tuple[Any, ...],
        *,
        plates: tuple[str, ...],
        func: Callable[..., Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        name: str = "",
        index_of: str | None = None,
    ) -> Value:
        """Append a node and return its value."""
        node = Node(
            len(self.nodes),
            op,
            func,
            args,
            kwargs or {},
            plates,
            tuple(result.shape),
            user_line(),
            name,
        )
        self.nodes.append(node)
        upstream = frozenset({name}) if op in ("variable", "previous") else frozenset()
        self.roots.append(upstream.union(*(self.roots[i] for i in node.operands())))
        return Value.make(result, node, index_of)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a torch call: run it on the prototypes, then note operands and plates."""
        if func is Tensor.__getitem__:
            return self.index(args[0], args[1])
        operands = _values((args, kwargs))
        for value in operands:
            self.check_visible(value)
        name = function_name(func)
        if kwargs.get("out") is not None:
            raise ModelError(f"'{name}' with out= assigns into a value. Use its return value.")
        if name in _TO_DEVICE:  # the run decides about device and precision
            return args[0]
        if name in _TO_FLOAT:
            func, name, args, kwargs = Tensor.to, "to", (args[0], self.dtype), {}
        product = None if kwargs else as_linear(self, name, args)
        if product is not None:
            func, name, args, operands = linear, "linear", product, _values(product)
        args, kwargs = substitute(args, self.plain), substitute(kwargs, self.plain)
        result = self.evaluate(func, name, args, kwargs, operands)
        plates = self.joint_plates(v.node.plates for v in operands)
        recorded = {
            "args": substitute(args, self.operand),
            "kwargs": substitute(kwargs, self.operand),
        }
        if isinstance(result, Tensor):
            return self.add_node(
                "call",
                result,
                recorded["args"],
                kwargs=recorded["kwargs"],
                plates=plates,
                func=func,
                name=name,
            )
        if isinstance(result, (tuple, list)) and all(isinstance(r, Tensor) for r in result):
            whole = self.add_node(
                "call",
                result[0],
                recorded["args"],
                kwargs=recorded["kwargs"],
                plates=plates,
                func=func,
                name=name,
            )
            parts = [
                self.add_node("item", r, (Ref(whole.node.id), i), plates=plates, name=name)
                for i, r in enumerate(result)
            ]
            return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
        if name in _COMPARISONS:
            raise ModelError(
                f"'{name}' makes one Python truth of a value, which stands for every element and particle at once. "
                "Compare entry by entry, x == y, and use torch.where(condition, a, b)."
            )
        return result

    def plain(self, leaf: Any) -> Any:
        """A constant in the dtype of the run, on the device of the prototypes; values as they are."""
        if isinstance(leaf, torch.dtype):
            return self.dtype if leaf.is_floating_point else leaf
        if not isinstance(leaf, Tensor) or is_traced(leaf):
            return leaf
        return leaf.detach().to("cpu", self.dtype if leaf.is_floating_point() else leaf.dtype)

    def evaluate(self, func: Any, name: str, args: Any, kwargs: Any, operands: list[Value]) -> Any:
        """Run a call on prototypes; a shape error is raised at the user's line."""
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*substitute(args, prototype), **substitute(kwargs, prototype))
            except PPLError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{self.name_of(v)} {list(v.shape)}" for v in operands)
                raise ModelError(
                    f"torch.{name} failed on one element ({shapes}): {error}. Inside a plate, code sees the shape of "
                    "one element; whatever is not a plate is event."
                ) from None

    def operand(self, leaf: Any) -> Any:
        """What a node stores for an operand: a reference for values, the leaf itself otherwise."""
        if isinstance(leaf, Value):
            if leaf.node.id >= len(self.nodes) or self.nodes[leaf.node.id] is not leaf.node:
                raise ModelError(
                    "this value belongs to another model. Values cannot travel between models."
                )
            return Ref(leaf.node.id)
        return leaf

    def index(self, x: Any, index: Any) -> Value:
        """``x[index]``: along a plate when the index was declared for one, on the event otherwise."""
        parts = index if isinstance(index, tuple) else (index,)
        traced = [p for p in parts if is_traced(p)]
        if not traced:
            return self._index_event(x, index)
        if any(p.dtype is torch.bool for p in traced):
            raise ModelError(
                "an index of truth values gives a result whose shape depends on a value. Use torch.where(mask, x, 0.0)."
            )
        if len(parts) > 1 and any(p.ndim for p in traced):
            raise ModelError(
                "an index of several parts, one of them a vector, is not supported. Index one axis at a time: x[i][:, 0]."
            )
        for part in parts:
            if is_traced(part) and part.index_of is not None:
                x = self.gather(x, part)
            elif is_traced(part) or isinstance(part, int):
                x = self._index_event(x, part)
            else:
                raise ModelError(
                    "an index that mixes values with slices is not supported. Index one axis at a time: x[i][..., :2]."
                )
        return x

    def _index_event(self, x: Any, index: Any) -> Value:
        x = x if is_traced(x) else self.constant(x)
        self.check_visible(x)
        operands, at = [x], prototype(index)
        if is_traced(index):
            self.check_visible(index)
            operands.append(index)
            at = at.long()
        if x.ndim == 0:
            raise ModelError(
                f"{self.name_of(x)} is one number per element and cannot be indexed. To pick along a plate, declare the "
                "index for it: given(name, index=plate), or Categorical(..., over=plate)."
            )
        result = self.evaluate(Tensor.__getitem__, "getitem", (prototype(x), at), {}, operands)
        plates = self.joint_plates(v.node.plates for v in operands)
        args = (self.operand(x), self.operand(index) if is_traced(index) else index)
        return self.add_node(
            "call", result, args, plates=plates, func=Tensor.__getitem__, name="getitem"
        )

    def constant(self, x: Any) -> Value:
        """A plain tensor as a node without plates."""
        x = self.plain(x)
        return self.add_node(
            "call", torch.as_tensor(x), (x,), plates=(), func=_identity, name="constant"
        )

    def gather(self, x: Any, index: Value) -> Value:
        """``x[i]`` along the plate that ``i`` indexes."""
        plate = index.index_of
        assert plate is not None
        self.check_visible(index)
        x_plates = x.node.plates if is_traced(x) else ()
        if plate not in x_plates:
            varies = ", ".join(x_plates) or "no plate"
            what = self.name_of(x) if is_traced(x) else "a constant"
            raise ModelError(
                f"{self.name_of(index)} indexes plate '{plate}', but {what} varies over {varies}. Index a value that "
                f"was made with plate '{plate}' open, or declare the index for the right plate."
            )
        self.check_visible(x, frozenset({plate}))
        rest = tuple(p for p in x_plates if p != plate)
        plates = self.joint_plates((rest, index.node.plates))
        args = (self.operand(x), self.operand(index))
        result = prototype(x).expand((*index.shape, *x.shape))
        return self.add_node("gather", result, args, plates=plates, name=plate)

    # ---- sites --------------------------------------------------------------------------------------------

    def full_name(self, name: str) -> str:
        """A site's public name: scopes in front, joined by dots."""
        if not isinstance(name, str) or not name:
            raise ModelError(f"a site needs a name: expected a non-empty string, got {name!r}.")
        return ".".join((*self.prefix, name))

    def claim(self, name: str) -> None:
        """Raise when a name is taken."""
        taken = self.variables.get(name) or self.factors.get(name)
        if taken is not None:
            raise ModelError(
                f"two sites are called '{name}' (the first is at {taken.where}). Rename one, or put one model in a "
                "scope: with scope('left'): ..."
            )

    def add_variable(self, variable: Variable, element: Tensor) -> Value:
        """Register a variable and return its value."""
        self.claim(variable.name)
        value = self.add_node(
            "variable",
            element,
            (),
            plates=maximal(self.plates, variable.plates),
            name=variable.name,
            index_of=variable.index_of,
        )
        self.variables[variable.name] = variable
        self.values[variable.name] = value
        return value

    def law(self, family: Distribution) -> tuple[Law, Distribution]:
        """The law with references for operands, and the same law on prototypes."""
        leaves = family.leaves()
        for leaf in leaves:
            if is_traced(leaf.value):
                self.check_visible(leaf.value)
        concrete = family.replace([_element(leaf.value, self.dtype) for leaf in leaves])
        return Law(
            concrete, tuple(self.operand(self.plain(leaf.value)) for leaf in leaves)
        ), concrete

    def upstream(self, *operands: Any) -> list[str]:
        """Variables that these operands depend on, in the order of the program."""
        roots: set[str] = set()
        for operand in operands:
            if isinstance(operand, Ref):
                roots |= self.roots[operand.id]
        return [name for name in self.variables if name in roots]

    def add_factor(self, factor: Factor) -> None:
        """Register a factor under its public name."""
        if factor.kind != "conditional":
            self.claim(factor.name)
        self.factors[factor.name] = factor

    def graph(self, name: str) -> Graph:
        """What was recorded."""
        return Graph(
            name, dict(self.plates), dict(self.variables), dict(self.factors), tuple(self.nodes)
        )


def run(
    name: str,
    function: Callable[[], Any],
    columns: Mapping[str, Column],
    *,
    interventions: Iterable[str] = (),
    dtype: torch.dtype = torch.float64,
) -> Graph:
    """Trace ``function`` against the data's columns; plate sizes are bound later.

    Raises:
        ModelError: with a traceback that ends at the user's line.
    """
    trace = Trace(columns, interventions, dtype)
    tokens = TRACE.set(trace), RECORDER.set(trace)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            function()
    except PPLError as error:
        raise trim_traceback(error) from None
    finally:
        TRACE.reset(tokens[0])
        RECORDER.reset(tokens[1])
    return trace.graph(name)


def closest(name: str, known: Iterable[str]) -> str:
    """A list of known names for an error, the nearest first."""
    names = list(known)
    return f"{nearest(name, names)} Known: {', '.join(names) or 'none'}."


def role_of(trace: Trace, name: str) -> Role:
    """Observed when the data has the name, latent otherwise."""
    return "observed" if name in trace.columns else "latent"


def _values(tree: Any) -> list[Value]:
    found: list[Value] = []
    substitute(tree, lambda leaf: found.append(leaf) if isinstance(leaf, Value) else None)
    return found


def _element(leaf: Any, dtype: torch.dtype) -> Tensor:
    if is_traced(leaf):
        return prototype(leaf)
    tensor = leaf.detach() if isinstance(leaf, Tensor) else torch.as_tensor(leaf, dtype=dtype)
    return tensor.to("cpu", tensor.dtype if tensor.is_complex() else dtype)


def _identity(x: Any) -> Tensor:
    return torch.as_tensor(x)
