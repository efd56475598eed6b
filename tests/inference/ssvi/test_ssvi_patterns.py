"""Products with index sets: the same value and gradients as the masked dense array, whatever the kernel."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ppl.inference.ssvi import timing
from ppl.inference.ssvi.patterns import Form, dense, pattern_of, product
from ppl.inference.ssvi.sets import random_set
from ppl.inference.ssvi.structured import groups_of, members

_LINEAR = Form("linear", (7, 5))


def _batched(convolve, inner, *options):
    """A convolution for any number of leading axes, as the layers have it."""

    def run(x, weight):
        y = convolve(x.reshape(-1, *x.shape[-inner:]), weight, None, *options)
        return y.reshape(*x.shape[:-inner], *y.shape[1:])

    return run


_CONV1 = Form("conv1d", (4, 3, 3), _batched(functional.conv1d, 2, 2, 1))
_CONV2 = Form("conv2d", (4, 3, 3, 2), _batched(functional.conv2d, 3, (1, 2), (1, 0)))
_INPUTS = {"linear": (5,), "conv1d": (3, 8), "conv2d": (3, 6, 7)}


def _value_and_gradients(run, values, x):
    values, x = values.clone().requires_grad_(), x.clone().requires_grad_()
    y = run(values, x)
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape)
    return (y, *torch.autograd.grad((weight * y.square()).sum(), (values, x)))


def _agree(form, kernel, index, dtype=torch.float64, tolerance=1e-10):
    values = torch.randn(len(index), dtype=dtype)
    for batch in ((6,), (2, 3)):
        x = torch.randn(*batch, *_INPUTS[form.kind], dtype=dtype)

        def masked(values, x):
            return form.run(x, dense(values, index, form.shape))

        found = _value_and_gradients(product(kernel, form, index), values, x)
        expected = _value_and_gradients(masked, values, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 9, 35])
@pytest.mark.parametrize("kernel", ["csr", "dense"])
def test_linear_kernels_agree_with_masks(kernel, count):
    index = random_set(35, count, torch.Generator().manual_seed(2), torch.device("cpu"))
    _agree(_LINEAR, kernel, index)
    _agree(_LINEAR, kernel, index, torch.float32, 1e-5)


@pytest.mark.parametrize("form", [_CONV1, _CONV2], ids=["conv1d", "conv2d"])
def test_convolutions_agree_with_masks(form):
    index = random_set(form.size, 11, torch.Generator().manual_seed(2), torch.device("cpu"))
    _agree(form, "dense", index)


@pytest.mark.parametrize("form", [_LINEAR, _CONV1, _CONV2], ids=lambda f: f.kind)
@pytest.mark.parametrize("sets", ["neuron", "output"])
def test_compact_kernels_agree_with_masks(sets, form):
    groups = groups_of(sets, form)
    _agree(form, groups.kernel, members(groups, torch.tensor([0, 2])))


def test_a_value_of_zero_has_a_gradient():
    layer = product("csr", _LINEAR, torch.tensor([3, 11]))
    values, x = torch.zeros(2, requires_grad=True), torch.randn(4, 5)
    layer(values, x).sum().backward()
    torch.testing.assert_close(values.grad, x.sum(0)[[3, 1]])


def test_the_transpose_of_a_pattern_is_the_pattern_of_the_transpose():
    index = random_set(35, 12, torch.Generator().manual_seed(4), torch.device("cpu"))
    p = pattern_of(index, 7, 5)
    turned = dense(torch.ones(12), index, (7, 5)).T.reshape(-1).nonzero().squeeze(-1)
    q = pattern_of(turned, 5, 7)
    assert torch.equal(p.starts_t, q.starts) and torch.equal(p.columns_t, q.columns)


def test_activations_stay_features_first():
    layer = product("csr", _LINEAR, torch.arange(4))
    y = layer(torch.ones(4), torch.randn(6, 5))
    assert y.shape == (6, 7) and y.T.is_contiguous()


def test_the_timing_chooses_sparse_rows_where_they_pay():
    cpu = torch.device("cpu")
    sparse = timing.choose(Form("linear", (800, 800)), 6400, 64, torch.float32, cpu)
    assert sparse.kernel == "csr" and sparse.speed > 1.0
    filled = timing.choose(Form("linear", (800, 800)), 600_000, 64, torch.float32, cpu)
    assert filled.kernel == "dense"
    assert timing.choose(_CONV2, 3, 64, torch.float32, cpu).kernel == "dense"


def test_the_choice_is_the_same_within_a_process():
    args = (Form("linear", (300, 300)), 9000, 32, torch.float32, torch.device("cpu"))
    assert timing.choose(*args) is timing.choose(*args)
