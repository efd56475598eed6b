"""Errors predicted by state evolution, before any data exist and for a finished run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl.errors import DataError, ModelError, UnsupportedError
from ppl.inference.amp import rules
from ppl.inference.amp.averages import Outcomes
from ppl.inference.amp.coefficients import Params
from ppl.inference.amp.rules.record import Rule
from ppl.inference.amp.seats import Model
from ppl.inference.amp.spectrum import Spectrum
from ppl.inference.amp.state_evolution import Prediction, Setting, state_evolution_curve
from ppl.streams import Streams, isolated

if TYPE_CHECKING:
    from ppl.inference.amp.problem import Problem

_BINARY = (rules.Probit, rules.Logistic)
_COUNTS = 400  # largest count whose probability is looked at


class Forecast(NamedTuple):
    """What state evolution says of a model at given sizes.

    >>> print(Forecast(0.02, -10.0, 12, True, torch.tensor([0.1, 0.02])))
    mean squared error 0.02 (-10.0 dB) after 12 sweeps
    """

    mse: float  # of each coefficient, at the fixed point
    nmse_db: float  # relative to the coefficients' mean square
    sweeps: int
    converged: bool
    curve: Tensor  # [sweeps]

    def __str__(self) -> str:
        settled = "" if self.converged else ", not settled yet"
        return f"mean squared error {self.mse:.3g} ({self.nmse_db:.1f} dB) after {self.sweeps} sweeps{settled}"


def state_evolution(
    model: Any,
    sizes: Mapping[str, int],
    *,
    params: Mapping[str, float] | None = None,
    row_norm: float | None = None,
    kind: Literal["sum", "max"] = "sum",
    iterations: int = 100,
) -> Forecast:
    """Predict the error of ``method="amp"`` for a model, before any data exist.

    The map is taken to be a dense matrix of independent entries; of the data only sizes count. "Would 20 % more
    rows help?" is a second call with another size.

    Args:
        model: what ``@model`` made: one mixed latent, one observed site.
        sizes: of every plate, as in ``infer(sizes=)``.
        params: values of params; where the model gives them by default.
        row_norm: root of the mean squared norm of the rows of the matrix: 1 a column if None, so that ``x`` enters the
            predictor with its own scale times the root of n / m.
        kind: posterior mean or mode.
        iterations: most sweeps.

    Raises:
        UnsupportedError: gates, several latents, laws that vary by element, an outcome that cannot be enumerated.

    >>> from ppl import model, plate, latent, observe, given, dot
    >>> from ppl.distributions import Normal, SpikeSlab
    >>> @model
    ... def sensing():
    ...     row, coef = plate("row"), plate("coef")
    ...     with coef:
    ...         x = latent("x", SpikeSlab(0.1, slab=Normal(0.0, 1.0)))
    ...     with row:
    ...         with coef:
    ...             a = given("a")
    ...         observe("y", Normal(dot(a, x, over=coef), 0.01))
    >>> few = state_evolution(sensing, {"row": 300, "coef": 1000})
    >>> more = state_evolution(sensing, {"row": 360, "coef": 1000})
    >>> more.mse < few.mse
    True
    """
    from ppl.inference.amp.problem import make_model
    from ppl.inference.amp.recognise import supports

    if iterations < 1:
        raise ModelError(f"state_evolution(iterations={iterations!r}): expected at least 1.")
    bound = _stand_in(model, sizes)
    reasons = supports(bound.graph)
    if reasons:
        lines = "\n    ".join(str(r) for r in reasons)
        raise UnsupportedError(f"amp cannot fit this model:\n    {lines}")
    parts = make_model(bound, 1, None)
    values = dict(parts.start)
    for name, value in (params or {}).items():
        if name not in values:
            raise DataError(
                f"state_evolution: the model has no param '{name}'. Params: {', '.join(values) or 'none'}."
            )
        values[name] = torch.full_like(values[name], float(value))
    m, n = parts.outcomes[0].frame.count, parts.blocks[0].frame.count
    gain = n / m if row_norm is None else row_norm**2
    setting = _setting(parts, values, m / n, gain, None, kind, iterations)
    return _forecast(setting, state_evolution_curve(setting))


def predicted(problem: Problem, params: Params, vamp: bool) -> float | None:
    """Mean squared error at the fixed point for a run's own matrix and params; None where there is no prediction."""
    operator = problem.operator
    m, n = operator.shape
    spectrum = operator.spectrum if vamp else None
    gain = operator.squared_frobenius / m
    try:
        with torch.no_grad():
            setting = _setting(
                problem.model, params, m / n, gain, spectrum, problem.options.kind, 200
            )
            return state_evolution_curve(setting).fixed_point
    except (UnsupportedError, DataError):
        return None


