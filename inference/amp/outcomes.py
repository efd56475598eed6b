"""The observed sites as channels: what each law says of its linear predictor, element by element.

Which closed rule a law is, is found by evaluating its parameters on a few values of the predictor: ``Normal(z, s)``,
``Bernoulli(logits=z)``, ``Bernoulli(ndtr(z / s))``, ``Poisson(exp(z))``, ``Normal(abs(z), s)`` and so on are known by
what they compute, however they are spelt. Any other law is integrated by quadrature over its log-density.

Source: amp.md 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ppl import distributions as laws
from ppl.binding import Bound
from ppl.densities import is_foreign
from ppl.distributions import Distribution, Leaf
from ppl.errors import UnsupportedError
from ppl.inference.amp.coefficients import Params
from ppl.inference.amp.laws import VARIANCE, Link, translation
from ppl.inference.amp.mixing import LEAD, Frame, fixed, frame
from ppl.inference.amp.recognise import Linear, Output
from ppl.inference.amp.rules import channels, smooth
from ppl.inference.amp.rules.quadrature import Quadrature
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.lower import Compiler, Lowered

_PREDICTOR = "@predictor"
_GRID = (-1.7, -0.9, -0.3, 0.0, 0.4, 1.0, 1.6)


@dataclass(frozen=True)
class Seen(Rule):
    """A channel behind a fixed offset of its predictor, silent where nothing was observed."""

    rule: Rule
    offset: Tensor  # [R | 1, B | 1, m | 1]
    keep: Tensor | None  # bool [1, B, m]

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        return self._answer(self.rule.moments(r + self.offset, vr), r, vr)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        return self._answer(self.rule.mode(r + self.offset, vr), r, vr)

    def log_prob(self, x: Tensor) -> Tensor:
        found = self.rule.log_prob(x + self.offset)
        return found if self.keep is None else torch.where(self.keep, found, 0.0)

    def _answer(self, found: Moments, r: Tensor, vr: Tensor) -> Moments:
        found = found._replace(mean=found.mean - self.offset)
        if self.keep is None:
            return found
        return Moments(
            torch.where(self.keep, found.mean, r),
            torch.where(self.keep, found.variance, vr),
            torch.where(self.keep, found.log_z, 0.0),
        )


@dataclass(frozen=True)
class OverUnits(Rule):
    """The channel of ``z / unit`` for the channel of ``z``."""

    rule: Rule
    unit: float

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        found = self.rule.moments(r * self.unit, vr * self.unit**2)
        return Moments(found.mean / self.unit, found.variance / self.unit**2, found.log_z)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        found = self.rule.mode(r * self.unit, vr * self.unit**2)
        mean, variance = found.mean / self.unit, found.variance / self.unit**2
        return Moments(mean, variance, found.log_z + math.log(self.unit))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.rule.log_prob(x * self.unit)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One observed site."""

    site: str
    frame: Frame
    family: Distribution
    y: Tensor  # [1, *plates, *event]
    keep: Tensor | None  # bool [1, B, m], where something was observed
    lowered: Lowered  # leaves of the law as functions of the predictor
    kind: str = "quadrature"

    @cached_property
    def parts(self) -> tuple[Leaf, ...]:
        """The parameters of the law."""
        return self.family.leaves()

    @cached_property
    def data(self) -> Tensor:
        """The observations ``[1, B, m]``."""
        return self.frame.flat(self.y)

    def arrays(self, z: Tensor, params: Params) -> dict[str, Tensor]:
        """Leaves of the law, ``[L | 1, *plates, *event, *rest]``, at predictors ``[L, B, m]``."""
        inputs = {_PREDICTOR: self.frame.shaped(z), **params}
        values = self.lowered({k: inputs[k] for k in self.lowered.inputs})
        found = {x.path: v for x, v in zip(self.parts, values, strict=True)}
        if "probs" in found:  # the log of a probability that underflows would have no gradient
            found["probs"] = found["probs"].clamp(min=torch.finfo(z.dtype).tiny)
        return found

    def leaves(self, z: float | Tensor, params: Params) -> dict[str, Tensor]:
        """Leaves ``[L | 1, B | 1, m | 1, *rest]`` at one value of the predictor, or at ``[L, 1, 1]``."""
        at = torch.as_tensor(z, dtype=self.y.dtype, device=self.y.device).reshape(-1, 1, 1)
        found = self.arrays(at, params)
        ranks = {leaf.path: leaf.event_dim for leaf in self.parts}
        return {k: self.frame.flat(v, ranks[k]) for k, v in found.items()}

    def log_prob(self, z: Tensor, params: Params) -> Tensor:
        """``log p(y | z)`` ``[*lead, R, B, m]`` for ``z`` of that shape."""
        flat = z.reshape(-1, *z.shape[-2:])
        repeats = flat.shape[0] // z.shape[-3]
        wide = {
            k: p if p.shape[0] == 1 else p.repeat(repeats, *(1,) * (p.ndim - 1))
            for k, p in params.items()
        }
        found = self.arrays(flat, wide)
        law = self.family.replace([found[leaf.path] for leaf in self.parts])
        log = self.frame.flat(law.log_prob(self.y))
        return log.expand(flat.shape).reshape(z.shape)

    def rule(self, params: Params, offset: Tensor | None) -> Rule:
        """The channel of the next sweep."""
        rule = _KINDS[self.kind](self, params)
        if self.keep is None and offset is None:
            return rule
        return Seen(rule, self.y.new_zeros(1, 1, 1) if offset is None else offset, self.keep)


