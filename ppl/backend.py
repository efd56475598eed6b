"""What a backend is, how one is found by name, and how its options are read.

A backend is a module with six names: ``Options``, ``supports``, ``prepare``, ``init``, ``step``, ``posterior``.
The language never imports one; it is looked up here on first use.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

import torch

from ppl.binding import Bound
from ppl.errors import ModelError, UnsupportedError, nearest
from ppl.graph import Graph
from ppl.posterior import Posterior
from ppl.streams import Streams

_REGISTRY: dict[str, str] = {
    "exact": "ppl.inference.exact",
    "qem": "ppl.inference.qem",
    "laplace": "ppl.inference.laplace",
    "gbp": "ppl.inference.gbp",
    "amp": "ppl.inference.amp",
    "vi": "ppl.inference.vi",
    "rws": "ppl.inference.rws",
    "ssvi": "ppl.inference.ssvi",
}


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot fit a model: the site, what is wrong there, and the remedy."""

    site: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"'{self.site}': " if self.site else ""
        return f"{place}{self.problem}" + (f" {self.remedy}" if self.remedy else "")


class Info(NamedTuple):
    """What a person wants to see of one step."""

    metrics: Mapping[str, float]  # kept in posterior.trace, a number a step each
    done: bool = False  # the backend knows that it has finished
    # Quantities whose block means must settle before the run counts as converged, and the spread to measure them by.
    watch: torch.Tensor | None = None
    unit: torch.Tensor | None = None
    ready: bool = True  # False while the run is still warming up and must not stop


@dataclass(frozen=True)
class Settings:
    """What ``infer`` passes on to every backend."""

    streams: Streams
    restarts: int = 1
    memory: int | None = None  # bytes
    max_iters: int | None = None
    tol: float | None = None
    minibatch: Mapping[str, int] | None = None  # plate -> elements in a step


class Backend(Protocol):
    """The six names of a backend module.

    ``step`` gets ``batch=None``, or with ``infer(..., minibatch={"user": 1000})`` a :class:`ppl.batches.Batch`:
    ``plate``; ``rows``, which maps the plate and every plate within it to the elements of this
    step (long, ascending); ``scale``, the factor that makes a sum over the batch an unbiased
    estimate of the sum over the plate; ``part`` of ``parts``, which one of the fixed parts of the
    plate this is (all parts are visited once an epoch, in an order that follows from the seed).
    ``bound.narrowed(batch.rows)`` is the data of those elements alone. The parts themselves are
    ``ppl.batches.batches_of(bound, settings.minibatch, settings.streams)``, in ``prepare`` too. A
    backend without mini-batches refuses ``settings.minibatch`` in ``prepare``, in words.

    A module may have more:

    - ``describe(bound, options, settings) -> str``: one line for ``explain``.
    - ``takes_sparse = True``: covariates may be sparse matrices in ``bound.values``.
    - ``looks_inside = True``: its rules look inside functions, and it refuses modules of ``nn.lift``.
    - ``takes_batch_norm = True``: it trains on batches, and keeps the statistics of ``nn.BatchNorm``.
    - ``single_precision(graph, options) -> bool``: whether a model whose data is float32 runs in float32 unless ``dtype=`` is
      given; without it all runs are in float64.
    - ``extend(old_problem, old_state, new_problem, **options) -> state``: the state from which a
      run on more data goes on, for ``posterior.extend(new_data, **options)``. The new problem was
      prepared for the old data followed by the new rows; every element of a plate that the old
      problem has keeps its position, new ones stand behind (``bound.labels``). What was known
      (messages, points, factors that did not change) is copied over, the rest starts as in
      ``init``. Options are the backend's own, such as ``lag={"time": 50}``: how many elements of an
      ordered plate stay open, older ones being summed up in what they say of the rest; an option
      that it does not know it refuses with a TypeError, as any function does.
    """

    Options: type

    def supports(self, graph: Graph) -> list[Reason]: ...
    def prepare(self, bound: Bound, options: Any, settings: Settings) -> Any: ...
    def init(self, problem: Any) -> Any: ...
    def step(self, problem: Any, state: Any, batch: Any) -> tuple[Any, Info]: ...
    def posterior(self, problem: Any, state: Any) -> Posterior: ...


def sparse_reasons(backend: Backend, bound: Bound) -> list[Reason]:
    """Why a backend cannot take the sparse matrices of the data; empty where there are none."""
    if getattr(backend, "takes_sparse", False):
        return []
    return [
        Reason(n, "is a sparse matrix, and this method needs dense ones.",
               f"Use method='amp', which keeps it sparse, or pass {n}.to_dense().")
        for n in bound.sparse
    ]  # fmt: skip


