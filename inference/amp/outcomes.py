"""The observed sites as channels: what each law says of its linear predictor, element by element.

Which closed rule a law is, is found by evaluating its parameters on a few values of the predictor, so that it is
known by what it computes, however it is spelt::

    Normal(z, sd)   Laplace(z, b)   StudentT(df, z, s)   Cauchy(z, s)      additive noise
    Normal(z.relu(), sd)   Normal(z.abs(), sd)                             rectified; modulus (signs lost)
    Censored(Normal(z, sd), low, high)                                     censored
    Bernoulli(ndtr(z / sd))   Bernoulli(logits=z)   Poisson(exp(z))        probit, logistic, counts
    Bernoulli((z > 0).to(z.dtype))   Delta(z.sign())                          sign: one-bit data without noise
    Delta(z.relu())   Delta(z.abs())                                       the same without noise
    Categorical([ndtr((c1 - z) / sd), ndtr((c2 - z) / sd) - ndtr((c1 - z) / sd), ...])
                                                                           ordinal, quantised, interval-censored:
                                                                           cut points fixed, by row, or params

An interval-censored row is one of three categories: below, within or above its interval. Any other law is integrated
by quadrature over its log-density. ``posterior.diagnostics.notes["rules"]`` names the rule of every site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppl import distributions as laws
from ppl.binding import Bound
from ppl.densities import is_foreign
from ppl.distributions import Distribution, Leaf
from ppl.errors import UnsupportedError
from ppl.graph import refs
from ppl.inference.amp import rules
from ppl.inference.amp.coefficients import Params
from ppl.inference.amp.cutpoints import Cuts, Scores, found_cuts, moved_cuts, scores
from ppl.inference.amp.laws import VARIANCE, Link, translation
from ppl.inference.amp.mixing import LEAD, Frame, fixed, frame
from ppl.inference.amp.recognise import Linear, Output
from ppl.inference.amp.rules.quadrature import Quadrature
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.lower import Compiler, Lowered
from ppl.passes import upstream

_PREDICTOR = "@predictor"
_LOW_NOISE = 1e-10  # smallest noise variance, in units of the mean square of the data
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
    constants: Lowered  # those leaves that the predictor does not reach
    constant_paths: tuple[str, ...]
    kind: str = "quadrature"
    cuts: Cuts | None = None  # of categories, at the first params

    @cached_property
    def parts(self) -> tuple[Leaf, ...]:
        """The parameters of the law."""
        return self.family.leaves()

    @cached_property
    def data(self) -> Tensor:
        """The observations ``[1, B, m]``."""
        return self.frame.flat(self.y)

    @cached_property
    def least_scale(self) -> Tensor:
        """Smallest standard deviation that is learned for the noise."""
        return (_LOW_NOISE * self.data.square().mean()).sqrt()

    @property
    def reads_params(self) -> bool:
        """Whether the law has params."""
        return any(k != _PREDICTOR for k in self.lowered.inputs)

    def arrays(self, z: Tensor, params: Params) -> dict[str, Tensor]:
        """Leaves of the law, ``[L | 1, *plates, *event, *rest]``, at predictors ``[L, B, m]``."""
        alike = z.shape[1:] == (1, 1)  # for all elements: the law is evaluated once
        rank = len(self.frame.plates) + len(self.frame.event)
        shaped = z.reshape(-1, *(1,) * rank) if alike else self.frame.shaped(z)
        inputs = {_PREDICTOR: shaped, **params}
        values = self.lowered({k: inputs[k] for k in self.lowered.inputs})
        found = {x.path: v for x, v in zip(self.parts, values, strict=True)}
        if "probs" in found:  # the log of a probability that underflows would have no gradient
            found["probs"] = found["probs"].clamp(min=torch.finfo(z.dtype).tiny)
        return found

    def leaves(self, z: float | Tensor, params: Params) -> dict[str, Tensor]:
        """Leaves ``[L | 1, B | 1, m | 1, *rest]`` at a predictor: one value, or ``[L, B | 1, m | 1]``."""
        at = torch.as_tensor(z, dtype=self.y.dtype, device=self.y.device)
        found = self.arrays(at if at.ndim == 3 else at.reshape(-1, 1, 1), params)
        ranks = {leaf.path: leaf.event_dim for leaf in self.parts}
        return {k: self.frame.flat(v, ranks[k]) for k, v in found.items()}

    def fixed_leaves(self, params: Params) -> dict[str, Tensor]:
        """The leaves ``[R | 1, B | 1, m | 1, *rest]`` that do not depend on the predictor."""
        values = self.constants({k: params[k] for k in self.constants.inputs})
        ranks = {leaf.path: leaf.event_dim for leaf in self.parts}
        pairs = zip(self.constant_paths, values, strict=True)
        return {k: self.frame.flat(v, ranks[k]) for k, v in pairs}

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
        rule = _KINDS[self.kind](self, params) if self.reads_params else self._settled
        if self.keep is None and offset is None:
            return rule
        return Seen(rule, self.y.new_zeros(1, 1, 1) if offset is None else offset, self.keep)

    @cached_property
    def _settled(self) -> Rule:
        """The channel of a law without params."""
        return _KINDS[self.kind](self, {})


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
        *_leaves(bound, linear, output),
    )
    kind, cuts = _kind(made, params)
    return replace(made, kind=kind, cuts=cuts)


def _leaves(
    bound: Bound, linear: Linear, output: Output
) -> tuple[Lowered, Lowered, tuple[str, ...]]:
    """Leaves of the law with the node of the predictor replaced by a variable; those without it once more."""
    graph, node = linear.graph, linear.graph.nodes[output.node]
    site = graph.variables[output.site]
    cut = replace(node, op="variable", func=None, args=(), kwargs={}, name=_PREDICTOR)
    nodes = (*graph.nodes[: node.id], cut, *graph.nodes[node.id + 1 :])
    variables = {**graph.variables, _PREDICTOR: replace(site, name=_PREDICTOR, role="latent")}
    graph = replace(graph, nodes=nodes, variables=variables)
    axes = {x.name: (LEAD, *x.plates) for x in graph.role("latent", "param")}
    axes |= {x.name: x.plates for x in graph.role("given", "observed")}
    order = (LEAD, *graph.plates)
    law = graph.factors[output.site].law
    assert law is not None

    def lowered(chosen: list[tuple[Leaf, Any]]) -> Lowered:
        c = Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)
        outputs = []
        for leaf, argument in chosen:
            operand = c.operand(argument)
            rank = max(len(site.event_shape) + leaf.event_dim, operand.event_ndim)
            outputs.append(c.align(operand, (LEAD, *site.plates), rank))
        return fixed(c.finish(outputs), bound)

    every = list(zip(law.family.leaves(), law.arguments, strict=True))
    apart = [(x, a) for x, a in every if not any(_PREDICTOR in upstream(graph, i) for i in refs(a))]
    return lowered(every), lowered(apart), tuple(x.path for x, _ in apart)


# ---- which rule --------------------------------------------------------------------------------


def _kind(outcome: Outcome, params: Params) -> tuple[str, Cuts | None]:
    """The closed rule that the law computes, found on a grid of predictors; else quadrature."""
    first = {k: p[:1] for k, p in params.items()}
    z = torch.tensor(_GRID, dtype=outcome.y.dtype, device=outcome.y.device).reshape(-1, 1, 1)
    leaves = outcome.leaves(z, first)
    family = outcome.family
    inner = family.dist if isinstance(family, laws.Censored) else family
    prefix = "dist." if inner is not family else ""
    fixed_rest = all(_constant(v) for k, v in leaves.items() if k != f"{prefix}loc")
    if isinstance(family, (laws.Bernoulli, laws.Categorical)):
        return _categories(outcome, leaves, z, first)
    if isinstance(family, laws.Poisson):
        exposure = leaves["rate"] * (-z).exp()
        return "poisson" if _constant(exposure) else "quadrature", None
    if isinstance(family, laws.Delta):
        return _exact(leaves["v"], z), None
    if f"{prefix}loc" not in leaves or not fixed_rest:
        return "quadrature", None
    return _real(type(inner), bool(prefix), leaves[f"{prefix}loc"], z), None


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


def _exact(v: Tensor, z: Tensor) -> str:
    """Outcomes that follow from the predictor."""
    for kind, function in (("sign of", z.sign()), ("rectified exactly", z.relu())):
        if _equal(v, function):
            return kind
    return "modulus exactly" if _equal(v, z.abs()) else "quadrature"


def _categories(
    o: Outcome, leaves: Mapping[str, Tensor], z: Tensor, params: Params
) -> tuple[str, Cuts | None]:
    if isinstance(o.family, laws.Bernoulli):
        odds = leaves["logits"] if "logits" in leaves else torch.logit(leaves["probs"])
        if _equal(odds, z):
            return "logistic", None
        if _equal(-odds, z):
            return "logistic flipped", None
    with torch.no_grad():
        probe = _scores(o, params)
        seen = probe(z[:1].unsqueeze(1))  # [1, 1, B | 1, m | 1, K - 1]
        cuts = found_cuts(probe, z, (seen.shape[-1], *seen.shape[1:-1]))
    if cuts is None or (cuts.is_noiseless and o.reads_params):
        return "quadrature", None
    is_binary = isinstance(o.family, laws.Bernoulli) and not torch.count_nonzero(cuts.places)
    if is_binary:
        return "sign" if cuts.is_noiseless else "probit", cuts
    return "quantised" if cuts.is_noiseless else "ordinal", cuts


def _scores(o: Outcome, params: Params) -> Scores:
    """Cumulative scores of the categories as a function of predictors ``[P, R | 1, B | 1, m | 1]``."""
    restarts = max((len(p) for p in params.values()), default=1)

    def at(z: Tensor) -> Tensor:
        z = z.expand(-1, restarts, -1, -1)
        wide = {
            k: p if len(p) == 1 else p.repeat(len(z), *(1,) * (p.ndim - 1))
            for k, p in params.items()
        }
        leaves = o.leaves(z.flatten(0, 1), wide)
        if isinstance(o.family, laws.Bernoulli):
            leaves = {"probs": torch.stack(_both(leaves), -1)}
        found = scores(leaves)
        found = found.expand(len(z) * restarts, *found.shape[1:])
        return found.reshape(len(z), restarts, *found.shape[1:])

    return at


def _both(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities of failure and success."""
    if "probs" in leaves:
        return 1.0 - leaves["probs"], leaves["probs"]
    return torch.sigmoid(-leaves["logits"]), torch.sigmoid(leaves["logits"])