def make_outcome(bound: Bound, linear: Linear, output: Output, params: Params) -> Outcome:
    """Lower the law of an observed site as a function of its predictor.

    Raises:
        UnsupportedError: a family that cannot be evaluated for many elements at once.
    """
    factor = linear.graph.factors[output.site]
    assert factor.law is not None
    if is_foreign(factor.law.family):
        raise UnsupportedError(
            f"amp: '{output.site}': {factor.law} is right for one element at a time only. "
            "Use a law of ppl.distributions, or method='qem'."
        )
    v = linear.graph.variables[output.site]
    own = frame(bound, v, linear.batch)
    mask = bound.masks.get(output.site)
    keep = None if mask is None else own.flat(mask.unsqueeze(0))
    made = Outcome(
        output.site,
        own,
        factor.law.family,
        bound.values[output.site].unsqueeze(0),
        keep,
        _leaves(bound, linear, output),
    )
    return replace(made, kind=_kind(made, params))


def _leaves(bound: Bound, linear: Linear, output: Output) -> Lowered:
    """Leaves of the law with the node of the predictor replaced by a variable."""
    graph, node = linear.graph, linear.graph.nodes[output.node]
    site = graph.variables[output.site]
    cut = replace(node, op="variable", func=None, args=(), kwargs={}, name=_PREDICTOR)
    nodes = (*graph.nodes[: node.id], cut, *graph.nodes[node.id + 1 :])
    variables = {**graph.variables, _PREDICTOR: replace(site, name=_PREDICTOR, role="latent")}
    graph = replace(graph, nodes=nodes, variables=variables)
    axes = {x.name: (LEAD, *x.plates) for x in graph.role("latent", "param")}
    axes |= {x.name: x.plates for x in graph.role("given", "observed")}
    order = (LEAD, *graph.plates)
    c = Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)
    law = graph.factors[output.site].law
    assert law is not None
    outputs = []
    for leaf, argument in zip(law.family.leaves(), law.arguments, strict=True):
        operand = c.operand(argument)
        rank = max(len(site.event_shape) + leaf.event_dim, operand.event_ndim)
        outputs.append(c.align(operand, (LEAD, *site.plates), rank))
    return fixed(c.finish(outputs), bound)


# ---- which rule --------------------------------------------------------------------------------


def _kind(outcome: Outcome, params: Params) -> str:
    """The closed rule that the law computes, found on a grid of predictors; else quadrature."""
    first = {k: p[:1] for k, p in params.items()}
    z = torch.tensor(_GRID, dtype=outcome.y.dtype, device=outcome.y.device).reshape(-1, 1, 1)
    leaves = outcome.leaves(z, first)
    family = outcome.family
    inner = family.dist if isinstance(family, laws.Censored) else family
    prefix = "dist." if inner is not family else ""
    fixed_rest = all(_constant(v) for k, v in leaves.items() if k != f"{prefix}loc")
    if isinstance(family, laws.Bernoulli):
        return _binary(leaves, z)
    if isinstance(family, laws.Poisson):
        exposure = leaves["rate"] * (-z).exp()
        return "poisson" if _constant(exposure) else "quadrature"
    if f"{prefix}loc" not in leaves or not fixed_rest:
        return "quadrature"
    return _real(type(inner), bool(prefix), leaves[f"{prefix}loc"], z)


def _real(family: type[Distribution], censored: bool, loc: Tensor, z: Tensor) -> str:
    if family is laws.Normal and censored:
        return "censored" if _equal(loc, z) else "quadrature"
    if censored:
        return "quadrature"
    if family is laws.Normal:
        for kind, function in (("gaussian", z), ("modulus", z.abs()), ("rectified", z.relu())):
            if _equal(loc, function):
                return kind
    if family in (laws.Laplace, laws.StudentT, laws.Cauchy) and _equal(loc, z):
        return "additive"
    return "quadrature"


