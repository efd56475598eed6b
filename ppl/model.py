"""Models: functions under ``@model``, which are traced into a factor graph when data is at hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor

from ppl import trace
from ppl.binding import Bound, Missing, bind
from ppl.columns import Columns, read_data
from ppl.errors import DataError, ModelError, nearest
from ppl.graph import Graph
from ppl.simulation import simulate
from ppl.streams import Streams

P = ParamSpec("P")


class Model(Generic[P]):
    """What ``@model`` makes of a function; call it to set its structural parameters.

    Inside another model a call runs the function there, as a part of that model (see :func:`ppl.scope`).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        structure: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        interventions: Mapping[str, Any] | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.structure = dict(structure or {})
        self.conditions = dict(conditions or {})
        self.interventions = dict(interventions or {})

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.structure.items())
        return f"model {self.name}({inside})"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The model with these structural parameters; inside another model, its statements."""
        signature = inspect.signature(self.function)
        try:
            bound = signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise ModelError(
                f"{self.name}{signature}: {error}. A model's parameters are structure; arrays come in by given(name)."
            ) from None
        structure = {**self.structure, **bound.arguments}
        if trace.TRACE.get() is not None:
            return self.function(**structure)
        arrays = [
            k for k, v in structure.items() if hasattr(v, "shape") and getattr(v, "ndim", 0) > 0
        ]
        if arrays:
            raise ModelError(
                f"{self.name}({arrays[0]}=...) is an array. A model's parameters are structure (sizes, flags); pass arrays "
                f"as data and read them with given('{arrays[0]}')."
            )
        return Model(self.function, structure, self.conditions, self.interventions)

    def condition(self, **values: Any) -> Model[P]:
        """The model with these sites observed at these values, as if they stood in the data."""
        return Model(
            self.function, self.structure, {**self.conditions, **values}, self.interventions
        )

    def do(self, **values: Any) -> Model[P]:
        """The model with these sites set from outside: their own laws are cut, what depends on them stays.

        >>> @model
        ... def sprinkler():
        ...     rain = latent("rain", Normal(0.0, 1.0))
        ...     latent("wet", Normal(rain, 1.0))
        >>> sorted(sprinkler.do(rain=2.0).graph().factors)
        ['wet']
        """
        return Model(
            self.function, self.structure, self.conditions, {**self.interventions, **values}
        )

    def graph(
        self,
        data: Any = None,
        *,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> Graph:
        """Trace the model. With data (or sizes) the plates have sizes; without any, only structure is known.

        Raises:
            ModelError: the program is wrong; the traceback ends at the user's line.
            DataError: the data does not fit it.
        """
        columns = self.columns(data)
        graph = self._trace(columns, torch.float64)
        if data is None and sizes is None and labels is None:
            return graph
        return bind(graph, columns, sizes=sizes, labels=labels, need_observed=False).graph

    def bind(
        self,
        data: Any = None,
        *,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
        missing: Missing = "marginalise",
        need_observed: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        before: Mapping[str, Sequence[Any]] | None = None,
    ) -> Bound:
        """The graph together with its data, checked and moved to where the run happens.

        ``before`` holds the labels of an earlier binding that the data extends, see
        :func:`ppl.binding.bind`.
        """
        columns = self.columns(data)
        run_dtype = dtype or torch.float64
        return bind(
            self._trace(columns, run_dtype),
            columns,
            sizes=sizes,
            labels=labels,
            missing=missing,
            need_observed=need_observed,
            dtype=run_dtype,
            device=None if device is None else torch.device(device),
            before=before,
        )

    def sample(
        self,
        n: int = 1,
        data: Any = None,
        *,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, Sequence[Any]] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Draw all sites from the prior (the prior predictive); covariates come from ``data``.

        Returns:
            For each site a tensor ``[n, *plates, *event]``.

        >>> @model
        ... def coin():
        ...     bias = latent("bias", Beta(2.0, 2.0))
        ...     with plate("toss"):
        ...         observe("heads", Bernoulli(bias))
        >>> coin.sample(5, sizes={"toss": 3}, seed=0)["heads"].shape
        torch.Size([5, 3])
        """
        bound = self.bind(data, sizes=sizes, labels=labels, need_observed=False)
        return simulate(bound, n, Streams(seed, bound.device))

    def columns(self, data: Any) -> Columns:
        """The user's data with conditions and interventions added."""
        return read_data(data).with_arrays({**self.conditions, **self.interventions})

    def _trace(self, columns: Columns, dtype: torch.dtype) -> Graph:
        graph = trace.run(
            self.name,
            functools.partial(self.function, **self.structure),
            columns,
            interventions=self.interventions,
            dtype=dtype,
        )
        for word, names in (("condition", self.conditions), ("do", self.interventions)):
            for name in names:
                if name not in graph.variables:
                    raise DataError(
                        f"{word}({name}=...): the model has no site '{name}'.{nearest(name, graph.variables)} "
                        f"Sites: {', '.join(graph.variables)}."
                    )
        return graph


def model(function: Callable[P, Any]) -> Model[P]:
    """Make a model of a function of plates, latents, observations and factors.

    The function's parameters are structure (sizes, flags, modules) and need defaults or a call that sets them;
    arrays come in by name, through :func:`ppl.given`.

    >>> @model
    ... def polynomial(degree: int = 1):
    ...     latent("weights", Normal(0.0, 1.0), shape=degree + 1)
    >>> polynomial(degree=3).graph().variables["weights"].event_shape
    (4,)
    """
    return Model(function)
