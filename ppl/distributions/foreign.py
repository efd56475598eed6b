"""Laws from outside: a user's own ``torch.distributions.Distribution``, and torch's transforms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

from ppl.distributions.arguments import is_traced
from ppl.distributions.base import NESTED, STATIC, Distribution, Leaf, outside
from ppl.distributions.library import seeded
from ppl.errors import ModelError

_CONTAINERS = (td.Distribution, td.Transform, Constraint)


def as_distribution(obj: Any) -> Distribution:
    """A law of ours for ``obj``: itself, or a wrapper around a ``torch.distributions`` instance.

    Raises:
        ModelError: ``obj`` is no instance of a distribution; the message says what to write.
    """
    if isinstance(obj, Distribution):
        return obj
    if isinstance(obj, td.Distribution):
        return _ours(obj) or Foreign(obj)
    if isinstance(obj, type):
        raise ModelError(
            f"expected a distribution, got the class {obj.__name__}. Call it: {obj.__name__}(...)."
        )
    if isinstance(obj, Tensor) or isinstance(obj, (int, float)):
        kind = "a tensor" if isinstance(obj, Tensor) else f"the number {obj!r}"
        raise ModelError(
            f"expected a distribution, got {kind}. Write Delta(x), or deterministic(name, x)."
        )
    raise ModelError(
        f"expected a distribution, got {type(obj).__name__} {obj!r}. Write for example "
        "Normal(0.0, 1.0)."
    )


class Foreign(Distribution):
    """A ``torch.distributions`` instance as it is.

    Its leaves are the floating tensors found in it, nested distributions and transforms included.
    Its density is only right for parameters of the shape of one element, so whoever adds axes must
    do so with ``vmap`` (``needs_vmap``).
    """

    needs_vmap = True

    def __init__(self, dist: td.Distribution) -> None:
        self.dist = dist
        self.paths = tuple(path for path, _ in tensors_in(dist))
        self.event_dim = len(dist.event_shape)
        self.is_discrete = bool(getattr(self.support, "is_discrete", False))

    def leaves(self) -> tuple[Leaf, ...]:
        found = dict(tensors_in(self.dist))  # by now torch may have cached more
        return tuple(Leaf(path, found[path], found[path].ndim) for path in self.paths)

    def _replaced(self, values: Iterator[Any]) -> Distribution:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__["dist"] = with_tensors(self.dist, {path: next(values) for path in self.paths})
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        return unchecked(self.dist).log_prob(value)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        batch = self.dist.batch_shape
        repeats = len(tuple(shape)) - len(batch)
        with seeded(generator):
            if repeats >= 0 and tuple(shape[repeats:]) == tuple(batch):
                return unchecked(self.dist).sample(torch.Size(shape[:repeats]))
            return self.dist.expand(torch.Size(shape)).sample()

    def enumerate_support(self) -> Tensor | None:
        if not self.is_discrete or self.event_dim or not self.dist.has_enumerate_support:
            return None
        return self.dist.enumerate_support(expand=False).reshape(-1)

    def to_torch(self) -> td.Distribution:
        return self.dist

    @property
    def support(self) -> Constraint:
        try:
            found = self.dist.support
        except (NotImplementedError, AttributeError):
            found = None
        return constraints.dependent if found is None else found  # type: ignore[return-value]

    @property
    def batch_shape(self) -> torch.Size:
        return self.dist.batch_shape

    @property
    def event_shape(self) -> torch.Size:
        return self.dist.event_shape

    @property
    def mean(self) -> Tensor:
        return self.dist.mean

    @property
    def variance(self) -> Tensor:
        return self.dist.variance

    def __repr__(self) -> str:
        return f"Foreign({type(self.dist).__name__})"


class TransformedDistribution(Distribution):
    """Law of ``transforms[-1](... transforms[0](x))`` for ``x`` of ``base_distribution``;
    transforms are torch's.
    """

    arg_constraints = {"base_distribution": NESTED, "transforms": STATIC}
    base_distribution: Distribution
    transforms: Any

    def _argument(self, name: str, value: Any) -> Any:
        if name != "transforms":
            return super()._argument(name, value)
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
        if not parts or not all(isinstance(part, td.Transform) for part in parts):
            raise ModelError(
                "TransformedDistribution: transforms must be torch.distributions transforms, got "
                f"{value!r}. "
                "Write for example [AffineTransform(0.0, 2.0), ExpTransform()]."
            )
        return td.ComposeTransform(parts)

    def check(self) -> None:
        base, transforms = self.base_distribution, self.transforms
        rest = max(base.event_dim - transforms.domain.event_dim, 0)
        self.event_dim = transforms.codomain.event_dim + rest
        if len(base.batch_shape) < self.extra_dims("base_distribution"):
            raise ModelError(
                f"TransformedDistribution: the transforms take vectors, got {base!r} of shape "
                f"{tuple(base.batch_shape)}. "
                "Give the base parameters of the shape of one draw."
            )

    def extra_dims(self, name: str) -> int:
        return max(self.transforms.domain.event_dim - self.base_distribution.event_dim, 0)

    def leaves(self) -> tuple[Leaf, ...]:
        moved = tensors_in(self.transforms, "transforms")
        dims = self.transforms.domain.event_dim
        return super().leaves() + tuple(Leaf(path, tensor, dims) for path, tensor in moved)

    def _replaced(self, values: Iterator[Any]) -> Distribution:
        new = super()._replaced(values)
        moved = {path: next(values) for path, _ in tensors_in(self.transforms)}
        new.__dict__["transforms"] = with_tensors(self.transforms, moved)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        event_dim, log_density, y = (
            self.event_dim,
            torch.zeros((), dtype=value.dtype, device=value.device),
            value,
        )
        for transform in reversed(self.transforms.parts):
            x = transform.inv(y)
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
            change = transform.log_abs_det_jacobian(x, y)
            log_density = log_density - _sum_last(change, event_dim - transform.domain.event_dim)
            y = x
        base = self.base_distribution.log_prob(y)
        log_density = log_density + _sum_last(base, event_dim - self.base_distribution.event_dim)
        inside = self.transforms.codomain.check(value)
        rest = self.event_dim - self.transforms.codomain.event_dim
        return outside(inside.flatten(-rest).all(-1) if rest else inside, log_density)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        batch = self.base_distribution.batch_shape
        inner = batch[len(batch) - self.extra_dims("base_distribution") :]
        return self.transforms(self.base_distribution.sample((*shape, *inner), generator))

    def to_torch(self) -> td.Distribution:
        return td.TransformedDistribution(
            self.base_distribution.to_torch(), self.transforms, validate_args=False
        )

    @property
    def support(self) -> Constraint:
        codomain = self.transforms.codomain
        rest = self.event_dim - codomain.event_dim
        return constraints.independent(codomain, rest) if rest else codomain

    @property
    def batch_shape(self) -> torch.Size:
        whole = self._whole()
        return whole[: len(whole) - self.event_dim]

    @property
    def event_shape(self) -> torch.Size:
        whole = self._whole()
        return whole[len(whole) - self.event_dim :]

    def _whole(self) -> torch.Size:
        base = self.base_distribution
        return torch.Size(self.transforms.forward_shape(base.batch_shape + base.event_shape))


def tensors_in(obj: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Paths and floating tensors inside a torch distribution or transform, in a fixed order."""
    if _is_leaf(obj):
        return [(path, obj)]
    return [
        found for key, part in _parts(obj).items() for found in tensors_in(part, _join(path, key))
    ]