def _binary(leaves: Mapping[str, Tensor], z: Tensor) -> str:
    p = leaves["probs"] if "probs" in leaves else torch.sigmoid(leaves["logits"])
    if _equal(p, (z > 0).to(p.dtype)) or _equal(p, (z >= 0).to(p.dtype)):
        return "sign"
    odds, score = torch.logit(p), torch.special.ndtri(p)
    for sign, flipped in ((1.0, ""), (-1.0, " flipped")):
        if _equal(sign * odds, z):
            return f"logistic{flipped}"
        slope = sign * (score[-1:] - score[:1]) / (z[-1] - z[0])
        if _equal(sign * score, slope * z) and bool((slope > 0).all()):
            return f"probit{flipped}"
    return "quadrature"


def _constant(leaf: Tensor) -> bool:
    return leaf.shape[0] == 1 or _equal(leaf, leaf[:1])


def _equal(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 100 * torch.finfo(found.dtype).eps ** 0.75
    return bool(((found - wanted).abs() <= tolerance * (1 + wanted.abs())).all())


# ---- rules -------------------------------------------------------------------------------------


def _by_quadrature(o: Outcome, params: Params) -> Rule:
    return Quadrature(lambda z: o.log_prob(z, params))


def _noise(o: Outcome, params: Params, path: str = "scale") -> Tensor:
    return o.leaves(0.0, params)[path].square()


def _gaussian(o: Outcome, params: Params) -> Rule:
    return channels.GaussianNoise(o.data, _noise(o, params))


def _modulus(o: Outcome, params: Params) -> Rule:
    return channels.Modulus(o.data, _noise(o, params))


def _rectified(o: Outcome, params: Params) -> Rule:
    return channels.ReLU(o.data, _noise(o, params))


def _censored(o: Outcome, params: Params) -> Rule:
    leaves = o.leaves(0.0, params)
    infinite = torch.full_like(leaves["dist.scale"], torch.inf)
    low, high = leaves.get("low", -infinite), leaves.get("high", infinite)
    return channels.Censored(o.data, low, high, leaves["dist.scale"].square())


def _additive(o: Outcome, params: Params) -> Rule:
    noise = translation(o.family, o.leaves(0.0, params))
    assert noise is not None, "the kind says that the noise has a rule"
    return channels.AdditiveNoise(o.data, noise.rule(o.leaves(0.0, params)))


def _sign(o: Outcome, params: Params) -> Rule:
    return channels.Probit(o.data, torch.zeros_like(o.data))


def _probit(o: Outcome, params: Params) -> Rule:
    return channels.Probit(o.data, _slope(o, params).pow(-2))


def _flipped_probit(o: Outcome, params: Params) -> Rule:
    return channels.Probit(1.0 - o.data, (-_slope(o, params)).pow(-2))


def _slope(o: Outcome, params: Params) -> Tensor:
    """Slope of the score of a probit in the predictor, of the sign that it had when it was recognised."""
    at = torch.tensor([-1.0, 1.0], dtype=o.y.dtype, device=o.y.device).reshape(-1, 1, 1)
    below, above = (torch.special.ndtri(o.leaves(z, params)["probs"]) for z in at)
    slope, sign = 0.5 * (above - below), -1.0 if "flipped" in o.kind else 1.0
    return torch.where(sign * slope > 0, slope, torch.nan)


def _logistic(o: Outcome, params: Params) -> Rule:
    return smooth.Logistic(o.data)


def _flipped_logistic(o: Outcome, params: Params) -> Rule:
    return smooth.Logistic(1.0 - o.data)


def _poisson(o: Outcome, params: Params) -> Rule:
    return smooth.Poisson(o.data, o.leaves(0.0, params)["rate"])


_KINDS: dict[str, Callable[[Outcome, Params], Rule]] = {
    "quadrature": _by_quadrature,
    "gaussian": _gaussian,
    "modulus": _modulus,
    "rectified": _rectified,
    "censored": _censored,
    "additive": _additive,
    "sign": _sign,
    "probit": _probit,
    "probit flipped": _flipped_probit,
    "logistic": _logistic,
    "logistic flipped": _flipped_logistic,
    "poisson": _poisson,
}
# Path of the law's parameter -> the rule's, for the kinds whose noise can be learned in closed form.
LINKS: dict[str, dict[str, Link]] = {
    "gaussian": {"scale": VARIANCE},
    "modulus": {"scale": VARIANCE},
    "rectified": {"scale": VARIANCE},
    "censored": {"dist.scale": VARIANCE},
}
