"""Laws of the language as scalar rules: which family is which prior, and how their parameters translate.

A table entry says which rule a family is and, for every parameter that the rule can learn in closed form, how the
number in the model (a standard deviation) becomes the rule's (a variance) and back. Families without an entry are
integrated by quadrature, one unknown at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl import distributions as laws
from ppl.densities import is_foreign
from ppl.distributions import Distribution
from ppl.inference.amp import vectors
from ppl.inference.amp.rules import mixtures, piecewise, priors
from ppl.inference.amp.rules.quadrature import Quadrature
from ppl.inference.amp.rules.record import Rule

Leaves = Mapping[str, Tensor]  # path of a parameter -> [R | 1, B | 1, n | 1, *rest]
Scalar = Callable[[Tensor], Tensor]


class Link(NamedTuple):
    """A parameter of a law as one of its rule."""

    name: str  # in the rule
    there: Scalar  # from the law to the rule
    back: Scalar


def _same(x: Tensor) -> Tensor:
    return x


_SAME = {"there": _same, "back": _same}
_LOGIT = {"there": torch.logit, "back": torch.sigmoid}
_SQUARE = {"there": torch.square, "back": torch.sqrt}
_INVERSE = {"there": torch.reciprocal, "back": torch.reciprocal}
_LOG = {"there": torch.log, "back": lambda logits: logits.softmax(-1)}


@dataclass(frozen=True)
class Translation:
    """A family as a rule: ``links`` by path of the law's parameter, ``make`` from the rule's parameters."""

    links: Mapping[str, Link]
    make: Callable[..., Rule]

    def rule(self, leaves: Leaves) -> Rule:
        """The rule with the parameters of the law."""
        values = {link.name: link.there(leaves[path]) for path, link in self.links.items()}
        return self.make(**values)


def translation(family: Distribution, leaves: Mapping[str, Any]) -> Translation | None:
    """How a law is a closed rule, None if it is none; ``leaves`` decide special cases (a Laplace at zero)."""
    if isinstance(family, laws.SpikeSlab):
        return _spike_slab(family, leaves)
    if isinstance(family, (laws.Mixture, laws.MixtureSameFamily)):
        return _mixture(family)
    if isinstance(family, laws.Truncated):
        return _truncated(family)
    if isinstance(family, laws.Laplace):
        return _LAPLACE if not torch.count_nonzero(leaves["loc"]) else None
    if isinstance(family, laws.MultivariateLaplace):
        return _vector_laplace(family.event_shape[-1])
    if isinstance(family, laws.Categorical):
        return _categorical(leaves)
    if isinstance(family, laws.Bernoulli) and "logits" in leaves:
        return _BERNOULLI_LOGITS
    return _SIMPLE.get(type(family))


def is_lasting(family: Distribution) -> bool:
    """Whether :func:`translation` of a law reads the names of its parameters alone, so that it can be kept."""
    inner = family.slab if isinstance(family, laws.SpikeSlab) else family
    return not isinstance(inner, laws.Laplace)


def prior(family: Distribution, leaves: Leaves) -> Rule:
    """The rule of a latent's law with tensors as parameters."""
    found = translation(family, leaves)
    return found.rule(leaves) if found is not None else quadrature(family, leaves)


def quadrature(family: Distribution, leaves: Leaves) -> Rule:
    """A law of one real number without a rule of its own, by its log-density."""
    law = family.replace([leaves[leaf.path].unsqueeze(0) for leaf in family.leaves()])
    low, high = support(family, leaves)
    centre, width = _place(law, low, high)

    def density(x: Tensor) -> Tensor:
        # A pole (a Gamma of shape 1/2 at zero) has no share of its own: a node that hits it is left out.
        return law.log_prob(x).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    return Quadrature(density, low, high, centre, width)


def support(family: Distribution, leaves: Leaves) -> tuple[float | Tensor, float | Tensor]:
    """Lower and upper edge of the values of a law."""
    law = family.replace([leaves[leaf.path] for leaf in family.leaves()])
    constraint = law.support
    low = getattr(constraint, "lower_bound", -math.inf)
    return low, getattr(constraint, "upper_bound", math.inf)


def reason(family: Distribution) -> str | None:
    """Why a latent's law cannot be a prior, None if it can."""
    if type(family) in (laws.Flat, laws.HalfFlat):
        return "is improper, and message passing needs a prior that can be integrated"
    if is_foreign(family):
        return f"{type(family).__name__} is right for one element at a time only"
    if family.is_discrete and not isinstance(family, (laws.Bernoulli, laws.Categorical)):
        return f"{type(family).__name__} is a discrete law that amp has no rule for"
    return None


# ---- the table ---------------------------------------------------------------------------------


def _cauchy(mean: Tensor, variance: Tensor) -> Rule:
    return mixtures.StudentT(torch.ones_like(variance), mean, variance)


def _bernoulli(logit: Tensor) -> Rule:
    return priors.TwoPoint(logit, torch.zeros_like(logit), torch.ones_like(logit))


