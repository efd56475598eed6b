"""A fitted network as a ``torch.nn.Module``: from the covariates of a batch to the arguments of the observed site's law.

The module holds the weights at their posterior mean, or one draw of them, as parameters under their names in the model
(``fc1.weight``), and fixed covariates such as the statistics of batch norms as buffers. It evaluates the nodes of the
graph itself, so that it makes the numbers that the model makes.
"""

from __future__ import annotations

import operator
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ppl.errors import DataError, ModelError, UnsupportedError, nearest
from ppl.graph import Graph, Node, Variable, refs
from ppl.lower import Compiler
from ppl.nn.structure import find_layers
from ppl.passes import upstream

if TYPE_CHECKING:
    from ppl.posterior import Posterior

Which = Literal["mean", "sample"]
_NODE = Node(-1, "call", None, (), {}, (), (), None, "left out")  # type: ignore[arg-type]


class Network(torch.nn.Module):
    """What :meth:`ppl.Posterior.to_module` returns.

    ``module(x)`` takes each covariate of the data plate, ``[batch, *event]``, in the order of the program or by name. It
    returns the argument of the observed site's law, such as logits ``[batch, classes]``, or a named tuple where the law
    has several.

    Args:
        graph: what the arguments need of the model's graph.
        arguments: of the law, by their names.
        inputs: covariates that every element of the data has of its own.
        arrays: values of all other variables.
        trained: names of ``arrays`` that are parameters; the others are buffers.
        functions: modules in the place of nodes: id -> (module, ids of the nodes it is called with).
    """

    def __init__(
        self,
        graph: Graph,
        arguments: Mapping[str, Any],
        inputs: Sequence[Variable],
        arrays: Mapping[str, Tensor],
        trained: Sequence[str] = (),
        functions: Mapping[int, tuple[torch.nn.Module, tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__()
        self._graph, self._arguments = graph, dict(arguments)
        self._inputs = {v.name: v for v in inputs}
        self._paths = {name: _hold(self, name, x, name in trained) for name, x in arrays.items()}
        self._replaced: dict[int, tuple[str, tuple[int, ...]]] = {}
        for node, (module, ids) in (functions or {}).items():
            self._replaced[node] = (f"@{node}", ids)
            self.add_module(f"product{node}", module)
        self._compiled: dict[Any, Any] = {}

    def forward(self, *covariates: Any, **named: Any) -> Any:
        """Arguments of the law for a batch of covariates."""
        arrays: dict[str, Any] = {n: operator.attrgetter(p)(self) for n, p in self._paths.items()}
        like = next(
            (x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point()), None
        )
        dtype = torch.get_default_dtype() if like is None else like.dtype
        device = torch.device("cpu") if like is None else like.device
        arrays |= self._given(covariates, named, dtype, device)
        arrays |= {name: getattr(self, f"product{i}") for i, (name, _) in self._replaced.items()}
        lowered = self._lowered(dtype, device)
        found = lowered({k: arrays[k] for k in lowered.inputs})
        names = [n.replace(".", "_") for n in self._arguments]
        return found[0] if len(found) == 1 else namedtuple("Arguments", names)(*found)  # type: ignore[misc]

    def _lowered(self, dtype: torch.dtype, device: torch.device) -> Any:
        if (dtype, device) not in self._compiled:
            graph = self._graph
            axes = {v.name: v.plates for v in graph.variables.values()}
            compiler = Compiler(
                graph, axes, tuple(graph.plates), dtype=dtype, device=device, replaced=self._replaced
            )  # fmt: skip
            outputs = [compiler.operand(a) for a in self._arguments.values()]
            self._compiled[dtype, device] = compiler.finish(outputs)
        return self._compiled[dtype, device]

    def _given(
        self,
        covariates: Sequence[Any],
        named: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, Tensor]:
        names = list(self._inputs)
        found = dict(zip(names, covariates, strict=False)) | dict(named)
        if len(covariates) > len(names) or set(found) != set(names):
            raise DataError(
                f"the module takes {', '.join(names) or 'no covariates'}, got {len(covariates)} arrays"
                f"{' and ' + ', '.join(named) if named else ''}. Give each once, in this order or by name."
            )
        return {n: _covariate(self._inputs[n], x, dtype, device) for n, x in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled steps hold closures, and some functions of torch (the pools) are known to pickle by name only.
        nodes = tuple(replace(n, func=_by_name(n)) for n in self._graph.nodes)
        return {**self.__dict__, "_compiled": {}, "_graph": replace(self._graph, nodes=nodes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state["_graph"]
        nodes = tuple(
            replace(n, func=getattr(functional, n.func.name)) if isinstance(n.func, _Named) else n
            for n in graph.nodes
        )
        super().__setstate__({**state, "_graph": replace(graph, nodes=nodes)})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Covariates and what comes out."""
        shapes = (f"{v.name} [batch{''.join(f', {s}' for s in v.event_shape)}]" for v in self._inputs.values())  # fmt: skip
        return f"{', '.join(shapes)} -> {', '.join(self._arguments)}"


def to_module(
    posterior: Posterior,
    which: Which = "mean",
    *,
    seed: int | None = None,
    site: str | None = None,
) -> Network:
    """The network of a posterior as a module of torch.

    Args:
        posterior: of a fit by any method.
        which: all weights at their posterior mean, or at one joint draw.
        seed: of the draw.
        site: the observed site whose law the module makes the arguments of; needed where there are several.

    Raises:
        DataError: no such site.
        UnsupportedError: its law needs something of the data that is not a covariate: unknowns of single elements, an
            index into another plate, a neighbour along an ordered one.

    >>> @model
    ... def line():
    ...     layer = nn.Linear(2, 1, name="fc")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 0.1))
    >>> posterior = infer(line, {"x": [[1.0, 0.0], [1.0, 1.0]], "y": [2.0, 1.0]}, method="exact")
    >>> module = posterior.to_module("mean")
    >>> list(module.state_dict()), module([[1.0, 0.0]])._fields
    (['fc.weight', 'fc.bias'], ('loc', 'scale'))
    """
    if which not in get_args(Which):
        raise ModelError(f"to_module: expected 'mean' or 'sample', got {which!r}.")
    parts = parts_of(posterior, site)
    names = [v.name for v in parts.unknown]
    if which == "sample":
        draws = posterior.latent_draws(1, seed=seed)
        arrays = {n: draws[n][0] for n in names}
    else:
        arrays = {n: mean_of(posterior, n) for n in names}
    arrays |= parts.fixed
    return Network(parts.graph, parts.arguments, parts.inputs, arrays, names)


@dataclass(frozen=True, eq=False)
class Parts:
    """What the law of an observed site needs."""

    graph: Graph  # without data, and without nodes that it does not need
    arguments: Mapping[str, Any]  # leaf of the law -> reference or constant
    inputs: tuple[Variable, ...]  # covariates of the elements
    unknown: tuple[Variable, ...]  # latents and params
    fixed: Mapping[str, Tensor]  # other covariates


def parts_of(posterior: Posterior, site: str | None) -> Parts:
    """Find the network behind an observed site; arguments and errors are those of :func:`to_module`."""
    graph = posterior.graph
    name = _site(graph, site)
    factor = graph.factors[name]
    assert factor.law is not None
    leaves = factor.law.family.leaves()
    arguments = dict(zip((x.path for x in leaves), factor.law.arguments, strict=True))
    read = frozenset().union(*(upstream(graph, i) for i in refs(tuple(arguments.values()))))
    variables = [v for v in graph.variables.values() if v.name in read]
    plates = graph.closure(factor.plates)
    own = [v for v in variables if graph.closure(v.plates) & plates]
    inputs = tuple(v for v in own if v.role in ("given", "observed"))
    _check(graph, name, factor.plates, own, inputs)
    unknown = tuple(v for v in variables if v.role in ("latent", "param"))
    others = [v for v in variables if v not in inputs and v not in unknown]
    return Parts(
        _reduced(graph, arguments, variables),
        arguments,
        inputs,
        unknown,
        {v.name: posterior.bound.dense[v.name] for v in others},
    )


def mean_of(posterior: Posterior, name: str) -> Tensor:
    """Posterior mean of a latent or param, of which there must be one."""
    variable = posterior.graph.variables[name]
    if variable.is_discrete:
        raise UnsupportedError(
            f"to_module: '{name}' is discrete and has no mean. Use to_module('sample')."
        )
    return posterior.mean(name)


def _site(graph: Graph, site: str | None) -> str:
    observed = [
        f.name
        for f in graph.densities
        if f.kind == "conditional" and graph.variables[f.name].role == "observed"
    ]
    if site is not None and site not in observed:
        raise DataError(
            f"to_module: '{site}' is not an observed site.{nearest(site, observed)} Observed: "
            f"{', '.join(observed) or 'none'}."
        )
    weights = {w.variable for layer in find_layers(graph) for w in layer.arrays.values()}
    found = [n for n in observed if weights & set(_read(graph, n))] or observed
    if site is None and len(found) != 1:
        raise DataError(
            f"to_module: the model observes {', '.join(found) or 'nothing'}. Say site= to choose what the module predicts."
        )
    name = found[0] if site is None else site
    if graph.factors[name].chain is not None or graph.factors[name].law is None:
        raise UnsupportedError(f"to_module: '{name}' is a chain; a module sees one element only.")
    return name


def _read(graph: Graph, name: str) -> frozenset[str]:
    law = graph.factors[name].law
    ids = [] if law is None else list(refs(law.arguments))
    return frozenset().union(*(upstream(graph, i) for i in ids))


def _check(
    graph: Graph,
    name: str,
    plates: Sequence[str],
    own: Sequence[Variable],
    inputs: Sequence[Variable],
) -> None:
    """Refuse what a function of one element's covariates cannot do."""
    unknown = [v.name for v in own if v not in inputs]
    if unknown:
        raise UnsupportedError(
            f"to_module: '{unknown[0]}' is unknown for each element of the data, and a module maps covariates to the law of "
            f"'{name}'. Use predict."
        )
    indices = [v.name for v in inputs if v.index_of is not None]
    within = [p for p in plates if graph.ancestors(p)]
    if indices or within:
        what = (
            f"'{indices[0]}' points into another plate"
            if indices
            else f"plate '{within[0]}' lies within another"
        )
        raise UnsupportedError(f"to_module: {what}, which needs the data of the fit. Use predict.")


def _reduced(graph: Graph, arguments: Mapping[str, Any], variables: Sequence[Variable]) -> Graph:
    """The graph without factors, values, and nodes that the arguments do not read."""
    queue, needed = list(refs(tuple(arguments.values()))), set()
    while queue:
        here = queue.pop()
        if here not in needed:
            needed.add(here)
            queue.extend(graph.nodes[here].operands())
    nodes = tuple(n if n.id in needed else replace(_NODE, id=n.id) for n in graph.nodes)
    along = [n for n in nodes if n.op in ("shift", "gather", "pick", "previous")]
    if along:
        raise UnsupportedError(
            f"to_module: {along[0].where}: an element reads another one ({along[0].op} along '{along[0].name}'), and a "
            "module sees one element at a time. Use predict."
        )
    kept = {v.name: replace(v, initial=None, support=None) for v in variables}
    return replace(graph, variables=kept, factors={}, nodes=nodes)


# ---- arrays ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """A function of ``torch.nn.functional`` that stands in a file by its name."""

    name: str


def _by_name(node: Node) -> Any:
    return _Named(node.name) if node.func is getattr(functional, node.name, node) else node.func


def _hold(root: torch.nn.Module, name: str, value: Tensor, trained: bool) -> str:
    """Keep an array under the dotted name of its variable; returns where it stands."""
    value = value.detach().clone()
    *folders, leaf = name.split(".")
    here, path = root, []
    for folder in folders:
        folder = _free(here, folder)
        if folder not in here._modules:
            here.add_module(folder, torch.nn.Module())
        here = here.get_submodule(folder)
        path.append(folder)
    leaf = _free(here, leaf, is_leaf=True)
    if trained and value.is_floating_point():
        here.register_parameter(leaf, torch.nn.Parameter(value))
    else:
        here.register_buffer(leaf, value)
    return ".".join([*path, leaf])


def _free(module: torch.nn.Module, name: str, is_leaf: bool = False) -> str:
    """The name, with underscores behind it where torch's own attributes or another array have it."""
    while hasattr(module, name) and (is_leaf or name not in module._modules):
        name += "_"
    return name


def _covariate(variable: Variable, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.as_tensor(value, device=device)
    x = x if x.dtype == torch.bool else x.to(dtype)
    event = tuple(variable.event_shape)
    if (
        x.ndim != len(variable.plates) + len(event)
        or tuple(x.shape[len(variable.plates) :]) != event
    ):
        raise DataError(
            f"the module's '{variable.name}' is [{', '.join([*variable.plates, *map(str, event)])}], got {list(x.shape)}. "
            "Elements come first, also where there is one."
        )
    return x


__all__ = ["Network", "Parts", "mean_of", "parts_of", "to_module"]
