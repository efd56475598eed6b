"""Sparse matrices in the data: torch's layouts and scipy's, kept sparse from binding to the products."""

from __future__ import annotations

import warnings

import pytest
import scipy.sparse
import torch

from ppl import (
    DataError,
    ModelError,
    Normal,
    UnsupportedError,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
)
from ppl.inference.amp.mixing import make_operator
from ppl.inference.amp.recognise import recognise

M, N = 30, 50
DENSE = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DENSE = DENSE * (torch.rand(M, N, generator=torch.Generator().manual_seed(1)) < 0.2)
Y = DENSE @ torch.linspace(-1, 1, N, dtype=torch.float64)


@model
def plated():
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", Normal(0.0, 1.0))
    with row, coef:
        a = given("a")
    with row:
        observe("y", Normal(dot(a, x, over=coef), 0.1))


@model
def vectors():
    x = latent("x", Normal(0.0, 1.0), shape=N)
    observe("y", Normal(given("a") @ x, 0.1))


@model
def turned():
    x = latent("x", Normal(0.0, 1.0), shape=N)
    observe("y", Normal(x @ given("a"), 0.1))


with warnings.catch_warnings(action="ignore"):  # torch says once a process that CSR is in beta
    CSR, CSC = DENSE.to_sparse_csr(), DENSE.to_sparse_csc()

LAYOUTS = {
    "csr": CSR,
    "csc": CSC,
    "coo": DENSE.to_sparse_coo(),
    "scipy csr": scipy.sparse.csr_matrix(DENSE.numpy()),
    "scipy coo array": scipy.sparse.coo_array(DENSE.numpy()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("program", [plated, vectors], ids=["plated", "vectors"])
def test_every_layout_stays_sparse_and_gives_the_dense_answer(layout, program):
    bound = program.bind({"a": LAYOUTS[layout], "y": Y})
    operator = make_operator(bound, recognise(bound.graph)).operator
    assert operator.kind == "sparse"
    torch.testing.assert_close(operator.to_dense(), DENSE)
    found = infer(program, {"a": LAYOUTS[layout], "y": Y}, method="amp", variant="vamp")
    dense = infer(program, {"a": DENSE, "y": Y}, method="amp", variant="vamp")
    torch.testing.assert_close(found.mean("x"), dense.mean("x"))
    assert "sparse" in found.diagnostics.notes["map"]


def test_the_transpose_and_other_expressions():
    bound = turned.bind({"a": DENSE.T.to_sparse_csr(), "y": Y})
    operator = make_operator(bound, recognise(bound.graph)).operator
    assert operator.kind == "sparse"
    torch.testing.assert_close(operator.to_dense(), DENSE)

    @model
    def doubled():
        x = latent("x", Normal(0.0, 1.0), shape=N)
        observe("y", Normal((2.0 * given("a")) @ x, 0.1))

    bound = doubled.bind({"a": CSR, "y": Y})
    operator = make_operator(bound, recognise(bound.graph)).operator
    torch.testing.assert_close(operator.to_dense(), 2.0 * DENSE)


def test_auto_takes_amp_and_other_methods_say_what_to_do():
    data = {"a": LAYOUTS["scipy csr"], "y": Y}
    assert infer(plated, data).method == "amp"
    with pytest.raises(UnsupportedError, match=r"'a': is a sparse matrix.*to_dense"):
        infer(plated, data, method="exact")


def test_predictions_and_files(tmp_path):
    from ppl import load

    found = infer(plated, {"a": CSR, "y": Y}, method="amp")
    assert found.predict(n=50).draws["y"].shape == (50, M)
    assert found.log_likelihood(n=20)["y"].shape == (20, M)
    found.save(tmp_path / "fit.pt")
    again = load(tmp_path / "fit.pt", plated)
    torch.testing.assert_close(again.mean("x"), found.mean("x"))
    assert again.bound.sparse == ("a",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"a": DENSE[:, :-1].to_sparse_coo(), "y": Y[:-1]}, "two sizes"),
        ({"a": CSR, "y": Y.to_sparse_coo()}, "two axes"),
        ({"a": torch.zeros(2, M, N).to_sparse_coo(), "y": Y}, "two axes"),
        ({"a": DENSE.where(DENSE != DENSE[0, 0], torch.nan).to_sparse_coo(), "y": Y}, "NaN"),
    ],
    ids=["sizes", "vector", "three axes", "missing"],
)
def test_what_does_not_fit_is_said(data, words):
    with pytest.raises(DataError, match=words):
        infer(plated, data, method="amp")


def test_wrong_shapes_of_an_event_are_said():
    with pytest.raises(ModelError, match=r"'a' \[30, 49\], 'x' \[50\]"):
        infer(vectors, {"a": DENSE[:, :-1].to_sparse_coo(), "y": Y}, method="amp")