def runs_in_single(backend: Backend, bound: Bound, options: Any) -> bool:
    """Whether the backend keeps to the data's single precision for this model."""
    wants = getattr(backend, "single_precision", None)
    arrays = [c.values for c in bound.columns.values() if isinstance(c.values, torch.Tensor)]
    floats = {a.dtype for a in arrays if a.is_floating_point()}
    return floats == {torch.float32} and wants is not None and wants(bound.graph, options)


def network_reasons(backend: Backend, graph: Graph, known: Container[str] = ()) -> list[Reason]:
    """Why a backend cannot take the lifted modules and batch norms of a graph; ``known`` names the data."""
    reasons: dict[str, Reason] = {}
    if getattr(backend, "looks_inside", False):
        for node in graph.nodes:
            if getattr(node.func, "is_opaque", False):
                reasons[node.name] = Reason(
                    node.name, "is one function that this method would have to look into.",
                    "Use method='qem' for few weights, or 'vi'; or write the module with layers of ppl.nn.",
                )  # fmt: skip
    functions: list[Any] = [n.func for n in graph.nodes if getattr(n.func, "needs_batch", False)]
    norms = dict.fromkeys(f.layer for f in functions)
    unknown = [n for n in norms if f"{n}.mean" not in known or f"{n}.variance" not in known]
    if not unknown or getattr(backend, "takes_batch_norm", False):
        return list(reasons.values())
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    norm = Reason(
        unknown[0], f"{more.lstrip()}{' ' if more else ''}is a batch norm: what it says of one element depends on the others.",
        f"Use nn.FRN, nn.GroupNorm or nn.LayerNorm; or give its statistics as data, '{unknown[0]}.mean' and "
        f"'{unknown[0]}.variance'.",
    )  # fmt: skip
    return [*reasons.values(), norm]


def register(name: str, module: str) -> None:
    """Make a backend known under a name: ``ppl.register("mine", "package.module")``.

    A distribution can do the same with an entry point in the group ``ppl.backends``.
    """
    _REGISTRY[name] = module


def names() -> tuple[str, ...]:
    """Every backend that can be asked for."""
    found = {e.name: e.value for e in entry_points(group="ppl.backends")}
    return tuple(dict.fromkeys((*_REGISTRY, *found)))


def load(name: str) -> Backend:
    """Import a backend.

    Raises:
        UnsupportedError: there is none of that name.
    """
    module = _REGISTRY.get(name)
    if module is None:
        found = {e.name: e.value for e in entry_points(group="ppl.backends")}
        module = found.get(name)
    if module is None:
        raise UnsupportedError(
            f"there is no method {name!r}.{nearest(name, names())} Known: auto, {', '.join(names())}."
        )
    return importlib.import_module(module)  # type: ignore[return-value]


def resolve(method: Any, options: Mapping[str, Any]) -> tuple[str, Backend, Any]:
    """Name, module and options record for ``method="qem", particles=30`` or ``method=QEM(particles=30)``."""
    if isinstance(method, str):
        backend = load(method)
        return method, backend, make_options(method, backend.Options, options)
    for name in names():
        backend = load(name)
        if isinstance(method, backend.Options):
            if options:
                raise ModelError(
                    f"options {sorted(options)} stand beside method={type(method).__name__}(...). Put them inside it."
                )
            return name, backend, method
    raise ModelError(
        f"method: expected a name or an options record of a backend, got {type(method).__name__}. "
        f"Names: auto, {', '.join(names())}."
    )


def refuse_idle(options: Any, **says: tuple[bool, str]) -> None:
    """Refuse an option that was given beside others that leave it without a say.

    Args:
        options: of a backend, a dataclass.
        **says: option -> whether it has a say, and what it is an option of, in words.

    Raises:
        ModelError: it is not at its default.
    """
    default = {f.name: f.default for f in dataclasses.fields(options)}
    for option, (has_say, of) in says.items():
        if not has_say and getattr(options, option) != default[option]:
            raise ModelError(
                f"{type(options).__name__}({option}=...) is an option of {of}. Leave it out, or take that."
            )


def make_options(name: str, kind: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Build an options record; an unknown option is refused with the nearest spelling."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ModelError(
                f"method {name!r} has no option {option!r}.{nearest(option, known)} Options: {', '.join(known)}."
            )
    return kind(**options)