def with_tensors(obj: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """A copy of ``obj`` with the tensors at the paths of ``values`` replaced.

    Other floating tensors are left out of the copy: torch caches what it derives from parameters.
    """
    if _is_leaf(obj):
        return values[path]
    parts = {
        key: with_tensors(part, values, _join(path, key))
        for key, part in _parts(obj).items()
        if not _is_leaf(part) or _join(path, key) in values
    }
    if isinstance(obj, _CONTAINERS):
        new = object.__new__(type(obj))
        new.__dict__.update(parts)
        if isinstance(obj, td.Distribution):
            new.__dict__["_validate_args"] = False
        if isinstance(obj, td.Transform):
            new.__dict__.setdefault("_inv", None)
            new.__dict__["_cached_x_y"] = None, None
        return new
    if isinstance(obj, (list, tuple)) and not isinstance(obj, torch.Size):
        return type(obj)(parts.values())
    return parts if isinstance(obj, dict) else obj


def _is_leaf(obj: Any) -> bool:
    return isinstance(obj, Tensor) and (is_traced(obj) or obj.is_floating_point())


def _parts(obj: Any) -> dict[Any, Any]:
    if isinstance(obj, _CONTAINERS):
        # A transform remembers its inverse and its last call; only an inverse consists of another
        # transform.
        skipped = {"_cached_x_y"} if isinstance(obj, _InverseTransform) else {"_cached_x_y", "_inv"}
        return {key: part for key, part in vars(obj).items() if key not in skipped}
    if isinstance(obj, (list, tuple)) and not isinstance(obj, torch.Size):
        return dict(enumerate(obj))
    return obj if isinstance(obj, dict) else {}


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def unchecked(dist: td.Distribution) -> td.Distribution:
    """``dist`` without validation, which would look at the numbers of a value."""
    if not dist._validate_args:
        return dist
    new = copy.copy(dist)
    new._validate_args = False
    return new


def _ours(obj: td.Distribution) -> Distribution | None:
    """Our family of the same name, when ``obj`` is torch's own and its parameters tell it all."""
    from ppl.distributions import KNOWN  # the list of all families stands above this module

    family = KNOWN.get(type(obj).__name__)
    if family is None or type(obj).__module__.split(".")[:2] != ["torch", "distributions"]:
        return None
    if any(
        rule is NESTED or rule is STATIC
        for n, rule in family.arg_constraints.items()
        if n != "over"
    ):
        return None
    found = {n: vars(obj)[n] for n in family.arg_constraints if n in vars(obj)}
    if family.exactly_one and sum(n in found for n in family.exactly_one) != 1:
        return None
    needed = [n for n in family.arg_constraints if n not in family.defaults]
    if any(n not in found for n in needed):
        return None
    new = object.__new__(family)
    new.__dict__.update(dict.fromkeys(family.arg_constraints) | found)
    return new


def _sum_last(x: Tensor, count: int) -> Tensor:
    return x.sum(tuple(range(-count, 0))) if count else x
