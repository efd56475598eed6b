"""What a distribution accepts, and what each refusal says."""

import numpy as np
import pytest
import torch

from ppl import distributions as d
from ppl.errors import ModelError

NAN = float("nan")
REFUSED = {
    "negative": (
        lambda: d.Normal(0.0, -1.0),
        r"Normal: scale must be positive, got -1.0. Pass exp",
    ),
    "nan": (lambda: d.Normal(NAN, 1.0), r"loc must be a real number, got nan"),
    "entry": (lambda: d.Normal(0.0, [1.0, -2.0]), r"got -2.0 at index \(1,\) \(1 of 2 entries"),
    "probs": (
        lambda: d.Bernoulli(1.2),
        r"Bernoulli: probs must be between 0 and 1, got 1.2. Pass log-odds",
    ),
    "weights": (lambda: d.Categorical([0.5, -0.5]), r"non-negative with a positive sum.*logits="),
    "geometric": (lambda: d.Geometric(0.0), r"above 0 and at most 1"),
    "count": (
        lambda: d.Binomial(2.5, 0.5),
        r"total_count must be an integer of at least 0, got 2.5",
    ),
    "matrix": (
        lambda: d.MultivariateNormal([0.0, 0.0], torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        r"positive definite",
    ),
    "tril": (
        lambda: d.MultivariateNormal([0.0], scale_tril=[[-1.0]]),
        r"lower triangular.*cholesky",
    ),
    "spelling": (
        lambda: d.Normal(loc=0.0, sclae=1.0),
        r"no parameter 'sclae'. Did you mean 'scale'\?",
    ),
    "twice": (lambda: d.Normal(0.0, 1.0, loc=2.0), r"loc was given twice"),
    "many": (lambda: d.Exponential(1.0, 2.0), r"takes 1 parameters \(rate\), got 2"),
    "missing": (lambda: d.Normal(0.0), r"Normal needs scale"),
    "both": (
        lambda: d.Bernoulli(probs=0.5, logits=0.0),
        r"exactly one of probs, logits; got probs and logits",
    ),
    "none": (lambda: d.Poisson(None), r"Poisson needs rate"),
    "neither": (lambda: d.NegativeBinomial(2.0), r"exactly one of probs, logits; got none"),
    "scalar": (lambda: d.Dirichlet(1.0), r"concentration must be a vector .*got 1.0"),
    "loc": (lambda: d.MultivariateNormal(0.0, torch.eye(2)), r"loc must be a vector"),
    "size": (
        lambda: d.MultivariateNormal([0.0], torch.eye(2)),
        r"covariance_matrix must be \[1, 1\].*got \[2, 2\]",
    ),
    "shapes": (
        lambda: d.Normal(torch.zeros(2), torch.ones(3)),
        r"do not broadcast: loc \(2,\), scale \(3,\)",
    ),
    "text": (
        lambda: d.Normal("0", 1.0),
        r"loc must be a number, a tensor or an array, got str '0'",
    ),
    "law": (lambda: d.Normal(d.Normal(0.0, 1.0), 1.0), r"Declare the draw first"),
    "order": (
        lambda: d.Uniform(2.0, 1.0),
        r"low must be less than high, got low=2.0, high=1.0. Swap",
    ),
    "no cdf": (
        lambda: d.Truncated(d.StudentT(3.0), 0.0),
        r"distribution function is known, got StudentT. Use",
    ),
    "no limit": (lambda: d.Truncated(d.Normal(0.0, 1.0)), r"give a finite low"),
    "censored counts": (lambda: d.Censored(d.Poisson(1.0), 0.0), r"got Poisson"),
    "inflated": (lambda: d.ZeroInflated(d.Normal(0.0, 1.0), 0.1), r"count law.*SpikeSlab"),
    "hurdle": (lambda: d.Hurdle(d.Normal(0.0, 1.0), 0.1), r"count law.*SpikeSlab"),
    "slab": (lambda: d.SpikeSlab(0.1, d.Poisson(1.0)), r"continuous law.*ZeroInflated"),
    "kernel": (lambda: d.Normal(0.0, 1.0).robust("hubr", 1.0), r"'hubr'. Did you mean 'huber'"),
    "robust": (lambda: d.Laplace(0.0, 1.0).robust("huber", 1.0), r"only a Normal.*got Laplace"),
    "components": (
        lambda: d.Mixture([0.5, 0.5], [d.Normal(0.0, 1.0)]),
        r"2 weights need as many components",
    ),
    "axis": (
        lambda: d.Mixture([0.5, 0.5], d.Normal([0.0, 1.0, 2.0], 1.0)),
        r"2 weights need 2 .*got 3",
    ),
    "chooser": (
        lambda: d.MixtureSameFamily(d.Poisson(1.0), d.Normal([0.0], 1.0)),
        r"must be a Categorical",
    ),
    "independent": (lambda: d.Independent(d.Normal(0.0, 1.0), 1), r"integer from 0 to 0"),
    "transform": (
        lambda: d.TransformedDistribution(d.Normal(0.0, 1.0), []),
        r"must be torch.distributions transforms",
    ),
    "step": (lambda: d.Markov(d.Normal(0.0, 1.0), 3), r"step must be a function"),
    "markov order": (
        lambda: d.Markov(d.Normal(0.0, 1.0), d.Normal, order=0),
        r"order must be an integer",
    ),
    "flat": (lambda: d.Flat("x"), r"size must be a shape"),
    "dim": (lambda: d.LKJCholesky(1.5), r"dim must be an integer of at least 2"),
    "class": (lambda: d.as_distribution(d.Normal), r"got the class Normal. Call it: Normal\(...\)"),
    "number": (lambda: d.as_distribution(1.0), r"got the number 1.0. Write Delta\(x\)"),
    "tensor": (lambda: d.as_distribution(torch.ones(2)), r"got a tensor. Write Delta\(x\)"),
    "string": (lambda: d.as_distribution("Normal"), r"expected a distribution, got str"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_to_do_at_the_users_line(build, message):
    with pytest.raises(ModelError, match=message) as error:
        build()
    assert error.value.where.file == __file__


@pytest.mark.parametrize(
    "x", [[1, 2], (1.0, 2.0), np.array([1, 2]), np.float32([1, 2]), torch.tensor([1, 2])]
)
def test_arrays_become_tensors_and_densities_float64(x):
    law = d.Normal(x, 1)
    assert isinstance(law.loc, torch.Tensor) and law.scale == 1
    assert law.log_prob(torch.tensor(0.0, dtype=torch.float64)).dtype == torch.float64
    assert law.batch_shape == (2,)


def test_numbers_stay_numbers_until_they_are_lowered():
    law = d.Normal(np.float64(0.5), 2)
    assert [leaf.value for leaf in law.leaves()] == [0.5, 2]
    assert all(type(leaf.value) in (int, float) for leaf in law.leaves())
    assert law.log_prob(torch.tensor(0.5)).dtype == torch.float32
    assert law.log_prob(torch.tensor(1)).dtype == torch.float64
    assert repr(law) == "Normal(loc=0.5, scale=2)"


class Traced(torch.Tensor):
    """Stands for a value under trace: nobody may look at its numbers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in ("__get__", "dim", "size", "is_floating_point"):
            raise AssertionError(f"{func} looks at a traced value")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "build",
    [
        lambda x: d.Normal(x, x),
        lambda x: d.Uniform(x, 2.0),
        lambda x: d.Truncated(d.Normal(x, 1.0), low=x),
        lambda x: d.Normal(x, x).robust("huber", x).masked(x),
        lambda x: d.Mixture([0.5, 0.5], [d.Normal(x, 1.0), d.Laplace(0.0, x)]),
        lambda x: d.ZeroInflated(d.Poisson(x), x),
        lambda x: d.Hurdle(d.Poisson(x), x),
        lambda x: d.Binomial(x, logits=x),
        lambda x: d.Delta(x),
    ],
)
def test_traced_values_are_stored_and_never_read(build):
    law = build(torch.tensor(-1.0).as_subclass(Traced))
    assert any(isinstance(leaf.value, Traced) for leaf in law.leaves())
    assert law.batch_shape == () and "value []" in repr(law) and law.support is not None
    assert law.replace([torch.tensor(0.5)] * len(law.leaves())).leaves()[0].value.item() == 0.5
