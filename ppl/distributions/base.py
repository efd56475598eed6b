"""The law of a site: a light record of parameters that can be evaluated, drawn from and rebuilt.

A distribution is written for one plate element.  When a factor is lowered, its
:meth:`~Distribution.leaves` are replaced by tensors with extra leading axes of *minimal* shape
(size 1 where a leaf does not vary), so that ``log_prob`` broadcasts only where an operation needs
both sides.  Nothing is expanded first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import (
    as_argument,
    check_argument,
    check_broadcast,
    check_exactly_one,
    check_keywords,
    is_traced,
    shape_of,
    show,
)
from ppl.errors import ModelError
from ppl.shapes import broadcast_shapes

# What stands in `arg_constraints` for arguments that are no numbers.
NESTED = "a distribution"
STATIC = "structure: kept as it is, never a leaf"
REQUIRED = object()


class Leaf(NamedTuple):
    """One numeric parameter, that of a nested distribution included.

    ``event_dim`` counts the trailing dimensions that belong to one draw *of the whole law*.  A leaf
    may have fewer (the number 1.0 as scale under ``Independent``): pad it with size-1 dimensions on
    the left before adding axes.
    """

    path: str  # "loc", "base_distribution.loc", "components.0.scale"
    value: Any  # number, tensor or traced value
    event_dim: int


class Distribution:
    """Base of all laws.  A family lists its arguments in ``arg_constraints``; the constructor
    follows from that.
    """

    arg_constraints: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    exactly_one: ClassVar[tuple[str, ...]] = ()
    arg_event_dims: ClassVar[dict[str, int]] = {}
    has_cdf: ClassVar[bool] = False
    is_improper: ClassVar[bool] = False
    is_markov: ClassVar[bool] = False
    needs_vmap: ClassVar[bool] = False

    event_dim: int = 0
    is_discrete: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.arg_event_dims = {
            name: rule.event_dim
            for name, rule in cls.arg_constraints.items()
            if isinstance(rule, Constraint)
        }
        if "__init__" not in cls.__dict__:
            cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        family, names = type(self).__name__, list(self.arg_constraints)
        check_keywords(family, names, args, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.exactly_one:
            check_exactly_one(
                family, self.exactly_one, [n for n, x in given.items() if x is not None]
            )
        for name in names:
            value = given.get(name, self.defaults.get(name, REQUIRED))
            if value is REQUIRED or (value is None and name not in self.defaults):
                raise ModelError(f"{family} needs {name}. It takes {', '.join(names)}.")
            setattr(self, name, self._argument(name, value))
        check_broadcast(family, self._batch_shapes())
        self.check()

    def check(self) -> None:
        """Raise where arguments that are right one by one do not fit together."""

    # ---- leaves ----------------------------------------------------------------------------------

    def leaves(self) -> tuple[Leaf, ...]:
        """Every numeric parameter in the order of :meth:`replace`; parameters that are None are
        left out.
        """
        found: list[Leaf] = []
        for name, value in self._items():
            extra = self.extra_dims(name)
            parts = (
                {name: value}
                if not isinstance(value, tuple)
                else {f"{name}.{i}": v for i, v in enumerate(value)}
            )
            for path, part in parts.items():
                if isinstance(part, Distribution):
                    found += [
                        Leaf(f"{path}.{x.path}", x.value, x.event_dim + extra)
                        for x in part.leaves()
                    ]
                else:
                    found.append(Leaf(path, part, self.arg_event_dims[name]))
        return tuple(found)

    def replace(self, values: Sequence[Any]) -> Distribution:
        """The same law with other leaf values, in the order of :meth:`leaves`; nothing is checked.

        >>> from ppl.distributions import Normal
        >>> Normal(0.0, 1.0).replace([2.0, 3.0])
        Normal(loc=2.0, scale=3.0)
        """
        return self._replaced(iter(values))

    def _replaced(self, values: Iterator[Any]) -> Distribution:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        for name, value in self._items():
            if isinstance(value, Distribution):
                new.__dict__[name] = value._replaced(values)
            elif isinstance(value, tuple):
                new.__dict__[name] = tuple(part._replaced(values) for part in value)
            else:
                new.__dict__[name] = next(values)
        return new

    def extra_dims(self, name: str) -> int:
        """Batch dimensions of the nested law ``name`` that belong to one draw of this one."""
        return 0

    # ---- densities and draws ---------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in nats, of each element.

        Args:
            value: ``[*batch, *event]``; values outside the support give ``-inf``.

        Returns:
            ``[*batch]``, broadcast with the batch shapes of the parameters.
        """
        raise NotImplementedError(type(self).__name__)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw one value for each element of the full batch ``shape``, to which the parameters are
        broadcast.

        Returns:
            ``[*shape, *event]``; float, or long for categories. Without a generator the global one
            is used.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be drawn from")

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``."""
        raise NotImplementedError(type(self).__name__)

    def log_cdf(self, value: Tensor) -> Tensor:
        """Log-probability of at most ``value``; accurate in the lower tail."""
        return self.cdf(value).log()

    def log_survival(self, value: Tensor) -> Tensor:
        """Log-probability of more than ``value``; accurate in the upper tail."""
        return torch.log1p(-self.cdf(value))

    def icdf(self, p: Tensor) -> Tensor:
        """The value whose :meth:`cdf` is ``p``."""
        raise NotImplementedError(type(self).__name__)

    def isf(self, q: Tensor) -> Tensor:
        """The value that is exceeded with probability ``q``."""
        return self.icdf(1 - q)

    def enumerate_support(self) -> Tensor | None:
        """All values ``[S]`` of a scalar discrete family of known size, else None."""
        return None

    @property
    def support(self) -> Constraint:
        """The values of positive density."""
        return constraints.real

    @property
    def mean(self) -> Tensor:
        """Expectation ``[*batch, *event]``."""
        raise NotImplementedError(f"{type(self).__name__} has no mean in closed form")

    @property
    def variance(self) -> Tensor:
        """Variance of each entry ``[*batch, *event]``."""
        raise NotImplementedError(f"{type(self).__name__} has no variance in closed form")

    # ---- shapes ----------------------------------------------------------------------------------

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the parameters without the event, broadcast."""
        return broadcast_shapes((), *self._batch_shapes().values())

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one joint draw."""
        if self.event_dim == 0:
            return torch.Size()
        name = next(n for n, _ in self._items() if self.arg_event_dims.get(n) == self.event_dim)
        return torch.Size(shape_of(getattr(self, name))[-self.event_dim :])

    def _batch_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self._items():
            if isinstance(value, (Distribution, tuple)):
                parts = value if isinstance(value, tuple) else (value,)
                shape: tuple[int, ...] = broadcast_shapes(*(p.batch_shape for p in parts))
                drop = self.extra_dims(name)
            else:
                shape, drop = shape_of(value), self.arg_event_dims[name]
            shapes[name] = tuple(shape[: max(len(shape) - drop, 0)])
        return shapes

    # ---- wrappers --------------------------------------------------------------------------------

    def masked(self, keep: Any) -> Distribution:
        """The same law where ``keep`` is true, no contribution elsewhere; ``keep`` has the batch
        shape.
        """
        from ppl.distributions.wrappers import Masked  # wrappers are distributions themselves

        return Masked(self, keep)

    def robust(self, kernel: str, k: Any) -> Distribution:
        """A Normal with heavy tails; :class:`~ppl.distributions.robust.Robust` lists kernels."""
        from ppl.distributions.robust import Robust

        return Robust(self, kernel, k)

    def to_torch(self) -> td.Distribution:
        """The law as a ``torch.distributions`` object, where that library has it."""
        family = getattr(td, type(self).__name__, None)
        if family is None:
            raise NotImplementedError(f"torch.distributions has no {type(self).__name__}")
        return family(**self.tensors(), validate_args=False)

    # ---- helpers of the families -----------------------------------------------------------------

    def tensors(
        self, like: Tensor | None = None, generator: Generator | None = None
    ) -> dict[str, Any]:
        """The arguments that are not None, numbers as floating tensors of a common dtype and
        device.
        """
        known = [v for _, v in self._items() if isinstance(v, Tensor)] + (
            [] if like is None else [like]
        )
        dtype = next((v.dtype for v in known if v.is_floating_point()), torch.float64)
        device = known[0].device if known else (generator.device if generator is not None else None)
        return {
            name: value
            if isinstance(value, (Distribution, tuple))
            else _floating(value, dtype, device)
            for name, value in self._items()
        } | {n: getattr(self, n) for n, rule in self.arg_constraints.items() if rule is STATIC}

    def against(self, value: Tensor) -> tuple[Tensor, ...]:
        """``value`` and the own numeric parameters, as floating tensors that may be combined."""
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        own = [v for _, v in self._items() if not isinstance(v, (Distribution, tuple))]
        if value.is_floating_point() and all(
            isinstance(v, Tensor) and v.is_floating_point() for v in own
        ):
            return (value, *own)
        known = [v for v in (*own, value) if isinstance(v, Tensor)]
        dtype = next((v.dtype for v in known if v.is_floating_point()), torch.float64)
        return tuple(_floating(v, dtype, value.device) for v in (value, *own))

    def expanded(self, shape: Sequence[int], generator: Generator | None = None) -> list[Tensor]:
        """The own numeric parameters as views over the full batch ``shape``."""
        tensors = self.tensors(generator=generator)
        return [
            tensors[n].expand((*shape, *tensors[n].shape[tensors[n].ndim - d :]))
            for n, d in self.arg_event_dims.items()
            if n in tensors
        ]

    def full(self, moment: Tensor) -> Tensor:
        """A moment as a view of shape ``batch_shape + event_shape``."""
        return moment.expand((*self.batch_shape, *self.event_shape))

    def _items(self) -> list[tuple[str, Any]]:
        fields = self.__dict__
        return [
            (n, fields[n])
            for n, rule in self.arg_constraints.items()
            if rule is not STATIC and fields.get(n) is not None
        ]

    def _argument(self, name: str, value: Any) -> Any:
        rule, family = self.arg_constraints[name], type(self).__name__
        if rule is STATIC or value is None:
            return value
        if rule is NESTED:
            from ppl.distributions.foreign import (
                as_distribution,
            )  # it wraps what is not a Distribution

            return as_distribution(value)
        value = as_argument(family, name, value)
        check_argument(family, name, value, rule)
        return value

    def __repr__(self) -> str:
        shown = ((n, self.__dict__.get(n)) for n in self.arg_constraints)
        arguments = ", ".join(f"{n}={_show(v)}" for n, v in shown if v is not None)
        return f"{type(self).__name__}({arguments})"


def standard(draw: Any, shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    """``draw`` (``torch.rand`` or ``torch.randn``) with the dtype and device of ``like``."""
    return draw(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)


def open_uniform(shape: Sequence[int], like: Tensor, generator: Generator | None) -> Tensor:
    """Uniform draws of the open interval (0, 1), safe for logarithms and inverse cdfs."""
    tiny = torch.finfo(like.dtype).tiny
    return standard(torch.rand, shape, like, generator).clamp(
        tiny, 1 - torch.finfo(like.dtype).eps / 2
    )


def times(factor: Tensor, log: Tensor) -> Tensor:
    """``factor * log``, zero where ``factor`` is zero even if ``log`` is infinite."""
    return torch.where(factor == 0, 0.0, factor * log)


def outside(inside: Tensor, log_prob: Tensor) -> Tensor:
    """``log_prob`` where ``inside``, ``-inf`` elsewhere."""
    return torch.where(inside, log_prob, -torch.inf)


def _floating(x: Any, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else x.to(dtype)
    return torch.as_tensor(x, dtype=dtype, device=device)


def _show(x: Any) -> str:
    if isinstance(x, tuple):
        return f"[{', '.join(_show(part) for part in x)}]"
    return show(x)


def _signature(cls: type[Distribution]) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(n, kind, default=cls.defaults.get(n, inspect.Parameter.empty))
            for n in cls.arg_constraints
        ]
    )


__all__ = [
    "NESTED",
    "STATIC",
    "Distribution",
    "Leaf",
    "is_traced",
    "open_uniform",
    "outside",
    "standard",
    "times",
]
