"""Continual learning: what a posterior says of a latent becomes its law in the next fit.

``infer(model, new_data, prior=posterior)`` replaces the law of every latent that the posterior
knows by a Gaussian with the posterior's mean and covariance, element by element of its plates.
Between elements, and between different latents, the replaced laws are independent: a model whose
unknowns are one vector is filtered exactly (Gaussian likelihoods given), others approximately, as
in assumed-density filtering. Elements without labels are matched by position: latents of rows that
are new each time need labels, or they take the laws of the rows that stood there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl import marginals as mg
from ppl.binding import Bound, positions_of
from ppl.distributions import ConcentratedNormal, Distribution, MultivariateNormal, Normal
from ppl.errors import DataError, ModelError, NumericalError, UnsupportedError
from ppl.graph import Graph, Law, Node, Ref, Variable, maximal, refs
from ppl.manifolds import by_name, manifold_of
from ppl.marginals import Gaussian, JointGaussian
from ppl.posterior import Posterior

Gaussians = Gaussian | JointGaussian
_REAL = (constraints.real, constraints.real_vector)


def with_prior(bound: Bound, prior: Posterior) -> Bound:
    """The bound model with the laws of the latents that ``prior`` knows replaced by its moments.

    Elements of plates are matched by label (by position where there are none). Elements that the
    posterior does not know keep the model's law, which must then be a Gaussian with constant
    parameters. Learned constants start where the posterior has them.

    Raises:
        ModelError: ``prior`` is no posterior.
        UnsupportedError: a latent has no Gaussian law; every such latent is listed.
        DataError: a latent or param has another shape than in the posterior, or its elements are
            named in one and counted in the other.
    """
    if not isinstance(prior, Posterior):
        raise ModelError(
            f"prior: expected a posterior, what infer returns, got {type(prior).__name__}."
        )
    known = [v for v in bound.graph.latents if v.name in prior.marginals]
    if not known and not prior.params:
        raise DataError(
            f"prior: the posterior knows none of this model's latents. It knows {', '.join(prior.marginals) or 'none'}."
        )
    laws: dict[str, Gaussians] = {}
    reasons: list[str] = []
    for variable in known:
        try:
            laws[variable.name] = moments(prior, variable)
        except UnsupportedError as error:
            reasons.append(str(error))
    if reasons:
        raise UnsupportedError("prior= cannot carry over:\n    " + "\n    ".join(reasons))
    return _with_params(with_laws(bound, laws, prior.labels), prior)


def moments(prior: Posterior, variable: Variable) -> Gaussians:
    """What a posterior knows of a latent, as Gaussians of the elements of its plates.

    Raises:
        UnsupportedError: no Gaussian can stand for it; the message says why.
        DataError: its shape differs.
    """
    name, marginal = variable.name, prior.marginals[variable.name]
    if variable.is_discrete:
        raise UnsupportedError(
            f"'{name}': it is discrete, and no Gaussian stands for it. Fit all data at once, or observe it."
        )
    manifold = manifold_of(variable)
    if manifold is None and not _is_real(variable):
        raise UnsupportedError(
            f"'{name}': its support is {variable.support}, and a Gaussian reaches beyond. State the model on the whole "
            "line, with the latent's logarithm for example."
        )
    _check_same_shape(variable, prior)
    if manifold is not None:
        if isinstance(marginal, JointGaussian) and marginal.manifold == manifold.name:
            return marginal
        raise UnsupportedError(
            f"'{name}': {prior.method} keeps no tangent coordinates of {manifold.name}. Fit with method='gbp' or 'laplace'."
        )
    return _of_vectors(marginal, variable)


def _of_vectors(marginal: mg.Marginal, variable: Variable) -> Gaussians:
    if isinstance(marginal, mg.SparseGaussian):
        raise UnsupportedError(
            f"'{variable.name}': {len(marginal.index)} of its elements are active and the others zero with certainty, which no "
            "Gaussian says. Fit the earlier data with method='vi'."
        )
    if isinstance(marginal, (mg.Gaussian, mg.GaussianMixture, mg.Pieces)) or variable.dims == 1:
        scale = mg.sd(marginal).to(mg.mean(marginal))
        return Gaussian(mg.mean(marginal), scale)
    if len(variable.event_shape) > 1:
        raise UnsupportedError(
            f"'{variable.name}': its elements are arrays {list(variable.event_shape)}, and the covariance of a vector is what "
            "can be carried over. Declare it as a vector and reshape it."
        )
    return JointGaussian(mg.mean(marginal), mg.covariance(marginal, 1))


def with_laws(
    bound: Bound, laws: Mapping[str, Gaussians], labels: Mapping[str, Sequence[object]]
) -> Bound:
    """The bound model with Gaussians as the laws of some latents.

    Args:
        bound: of the new data.
        laws: arrays over the plates of each latent, for elements called ``labels``.
        labels: of the elements of each plate.

    Returns:
        A bound model whose graph has the new laws; their arrays are covariates called
        ``name@loc`` and ``name@scale``. ``prior`` keeps them, in the order of its own labels.
    """
    used = dict(bound.prior)
    for name, law in laws.items():
        variable = bound.graph.variables[name]
        whole = _matched(bound, variable, law, labels)
        if whole is not None:
            bound = _replaced(bound, variable, whole)
            used[name] = whole
    return replace(bound, prior=used)


# ---- elements -----------------------------------------------------------------------------------


def _matched(
    bound: Bound, variable: Variable, law: Gaussians, labels: Mapping[str, Sequence[object]]
) -> Gaussians | None:
    """The law laid out for the elements of the new data; None when none of them was seen."""
    law = _map(law, lambda x: x.to(bound.device, bound.dtype))
    seen = torch.ones((), dtype=torch.bool, device=bound.device)
    for at, plate in enumerate(variable.plates):
        if labels[plate] == bound.labels[plate]:
            seen = seen.unsqueeze(-1).expand(*seen.shape, bound.size(plate))
            continue
        rows = _places(variable, plate, labels, bound)
        law = _map(law, partial(torch.index_select, dim=at, index=rows.clamp(min=0)))
        seen = seen.unsqueeze(-1) & (rows >= 0)
    if bool(seen.all()):
        return law
    if not bool(seen.any()):
        return None
    return _filled(law, _own_law(bound, variable, int((~seen).sum())), seen)


def _places(
    variable: Variable, plate: str, labels: Mapping[str, Sequence[object]], bound: Bound
) -> Tensor:
    """Position among the old elements of each new one, -1 where there is none."""
    old, new = labels[plate], bound.labels[plate]
    rows = positions_of(old, new).to(bound.device)
    if bool((rows < 0).all()) and isinstance(old, range) != isinstance(new, range):
        kinds = ("counted", "named") if isinstance(old, range) else ("named", "counted")
        raise DataError(
            f"prior: the elements of plate '{plate}', over which '{variable.name}' varies, were {kinds[0]} in the earlier data "
            f"and are {kinds[1]} now, so that none is found again. Use the same labels, or say labels={{'{plate}': [...]}}."
        )
    return rows


def _filled(law: Gaussians, own: JointGaussian, seen: Tensor) -> Gaussians:
    """``law`` where an element was seen, the model's own elsewhere."""
    event = law.loc.ndim - seen.ndim
    mask = seen.reshape((*seen.shape, *(1,) * event))
    loc = torch.where(mask, law.loc, own.loc)
    if isinstance(law, Gaussian):
        sd = own.covariance.diagonal(dim1=-2, dim2=-1).sqrt().reshape(own.loc.shape)
        return Gaussian(loc, torch.where(mask, law.scale, sd))
    return law._replace(
        loc=loc, covariance=torch.where(seen[..., None, None], law.covariance, own.covariance)
    )