VARIANCE = Link("variance", **_SQUARE)  # of a parameter that the model writes as a scale
_LOC = Link("mean", **_SAME)
_LAPLACE = Translation({"scale": Link("rate", **_INVERSE)}, piecewise.Laplace)
_SIMPLE: dict[type[Distribution], Translation] = {
    laws.Normal: Translation({"loc": _LOC, "scale": VARIANCE}, priors.Gaussian),
    laws.HalfNormal: Translation({"scale": VARIANCE}, piecewise.HalfNormal),
    laws.Exponential: Translation({"rate": Link("rate", **_SAME)}, piecewise.Exponential),
    laws.Uniform: Translation(
        {"low": Link("low", **_SAME), "high": Link("high", **_SAME)}, piecewise.Uniform
    ),
    laws.StudentT: Translation(
        {"df": Link("df", **_SAME), "loc": _LOC, "scale": VARIANCE}, mixtures.StudentT
    ),
    laws.Cauchy: Translation({"loc": _LOC, "scale": VARIANCE}, _cauchy),
    laws.Bernoulli: Translation({"probs": Link("logit", **_LOGIT)}, _bernoulli),
}
_BERNOULLI_LOGITS = Translation({"logits": Link("logit", **_SAME)}, _bernoulli)


def _spike_slab(family: laws.SpikeSlab, leaves: Mapping[str, Any]) -> Translation | None:
    activity = {"probs": Link("logit", **_LOGIT)}
    inner = translation(
        family.slab, {k.removeprefix("slab."): v for k, v in leaves.items() if k != "probs"}
    )
    if type(family.slab) is laws.Normal and inner is not None:
        named = {f"slab.{path}": link for path, link in inner.links.items()}
        return Translation(activity | named, priors.BernoulliGaussian)
    if inner is None:
        return None
    slab = inner

    def make(logit: Tensor, **values: Tensor) -> Rule:
        return priors.SpikeSlab(logit, slab.make(**values))

    return Translation(activity | {f"slab.{p}": link for p, link in slab.links.items()}, make)


def _vector_laplace(d: int) -> Translation:
    links = {"loc": _LOC, "scale": Link("scale", **_SAME)}
    return Translation(links, functools.partial(vectors.MultivariateLaplace, d=d))


def _mixture(family: Distribution) -> Translation | None:
    """A mixture of Normals in one law (last axis: component) or in a list, points allowed in the list."""
    weights = {"weights": Link("logits", **_LOG)}
    if isinstance(family, laws.MixtureSameFamily):
        inner, prefix = family.component_distribution, "component_distribution."
        paths = [leaf.path for leaf in family.mixture_distribution.leaves()]
        kind = _LOG if paths[0] == "probs" else _SAME
        weights = {f"mixture_distribution.{paths[0]}": Link("logits", **kind)}
    else:
        inner, prefix = family.components, "components."  # type: ignore[attr-defined]
    if type(inner) is laws.Normal:
        links = {
            f"{prefix}loc": Link("means", **_SAME),
            f"{prefix}scale": Link("variances", **_SQUARE),
        }
        return Translation(weights | links, mixtures.GaussianMixture)
    if not isinstance(inner, tuple) or any(type(c) not in (laws.Normal, laws.Delta) for c in inner):
        return None
    return Translation(weights | _parts(inner), _mixture_of(inner))


def _parts(components: Sequence[Distribution]) -> dict[str, Link]:
    links = {}
    for k, c in enumerate(components):
        for leaf in c.leaves():
            spread = leaf.path == "scale"
            kind = _SQUARE if spread else _SAME
            links[f"components.{k}.{leaf.path}"] = Link(f"{'v' if spread else 'm'}{k}", **kind)
    return links


def _mixture_of(components: Sequence[Distribution]) -> Callable[..., Rule]:
    def make(logits: Tensor, **values: Tensor) -> Rule:
        zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
        count = range(len(components))
        means = torch.stack(
            torch.broadcast_tensors(*(values.get(f"m{k}", zero) for k in count)), -1
        )
        spread = torch.stack(
            torch.broadcast_tensors(*(values.get(f"v{k}", zero) for k in count)), -1
        )
        return mixtures.GaussianMixture(logits, means, spread)

    return make


def _truncated(family: laws.Truncated) -> Translation | None:
    if type(family.dist) is not laws.Normal:
        return None
    links = {"dist.loc": _LOC, "dist.scale": VARIANCE}
    for name in ("low", "high"):
        if getattr(family, name) is not None:
            links[name] = Link(name, **_SAME)

    def make(
        mean: Tensor, variance: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> Rule:
        infinite = torch.full_like(mean, math.inf)
        return piecewise.TruncatedGaussian(
            mean, variance, -infinite if low is None else low, infinite if high is None else high
        )

    return Translation(links, make)


def _categorical(leaves: Mapping[str, Any]) -> Translation:
    path = "logits" if "logits" in leaves else "probs"
    kind = _SAME if path == "logits" else _LOG

    def make(logits: Tensor) -> Rule:
        values = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return mixtures.Discrete(logits, values)

    return Translation({path: Link("logits", **kind)}, make)


def _place(
    law: Distribution, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """About where a law has its mass, and how wide: what its moments say, if they are finite."""
    try:
        mean, variance = law.mean[0], law.variance[0]
        if bool(mean.isfinite().all() & variance.isfinite().all()):
            return mean, variance.sqrt()
    except NotImplementedError:
        pass
    start = 0.0 if not math.isfinite(float(torch.as_tensor(low).min())) else low
    return start, 1.0
