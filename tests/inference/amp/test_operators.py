"""Linear maps: every kind against its dense matrix, transposes, spectra, and what is refused."""

import pytest
import torch

from ppl.errors import UnsupportedError
from ppl.inference.amp.operators import beside, dense, matrix_free, rescaled, sparse
from ppl.inference.amp.spectrum import lanczos_spectrum, random_signs


def matrix(m=7, n=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


FIXED = matrix(7, 11, seed=4)


def blur(x):
    return x + 0.5 * x.roll(1, -1) - 0.25 * x.roll(2, -1)


def fourier(x):
    return torch.view_as_real(torch.fft.rfft(x)).flatten(-2)


CASES = {
    "wide": lambda: dense(matrix()),
    "tall": lambda: dense(matrix(11, 7)),
    "sparse": lambda: sparse(matrix() * (matrix() > 0.3)),
    "coordinates": lambda: sparse((matrix() * (matrix() > 0.3)).to_sparse_coo()),
    "blur": lambda: matrix_free(blur, 9),
    "blur, batched": lambda: matrix_free(blur, 9, batched=True),
    "fourier": lambda: matrix_free(fourier, 8),
    "own transpose": lambda: matrix_free(lambda x: FIXED @ x, 11, transpose=lambda z: FIXED.mT @ z),
    "rescaled": lambda: rescaled(dense(matrix()), torch.arange(1.0, 8.0), torch.arange(11.0) + 0.5),
    "rescaled blur": lambda: rescaled(
        matrix_free(blur, 9), columns=torch.arange(9.0, dtype=torch.float64)
    ),
    "rescaled sparse": lambda: rescaled(
        sparse(matrix()), rows=torch.arange(7.0, dtype=torch.float64)
    ),
    "beside": lambda: beside(
        [dense(matrix()), sparse(matrix(7, 3)), dense(torch.ones(7, 1).double())]
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def operator(request):
    return request.param()


def test_products_equal_those_of_the_dense_matrix(operator):
    full = operator.to_dense()
    assert full.shape == operator.shape
    for batch in ((), (3,), (2, 3)):
        x = torch.randn(*batch, operator.shape[1], dtype=torch.float64)
        z = torch.randn(*batch, operator.shape[0], dtype=torch.float64)
        torch.testing.assert_close(operator.mv(x), x @ full.mT)
        torch.testing.assert_close(operator.rmv(z), z @ full)
        if operator.squared_mv is not None:
            torch.testing.assert_close(operator.squared_mv(x), x @ full.square().mT)
            torch.testing.assert_close(operator.squared_rmv(z), z @ full.square())


def test_sizes_means_and_spectrum(operator):
    full = operator.to_dense()
    assert operator.squared_frobenius == pytest.approx(float(full.square().sum()), rel=1e-12)
    torch.testing.assert_close(operator.row_means, full.mean(1))
    torch.testing.assert_close(operator.column_means, full.mean(0))
    values = torch.linalg.svdvals(full).square().flip(0)
    torch.testing.assert_close(operator.gram.values, values, atol=1e-9, rtol=1e-9)
    assert operator.probe.peak <= 1.0001 * float(values[-1]) * full.shape[1] / float(values.sum())


def test_lanczos_finds_traces_and_the_log_determinant():
    operator = dense(matrix(300, 600, 3))
    found, exact = operator.spectrum, operator.gram.spectrum
    for function in (lambda v: 1 / (v + 3.0), lambda v: (v + 3.0).log(), lambda v: v / (v + 3.0)):
        torch.testing.assert_close(found.sum(function), exact.sum(function), rtol=5e-3, atol=0.0)
    assert float(found.weights.sum()) == pytest.approx(300)


def test_lanczos_stops_at_an_invariant_subspace():
    found = lanczos_spectrum(lambda x: 2.0 * x, random_signs(2, 50), 5)
    assert float(found.sum(lambda v: 1 / (1 + v))) == pytest.approx(50 / 3)


def test_probe_sees_a_common_component():
    plain = matrix(100, 200)
    shifted = dense(plain + 2.0)
    assert dense(plain).probe.mean_share < 0.03
    assert shifted.probe.mean_share > 0.7
    assert shifted.probe.peak == pytest.approx(
        float(torch.linalg.svdvals(plain + 2.0)[0] ** 2) * 200 / shifted.squared_frobenius, rel=1e-6
    )


def test_a_large_map_is_measured_by_probes():
    operator = matrix_free(lambda x: blur(x)[:900], 1800)
    assert operator.frobenius_probes == 10
    assert operator.squared_frobenius == pytest.approx(900 * (1 + 0.25 + 0.0625), rel=0.05)


def test_float32_and_its_dtype():
    operator = matrix_free(blur, 9, dtype=torch.float32)
    assert operator.mv(torch.ones(9)).dtype == torch.float32
    assert operator.gram.values.dtype == torch.float32


REFUSED = {
    "affine": (lambda x: x + 1.0, {}, "maps zero to something else"),
    "nonlinear": (lambda x: x * x.abs(), {}, "not linear"),
    "wrong transpose": (lambda x: blur(x), {"transpose": lambda z: blur(z)}, "not the transpose"),
    "scalar": (lambda x: x.sum(), {}, "Flatten its result"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_linear_is_refused(case):
    function, options, message = case
    with pytest.raises(UnsupportedError, match=message):
        matrix_free(function, 6, **options)