def _own_law(bound: Bound, variable: Variable, count: int) -> JointGaussian:
    """The model's own law of one element, which must be a Gaussian with constant parameters."""
    factor = bound.graph.factors[variable.name]
    law = factor.law
    place = f"'{variable.name}': {count} elements are new to the posterior"
    if law is None or factor.chain is not None:
        raise UnsupportedError(
            f"prior= cannot carry over:\n    {place}, and in a Markov chain they depend on the ones before. "
            "Use posterior.extend(new_data)."
        )
    family = law.family
    is_gaussian = isinstance(family, (Normal, MultivariateNormal, ConcentratedNormal))
    if not is_gaussian or list(refs(law.arguments)):
        raise UnsupportedError(
            f"prior= cannot carry over:\n    {place}, and their law {law} is not a Gaussian with constant parameters. Use "
            "posterior.extend(new_data), or give them a latent of their own."
        )
    loc = family.mean.to(bound.device, bound.dtype).expand(variable.event_shape)
    if isinstance(family, (MultivariateNormal, ConcentratedNormal)):
        return JointGaussian(loc, family.covariance.to(loc))
    variance = family.variance.to(loc).expand(variable.event_shape)
    return JointGaussian(loc, torch.diag_embed(variance.reshape(-1)))


# ---- the graph ----------------------------------------------------------------------------------


