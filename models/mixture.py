"""Mixtures of Normals, and counts with more zeros than their law explains.

Normal(m, s) takes a standard deviation s; logit^-1 is the logistic function.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from ppl import (
    Categorical,
    Dirichlet,
    HalfNormal,
    Hurdle,
    LogNormal,
    Mixture,
    NegativeBinomial,
    Normal,
    Poisson,
    ZeroInflated,
    deterministic,
    dot,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.models.choices import check_choice

CountLaw = Literal["poisson", "negative_binomial"]
Zeros = Literal["inflated", "hurdle"]


@model
def mixture(k: int = 3, dim: int | None = None) -> None:
    """A mixture of ``k`` Normals, with the component of each point. Data of location 0 and scale 1 to 10.

    weight ~ Dirichlet(1, ..., 1); for each component c centre_c ~ Normal(0, 5) and spread_c ~
    HalfNormal(2), in ``dim`` dimensions independently; for each point z ~ Categorical(weight) and
    x ~ Normal(centre_z, spread_z).

    Components are exchangeable: the posterior has k! equal copies. It says so, and
    ``posterior.relabelled("component", by="centre")`` numbers them. :func:`ordered_mixture` has one
    copy only.

    Latents: ``weight`` ``[k]``, ``centre`` and ``spread`` ``[component]`` or ``[component, dim]``,
    ``z`` ``[point]``. Data: ``x`` ``[point]`` or ``[point, dim]``.

    Args:
        k: number of components.
        dim: of a point; None for numbers.

    Source: [Gelman2013] section 22.1.

    >>> drawn = mixture(k=2, dim=3).sample(4, sizes={"point": 5}, seed=0)
    >>> drawn["centre"].shape, drawn["x"].shape
    (torch.Size([4, 2, 3]), torch.Size([4, 5, 3]))
    """
    shape = () if dim is None else (dim,)
    component = plate("component", k)
    weight = latent("weight", Dirichlet(torch.ones(k)))
    with component:
        centre = latent("centre", Normal(0.0, 5.0), shape=shape)
        spread = latent("spread", HalfNormal(2.0), shape=shape)
    with plate("point"):
        z = latent("z", Categorical(weight, over=component))
        observe("x", Normal(centre[z], spread[z]))


@model
def ordered_mixture(k: int = 3) -> None:
    """:func:`mixture` of numbers with the centres in ascending order, the components summed out.

    weight ~ Dirichlet(1, ..., 1), spread_c ~ HalfNormal(2); first ~ Normal(0, 5), gap_c ~
    HalfNormal(5); centre_1 = first, centre_c = centre_(c - 1) + gap_(c - 1); x ~ sum_c weight_c
    Normal(centre_c, spread_c).

    Latents: ``weight`` and ``spread`` ``[k]``, ``first``, ``gap`` ``[k - 1]``; ``centre`` ``[k]`` is
    reported. Data: ``x`` ``[point]``.

    Args:
        k: number of components, at least 2.

    >>> drawn = ordered_mixture(k=3).sample(4, sizes={"point": 5}, seed=0)
    >>> bool((drawn["centre"].diff(dim=-1) > 0).all())
    True
    """
    weight = latent("weight", Dirichlet(torch.ones(k)))
    spread = latent("spread", HalfNormal(2.0), shape=k)
    first = latent("first", Normal(0.0, 5.0))
    gap = latent("gap", HalfNormal(5.0), shape=k - 1)
    rise = torch.cat([torch.zeros(1), gap.cumsum(0)])
    centre = deterministic("centre", first + rise)
    with plate("point"):
        observe("x", Mixture(weight, Normal(centre, spread)))


@model
def zero_inflated(law: CountLaw = "poisson", zeros: Zeros = "inflated") -> None:
    """Regression of counts with more zeros, or fewer, than their law explains.

    base, absent ~ Normal(0, 2), effect_j ~ Normal(0, 1), size ~ LogNormal(1, 1). A row has mean
    m = exp(base + sum_j x_j effect_j) and the chance g = logit^-1(absent) of a zero of another kind.
    ``"inflated"``: count is 0 with probability g, else a draw of the law, which may be 0 too.
    ``"hurdle"``: count is 0 with probability g, else a draw of the law that is not 0. The law is
    Poisson(m), or a negative binomial of mean m and variance m + m^2 / size.

    Latents: ``base``, ``absent``, ``effect`` ``[feature]``; ``size`` with a negative binomial. Data:
    ``x`` ``[row, feature]``, ``count`` ``[row]``.

    Args:
        law: of counts where they are not zero for another reason.
        zeros: where the others come from.

    Source: [Lambert1992] for inflated zeros, [Mullahy1986] for the hurdle.

    >>> drawn = zero_inflated("negative_binomial").sample(4, {"x": torch.ones(6, 2)}, seed=0)
    >>> drawn["count"].shape, drawn["effect"].shape
    (torch.Size([4, 6]), torch.Size([4, 2]))
    """
    check_choice("zero_inflated: law", law, get_args(CountLaw))
    check_choice("zero_inflated: zeros", zeros, get_args(Zeros))
    row, feature = plate("row"), plate("feature")
    base, absent = latent("base", Normal(0.0, 2.0)), latent("absent", Normal(0.0, 2.0))
    size = latent("size", LogNormal(1.0, 1.0)) if law == "negative_binomial" else None
    with feature:
        effect = latent("effect", Normal(0.0, 1.0))
    with row:
        with feature:
            x = given("x")
        counts = _counts(base + dot(x, effect, over=feature), size)
        observe("count", (Hurdle if zeros == "hurdle" else ZeroInflated)(counts, absent.sigmoid()))


def _counts(log_mean: Any, size: Any) -> Any:
    if size is None:
        return Poisson(log_mean.exp())
    return NegativeBinomial(size, logits=log_mean - size.log())