def _forecast(setting: Setting, found: Prediction) -> Forecast:
    mean, variance = setting.prior.prior_moments()
    power = float((mean.square() + variance).mean())
    db = float(10 * torch.log10(torch.tensor(found.fixed_point / power, dtype=torch.float64)))
    return Forecast(found.fixed_point, db, len(found.mse), found.converged, found.mse)


def _setting(
    model: Model,
    params: Params,
    ratio: float,
    gain: float,
    spectrum: Spectrum | None,
    kind: Literal["sum", "max"],
    iterations: int,
) -> Setting:
    if len(model.blocks) != 1 or len(model.outcomes) != 1 or model.structure is not None:
        raise UnsupportedError(
            "state evolution needs one latent without gates and one observed site. Simulate instead: model.sample."
        )
    prior = _scalar(model.blocks[0].base(params))
    rule = model.outcomes[0].rule(params, None)
    rule = getattr(rule, "rule", rule)
    channel, outcomes = _channel(rule, model.outcomes[0].data)
    return Setting(
        prior,
        channel,
        ratio,
        gain=gain,
        outcomes=outcomes,
        assumed_prior=prior if kind == "max" else None,
        kind=kind,
        spectrum=spectrum,
        iterations=iterations,
    )


def _scalar(rule: Rule) -> Rule:
    """The rule with one element, if all are alike."""
    fields: dict[str, Rule | Tensor] = {}
    for name, value in vars(rule).items():
        if isinstance(value, Rule):
            fields[name] = _scalar(value)
        elif isinstance(value, Tensor):
            if math.prod(value.shape[:3]) != 1:
                raise UnsupportedError("state evolution needs elements of one law.")
            fields[name] = value.reshape(value.shape[3:]) if value.ndim >= 3 else value
        else:
            raise UnsupportedError("state evolution needs a prior in closed form.")
    return replace(rule, **fields)  # type: ignore[type-var]


def _channel(rule: Rule, data: Tensor) -> tuple[float | Callable[[Tensor], Rule], Outcomes | None]:
    """Noise variance, or the rule for given outcomes and all outcomes there are."""
    if isinstance(rule, rules.GaussianNoise):
        if rule.variance.numel() != 1:
            raise UnsupportedError("state evolution needs one noise for all rows.")
        return float(rule.variance), None
    if isinstance(rule, _BINARY):
        values = torch.tensor([0.0, 1.0], dtype=data.dtype, device=data.device)
    elif isinstance(rule, rules.Poisson):
        values = torch.arange(_COUNTS, dtype=data.dtype, device=data.device)
    else:
        raise UnsupportedError(
            f"state evolution: the outcomes of {type(rule).__name__} cannot be listed. "
            "Use rules and averages of ppl.inference.amp directly."
        )
    fields = {k: _flat(v) for k, v in vars(rule).items() if k != "y"}

    def at(y: Tensor) -> Rule:
        return replace(rule, y=y, **fields)  # type: ignore[type-var]

    return at, Outcomes(values, torch.ones_like(values))


def _flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.unique().numel() > 1:
            raise UnsupportedError("state evolution needs one channel for all rows.")
        return value.flatten()[0]
    return value


def _stand_in(model: Any, sizes: Mapping[str, int]) -> Any:
    """The model bound to zeros in the place of data: a map of zeros, outcomes that are never read."""
    graph = model.graph()
    arrays = {}
    for v in graph.role("given", "observed"):
        if any(p not in sizes for p in v.plates):
            missing = [p for p in v.plates if p not in sizes]
            raise DataError(
                f"state_evolution: no size for plate '{missing[0]}'. Give sizes={{'{missing[0]}': ...}}."
            )
        if v.index_of is None:
            shape = [sizes[p] for p in v.plates]
            arrays[v.name] = torch.zeros(*shape, *v.event_shape, dtype=torch.float64)
    with isolated(Streams(0).seed):
        return model.bind(arrays, sizes=dict(sizes), need_observed=False)