def _replaced(bound: Bound, variable: Variable, law: Gaussians) -> Bound:
    """The bound model with ``law`` as the law of a latent."""
    family, arrays = _family(variable, law)
    arguments: list[object] = []
    values = dict(bound.values)
    graph = bound.graph
    for suffix, array in arrays.items():
        if not variable.plates:
            arguments.append(array)
            continue
        key = f"{variable.name}@{suffix}"
        graph, ref = _with_given(graph, variable, key, array.shape[len(variable.plates) :])
        arguments.append(ref)
        values[key] = array
    factor = graph.factors[variable.name]
    scope = (variable.name, *(f"{variable.name}@{s}" for s in arrays if variable.plates))
    new = replace(factor, law=Law(family, tuple(arguments)), scope=scope, chain=None)
    graph = replace(graph, factors={**graph.factors, factor.name: new})
    return replace(bound, graph=graph, values=values)


def _family(variable: Variable, law: Gaussians) -> tuple[Distribution, dict[str, Tensor]]:
    """The law of one element, and the arrays ``[*plates, ...]`` that replace its parameters."""
    one = (0,) * len(variable.plates)
    if isinstance(law, Gaussian):
        _check_spread(variable, law.scale)
        return Normal(law.loc[one], law.scale[one]), {"loc": law.loc, "scale": law.scale}
    try:
        root = torch.linalg.cholesky(law.covariance)
    except torch.linalg.LinAlgError:
        raise NumericalError(
            f"prior: the posterior covariance of '{variable.name}' is not positive definite. Fit again with proper priors."
        ) from None
    arrays = {"loc": law.loc, "scale": root}
    if law.manifold is not None:
        return ConcentratedNormal(by_name(law.manifold), law.loc[one], scale_tril=root[one]), arrays
    return MultivariateNormal(law.loc[one], scale_tril=root[one]), arrays


def _check_spread(variable: Variable, scale: Tensor) -> None:
    bad = ~((scale > 0) & scale.isfinite())
    if bool(bad.any()):
        raise NumericalError(
            f"prior: {int(bad.sum())} of {bad.numel()} posterior standard deviations of '{variable.name}' are zero or not "
            "finite. Fit again with proper priors."
        )


def _with_given(
    graph: Graph, variable: Variable, key: str, event: tuple[int, ...]
) -> tuple[Graph, Ref]:
    """The graph with a covariate ``key`` over the plates of a latent, and a reference to it."""
    given = Variable(key, "given", variable.plates, tuple(event), where=variable.where)
    plates = maximal(graph.plates, variable.plates)
    node = Node(
        len(graph.nodes), "variable", None, (), {}, plates, tuple(event), variable.where, key
    )
    variables = {key: given, **graph.variables}  # declared before it is used
    return replace(graph, variables=variables, nodes=(*graph.nodes, node)), Ref(node.id)


def _with_params(bound: Bound, prior: Posterior) -> Bound:
    """Learned constants start where the posterior has them."""
    variables = dict(bound.graph.variables)
    for variable in bound.graph.role("param"):
        if variable.name in prior.params:
            start = _start(bound, variable, prior)
            variables[variable.name] = replace(variable, initial=start)
    return replace(bound, graph=replace(bound.graph, variables=variables))


def _start(bound: Bound, variable: Variable, prior: Posterior) -> Tensor:
    """Start ``[*plates, *event]`` of a param: learned where an element was seen, else the model's own."""
    _check_same_shape(variable, prior)
    own = torch.as_tensor(variable.initial).to(bound.device, bound.dtype)
    found = prior.params[variable.name].to(own)
    seen = torch.ones((), dtype=torch.bool, device=bound.device)
    for at, plate in enumerate(variable.plates):
        rows = _places(variable, plate, prior.labels, bound)
        found = found.index_select(at, rows.clamp(min=0))
        seen = seen.unsqueeze(-1) & (rows >= 0)
    mask = seen.reshape((*seen.shape, *(1,) * len(variable.event_shape)))
    return torch.where(mask, found, own.expand(bound.shape(variable)))


def _check_same_shape(variable: Variable, prior: Posterior) -> None:
    before = prior.graph.variables[variable.name]
    if (before.event_shape, before.plates) != (variable.event_shape, variable.plates):
        raise DataError(
            f"prior: '{variable.name}' was fitted with plates {before.plates} and elements {list(before.event_shape)}, the "
            f"model now has plates {variable.plates} and elements {list(variable.event_shape)}. Use the same model for both."
        )


def _map(law: Gaussians, change: Callable[[Tensor], Tensor]) -> Gaussians:
    if isinstance(law, Gaussian):
        return Gaussian(change(law.loc), change(law.scale))
    return law._replace(loc=change(law.loc), covariance=change(law.covariance))


def _is_real(variable: Variable) -> bool:
    support = variable.support
    base = getattr(support, "base_constraint", support)
    return any(base is known for known in _REAL)


__all__ = ["moments", "with_laws", "with_prior"]
