"""The statements of a model: latents, observations, covariates, factors, reported quantities, learned constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.distributions import Distribution, Markov, as_distribution
from ppl.errors import DataError, ModelError, user_line
from ppl.graph import Factor, Variable
from ppl.plates import PlateHandle, plate_name, refuse_ragged
from ppl.shapes import broadcast_shapes
from ppl.trace import Trace, active, closest, role_of
from ppl.value import Value, is_traced, prototype


def latent(name: str, dist: Any, *, shape: int | Sequence[int] = ()) -> Value:
    """Declare an unknown quantity: one for every element of the open plates.

    A latent whose name is a key of the data is observed.

    Args:
        name: public name; unique in the model.
        dist: its law given what was declared before; :class:`~ppl.distributions.Markov` makes a chain along the
            innermost ordered plate.
        shape: event shape of one element; broadcast with the shapes of the law's parameters.

    Returns:
        The value of one element.

    Raises:
        ModelError: the name is taken, a parameter is not visible here, or the shapes do not fit.

    >>> @model
    ... def walk():
    ...     spread = latent("spread", HalfNormal(1.0))
    ...     with plate("runner"):
    ...         latent("pace", Normal(5.0, spread), shape=2)
    >>> walk.graph(sizes={"runner": 3}).variables["pace"].event_shape
    (2,)
    """
    trace = active("latent")
    return _declare(
        trace,
        trace.full_name(name),
        as_distribution(dist),
        shape,
        role_of(trace, trace.full_name(name)),
    )


def observe(name: str, dist: Any) -> Value:
    """Declare a quantity that the data must contain under this name.

    Args:
        name: key of the data.
        dist: its law given what was declared before.

    Raises:
        ModelError: as for :func:`latent`.
        DataError: raised by ``infer`` when the data has no such name.
    """
    trace = active("observe")
    return _declare(trace, trace.full_name(name), as_distribution(dist), (), "observed")


def given(
    name: str, *, index: PlateHandle | str | None = None, default: float | Tensor | None = None
) -> Value:
    """A covariate: the array of this name, one element of it for the open plates.

    Args:
        name: key of the data.
        index: the plate that the array points into, by position or label; the value then picks: ``x[i]``.
        default: used when the data has no such name.

    Raises:
        DataError: the data has no such name and there is no default.

    >>> @model
    ... def line():
    ...     slope = latent("slope", Normal(0.0, 1.0))
    ...     with plate("point"):
    ...         observe("y", Normal(slope * given("x"), 1.0))
    >>> line.graph({"x": [1.0, 2.0], "y": [1.1, 1.9]}).plates["point"].size
    2
    """
    trace = active("given")
    full = trace.full_name(name)
    if full in trace.values:
        return _again(trace, full)
    plates = trace.open_plates()
    element = _given_element(trace, full, plates, index, default)
    variable = Variable(
        full,
        "given",
        plates,
        tuple(element.shape),
        index_of=plate_name(trace, index),
        where=user_line(),
        initial=default,
    )
    return trace.add_variable(variable, element)


def factor(name: str, what: Any, *, at: Any = None) -> None:
    """Multiply the joint density by a free factor, once for every element of the open plates.

    Args:
        name: public name.
        what: a log-density (nats; event axes are summed), or a distribution together with ``at``.
        at: where the distribution is evaluated.

    Raises:
        ModelError: neither a log-density alone nor a distribution with ``at``.

    >>> @model
    ... def nearly_equal():
    ...     a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
    ...     factor("tie", Normal(a - b, 0.1), at=0.0)
    >>> nearly_equal.graph().factors["tie"].scope
    ('a', 'b')
    """
    trace = active("factor")
    full = trace.full_name(name)
    trace.claim(full)
    value = what if at is None else at
    if at is None and not isinstance(value, Tensor):
        raise ModelError(
            f"factor '{full}' needs a log-density (a tensor) or a distribution with at=value, got "
            f"{type(what).__name__}. Write factor('{full}', Normal(...), at=x) or factor('{full}', log_density)."
        )
    law = None
    if at is not None:
        law, concrete = trace.law(as_distribution(what))
        value = _whole_event(full, concrete, at, trace.dtype)
    if is_traced(value):
        trace.check_visible(value)
    operand = trace.operand(value)
    scope = trace.upstream(*(law.arguments if law else ()), operand)
    trace.add_factor(
        Factor(
            full,
            "potential",
            trace.open_plates(),
            tuple(scope),
            law=law,
            value=operand,
            where=user_line(),
        )
    )


def deterministic(name: str, value: Any) -> Value:
    """Report a quantity under a name of its own; returns it unchanged.

    Args:
        name: public name in the results.
        value: any expression of the model.
    """
    trace = active("deterministic")
    full = trace.full_name(name)
    trace.claim(full)
    if not is_traced(value):
        value = trace.constant(value)
    trace.check_visible(value)
    operand = trace.operand(value)
    scope = tuple(trace.upstream(operand))
    trace.add_factor(
        Factor(full, "deterministic", value.node.plates, scope, value=operand, where=user_line())
    )
    return value


def param(name: str, init: float | Tensor, *, support: Any = constraints.real) -> Value:
    """A constant to be learned (empirical Bayes), one for every element of the open plates.

    Args:
        name: public name.
        init: start value of one element.
        support: a ``torch.distributions.constraints`` object.
    """
    trace = active("param")
    element = torch.as_tensor(init, dtype=trace.dtype)
    if not bool(torch.all(support.check(element))):
        raise ModelError(
            f"param '{name}' starts at {init}, outside its support {support}. Choose a start inside it."
        )
    variable = Variable(
        trace.full_name(name),
        "param",
        trace.open_plates(),
        tuple(element.shape),
        support=support,
        initial=init,
        where=user_line(),
    )
    return trace.add_variable(variable, element)


@contextmanager
def scope(prefix: str) -> Iterator[None]:
    """Put ``prefix.`` in front of every site and data name declared inside; plates are shared.

    >>> @model
    ... def twice():
    ...     for side in ("left", "right"):
    ...         with scope(side):
    ...             latent("x", Normal(0.0, 1.0))
    >>> list(twice.graph().variables)
    ['left.x', 'right.x']
    """
    trace = active("scope")
    outer = trace.prefix
    trace.prefix = (*outer, prefix)
    try:
        yield
    finally:
        trace.prefix = outer


def _declare(
    trace: Trace, name: str, dist: Distribution, shape: int | Sequence[int], role: Any
) -> Value:
    trace.claim(name)
    if name in trace.interventions:
        return _intervened(trace, name, dist)
    if isinstance(dist, Markov):
        return _declare_chain(trace, name, dist, shape, role)
    law, concrete = trace.law(dist)
    plates = trace.open_plates()
    event = _event_shape(name, concrete, shape)
    variable = _variable(name, role, plates, event, dist, concrete)
    scope_names = trace.upstream(*law.arguments)
    value = trace.add_variable(variable, _draw(trace, variable, concrete))
    names = (name, *scope_names)
    trace.add_factor(
        Factor(
            name,
            "conditional",
            plates,
            names,
            law=law,
            value=trace.operand(value),
            where=variable.where,
        )
    )
    return value


def _declare_chain(
    trace: Trace, name: str, dist: Markov, shape: int | Sequence[int], role: Any
) -> Value:
    plates = trace.open_plates()
    ordered = [p for p in plates if trace.plates[p].ordered]
    if not ordered:
        raise ModelError(
            f"'{name}' is Markov, but no ordered plate is open (open: {', '.join(plates) or 'none'}). "
            "Declare the time axis with plate(name, ordered=True) and open it."
        )
    along = ordered[-1]
    refuse_ragged(trace, along, f"the chain '{name}'")
    first = _at_first(trace, as_distribution(dist.init), along)
    inside, trace.open = trace.open, [p for p in trace.open if p != along]
    try:  # the first element stands outside the plate
        initial, concrete = trace.law(first)
    finally:
        trace.open = inside
    event = _event_shape(name, concrete, shape)
    variable = _variable(name, role, plates, event, first, concrete)
    element = _draw(trace, variable, concrete)
    previous = trace.add_node(
        "previous", element, (), plates=plates, name=name, index_of=variable.index_of
    )
    transition, _ = trace.law(as_distribution(dist.step(previous)))
    parents = trace.upstream(*initial.arguments, *transition.arguments)
    value = trace.add_variable(variable, element)
    trace.add_factor(
        Factor(
            name,
            "conditional",
            plates,
            (name, *(p for p in parents if p != name)),
            law=initial,
            value=trace.operand(value),
            chain=(along, transition),
            where=variable.where,
        )
    )
    return value


def _at_first(trace: Trace, law: Distribution, plate: str) -> Distribution:
    """The law with what varies over an ordered plate taken at its first element."""

    def at_first(value: Any) -> Any:
        if not is_traced(value) or plate not in value.node.plates:
            return value
        trace.check_visible(value)
        plates = tuple(p for p in value.node.plates if p != plate)
        args = (trace.operand(value), 0)
        return trace.add_node("pick", prototype(value), args, plates=plates, name=plate)

    return law.replace([at_first(leaf.value) for leaf in law.leaves()])


def _intervened(trace: Trace, name: str, dist: Distribution) -> Value:
    plates, index_of = trace.open_plates(), _index_of(dist)
    if index_of is not None:
        element = torch.zeros(trace.columns[name].event_shape(plates), dtype=torch.long)
    else:
        element = trace.columns[name].element(plates, trace.dtype)
    variable = Variable(
        name, "given", plates, tuple(element.shape), index_of=index_of, where=user_line()
    )
    return trace.add_variable(variable, element)


def _index_of(dist: Distribution) -> str | None:
    over = getattr(dist, "over", None)
    return over.name if isinstance(over, PlateHandle) else over


def _variable(
    name: str,
    role: Any,
    plates: tuple[str, ...],
    event: tuple[int, ...],
    dist: Distribution,
    concrete: Distribution,
) -> Variable:
    values = dist.enumerate_support() if concrete.is_discrete and concrete.event_dim == 0 else None
    return Variable(
        name,
        role,
        plates,
        event,
        support=_support(dist, concrete),
        is_discrete=concrete.is_discrete,
        cardinality=None if values is None else len(values),
        index_of=_index_of(dist),
        where=user_line(),
    )


def _support(dist: Distribution, concrete: Distribution) -> Any:
    # Bounds that are themselves unknown or vary by element (Uniform(0, x)) cannot be stated as one constraint.
    support = concrete.support
    bounds = [v for v in vars(support).values() if isinstance(v, Tensor)]
    if bounds and any(is_traced(leaf.value) for leaf in dist.leaves()):
        return constraints.dependent
    return support


def _event_shape(name: str, concrete: Distribution, shape: int | Sequence[int]) -> tuple[int, ...]:
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    batch, event = tuple(concrete.batch_shape), tuple(concrete.event_shape)
    try:
        joint = broadcast_shapes(wanted, batch)
    except RuntimeError:
        raise ModelError(
            f"'{name}': shape={wanted} does not fit the parameters of {type(concrete).__name__}, whose elements have "
            f"shape {batch}. shape= is the shape of one element and is broadcast with the parameters."
        ) from None
    return (*joint, *event)


def _whole_event(name: str, concrete: Distribution, at: Any, dtype: torch.dtype) -> Any:
    """``at`` with the shape of one element of the law: a number stands for every entry of a vector."""
    value = at if isinstance(at, Tensor) else torch.as_tensor(at, dtype=dtype)
    law = (*concrete.batch_shape, *concrete.event_shape)
    try:
        shape = broadcast_shapes(tuple(value.shape), law)
    except RuntimeError:
        raise ModelError(
            f"factor '{name}': at= has elements of shape {tuple(value.shape)}, the law {type(concrete).__name__} of shape "
            f"{law}. Give at= the shape of one element, or a single number."
        ) from None
    return at if tuple(value.shape) == tuple(shape) else value.expand(shape)


def _draw(trace: Trace, variable: Variable, concrete: Distribution) -> Tensor:
    if variable.name in trace.columns and variable.role == "observed":
        element = trace.columns[variable.name].element(variable.plates, trace.dtype)
        if tuple(element.shape) == variable.event_shape and not element.isnan().any():
            return element
    batch = variable.event_shape[: len(variable.event_shape) - concrete.event_dim]
    draw = concrete.sample(batch, generator=trace.generator)
    return draw.to(trace.dtype)


def _given_element(
    trace: Trace, name: str, plates: tuple[str, ...], index: PlateHandle | str | None, default: Any
) -> Tensor:
    column = trace.columns.get(name)
    if index is not None:
        if column is None and trace.columns:
            raise _missing(trace, name)
        return torch.zeros(column.event_shape(plates) if column else (), dtype=torch.long)
    if column is not None:
        return column.element(plates, trace.dtype)
    if default is not None:
        return torch.as_tensor(default, dtype=trace.dtype)
    if not trace.columns:  # drawing a graph without any data: one number per element
        return torch.ones((), dtype=trace.dtype)
    raise _missing(trace, name)


def _missing(trace: Trace, name: str) -> DataError:
    return DataError(
        f"{user_line()}: the model asks for given('{name}'), which is not in the data."
        f"{closest(name, trace.columns)} Add the array, or write given('{name}', default=...)."
    )


def _again(trace: Trace, name: str) -> Value:
    variable = trace.variables[name]
    if variable.plates != trace.open_plates():
        raise ModelError(
            f"given('{name}') was first read at {variable.where} with plates {variable.plates}, now with "
            f"{trace.open_plates()}. Keep the first value in a Python variable and use that."
        )
    return trace.values[name]


__all__ = ["deterministic", "factor", "given", "latent", "observe", "param", "scope"]