def _constant(leaf: Tensor) -> bool:
    return leaf.shape[0] == 1 or _equal(leaf, leaf[:1])


def _equal(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 100 * torch.finfo(found.dtype).eps ** 0.75
    return bool(((found - wanted).abs() <= tolerance * (1 + wanted.abs())).all())


# ---- rules -------------------------------------------------------------------------------------


def _by_quadrature(o: Outcome, params: Params) -> Rule:
    return Quadrature(lambda z: o.log_prob(z, params))


def _noise(o: Outcome, params: Params) -> Tensor:
    return o.fixed_leaves(params)["scale"].square()


def _gaussian(o: Outcome, params: Params) -> Rule:
    return rules.GaussianNoise(o.data, _noise(o, params))


def _modulus(o: Outcome, params: Params) -> Rule:
    return rules.Modulus(o.data, _noise(o, params))


def _rectified(o: Outcome, params: Params) -> Rule:
    return rules.ReLU(o.data, _noise(o, params))


def _censored(o: Outcome, params: Params) -> Rule:
    leaves = o.fixed_leaves(params)
    infinite = torch.full_like(leaves["dist.scale"], torch.inf)
    low, high = leaves.get("low", -infinite), leaves.get("high", infinite)
    return rules.Censored(o.data, low, high, leaves["dist.scale"].square())


def _additive(o: Outcome, params: Params) -> Rule:
    leaves = {"loc": o.y.new_zeros(1, 1, 1), **o.fixed_leaves(params)}
    noise = translation(o.family, leaves)
    assert noise is not None, "the kind says that the noise has a rule"
    return rules.AdditiveNoise(o.data, noise.rule(leaves))


def _sign(o: Outcome, params: Params) -> Rule:
    return rules.Probit(o.data, torch.zeros_like(o.data[:, :1, :1]))


def _rectified_exactly(o: Outcome, params: Params) -> Rule:
    zero = torch.zeros_like(o.data[:, :1, :1])
    return rules.Censored(o.data, zero, zero + torch.inf, zero)


def _modulus_exactly(o: Outcome, params: Params) -> Rule:
    return rules.Modulus(o.data, torch.zeros_like(o.data[:, :1, :1]))


def _now(o: Outcome, params: Params) -> Cuts:
    """Cut points and noise for these params."""
    assert o.cuts is not None, "the kind says that the categories are intervals"
    return moved_cuts(_scores(o, params), o.cuts) if o.reads_params else o.cuts


def _probit(o: Outcome, params: Params) -> Rule:
    cuts = _now(o, params)
    return rules.Probit(o.data if cuts.sign > 0 else 1.0 - o.data, cuts.scale[0].square())


def _ordinal(o: Outcome, params: Params) -> Rule:
    cuts = _now(o, params)
    return rules.Interval(*cuts.edges(o.data), cuts.scale[0].square())


def _logistic(o: Outcome, params: Params) -> Rule:
    return rules.Logistic(o.data)


def _flipped_logistic(o: Outcome, params: Params) -> Rule:
    return rules.Logistic(1.0 - o.data)


def _poisson(o: Outcome, params: Params) -> Rule:
    return rules.Poisson(o.data, o.leaves(0.0, params)["rate"])


_KINDS: dict[str, Callable[[Outcome, Params], Rule]] = {
    "quadrature": _by_quadrature,
    "gaussian": _gaussian,
    "modulus": _modulus,
    "rectified": _rectified,
    "censored": _censored,
    "additive": _additive,
    "sign": _probit,
    "sign of": _sign,
    "rectified exactly": _rectified_exactly,
    "modulus exactly": _modulus_exactly,
    "probit": _probit,
    "ordinal": _ordinal,
    "quantised": _ordinal,
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
