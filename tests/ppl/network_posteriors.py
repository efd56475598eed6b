"""Posteriors of networks made by hand: no fit, known numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl import Categorical, Posterior, given, model, nn, observe, plate
from ppl.marginals import Gaussian, SparseGaussian
from ppl.posterior import Independent

Change = Callable[[Tensor], None]


@model
def normalised():
    """Two layers with a batch norm between them."""
    net = nn.Sequential(
        nn.Linear(4, 3, name="fc1"), nn.BatchNorm(3, name="bn"), nn.Linear(3, 2, name="fc2")
    )
    with plate("row"):
        observe("label", Categorical(logits=net(given("x"))))


def network_posterior(
    model: Any,
    data: Mapping[str, Any],
    density: float = 1.0,
    *,
    seed: int = 0,
    spread: float = 0.1,
    masks: Mapping[str, Change] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Posterior:
    """Independent Gaussians for every latent; of weights a random share is active.

    Args:
        model: with layers.
        data: for it.
        density: share of the weights that is active; at 1 the marginals are dense.
        seed: of means, standard deviations and places.
        spread: largest standard deviation.
        masks: by name of a weight, a function that changes which of its entries are active (bool, in place).
        dtype: of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = model.bind(data, dtype=dtype)

    def random(draw, *shape):
        return draw(shape, generator=generator, dtype=torch.float64).to(dtype)

    marginals = {}
    for variable in bound.graph.latents:
        shape = bound.shape(variable)
        if density == 1.0 and not masks or not variable.name.endswith("weight"):
            marginals[variable.name] = Gaussian(
                random(torch.randn, *shape), spread * (0.1 + random(torch.rand, *shape))
            )
            continue
        active = random(torch.rand, *shape) < density
        if masks and variable.name in masks:
            masks[variable.name](active)
        index = active.reshape(-1).nonzero().squeeze(-1)
        marginals[variable.name] = SparseGaussian(
            index,
            random(torch.randn, len(index)),
            spread * (0.1 + random(torch.rand, len(index))),
            shape,
        )
    params = {
        v.name: torch.as_tensor(v.initial, dtype=dtype).expand(bound.shape(v)).clone()
        for v in bound.graph.role("param")
    }
    posterior = Posterior(
        bound, marginals, method="by hand", sampler=Independent(marginals), params=params
    )
    posterior.model = model
    return posterior
