"""Poisson regression with an L1 penalty by skglm, cross-validated: the peer of amp_glm.py for counts.

    python amp_glm_peer.py CASE.npz

The archive has A and y. Ten penalties from the largest that matters down to a hundredth of it, five folds, warm
starts along the path, an intercept; the penalty with the best held-out likelihood is fitted to all rows.
Prints a JSON line with the coefficients and CPU seconds; what is compiled on first use is not in them. Run by
an interpreter that has skglm (README.md here) and nothing of ours.
"""

import argparse
import json
import time

import numpy as np


def path(matrix, y, penalties):
    """Coefficients and intercepts at every penalty, from the largest down."""
    from skglm import GeneralizedLinearEstimator
    from skglm.datafits import Poisson
    from skglm.penalties import L1
    from skglm.solvers import ProxNewton

    solver = ProxNewton(fit_intercept=True, warm_start=True, tol=1e-4)
    model = GeneralizedLinearEstimator(Poisson(), L1(penalties[0]), solver)
    for penalty in penalties:
        model.penalty = L1(penalty)
        model.fit(matrix, y)
        yield model.coef_.ravel().copy(), float(np.ravel(model.intercept_)[0])


def loss(matrix, y, coefs, intercept):
    """Negative log-likelihood without its constant."""
    score = matrix @ coefs + intercept
    return float(np.sum(np.exp(np.minimum(score, 50.0)) - y * score))


def cross_validated(matrix, y, count=10, folds=5):
    """Coefficients at the best penalty."""
    top = np.abs(matrix.T @ (y - y.mean())).max() / len(y)
    penalties = np.geomspace(0.999, 0.01, count) * top
    parts, held = np.array_split(np.arange(len(y)), folds), np.zeros(count)
    for out in parts:
        kept = np.setdiff1d(np.arange(len(y)), out)
        found = path(np.asfortranarray(matrix[kept]), y[kept], penalties)
        held += [loss(matrix[out], y[out], *each) for each in found]
    best = penalties[: int(held.argmin()) + 1]
    return list(path(np.asfortranarray(matrix), y, best))[-1][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    with np.load(parser.parse_args().case) as archive:
        matrix, y = archive["A"], archive["y"]
    try:
        cross_validated(matrix[:60, :20], y[:60])
    except ImportError as error:
        print(json.dumps({"skipped": f"skglm: {error}"}))
        return
    begun = time.process_time()
    found = cross_validated(matrix, y)
    seconds = time.process_time() - begun
    print(json.dumps({"coefs": found.tolist(), "cpu_s": seconds}))


if __name__ == "__main__":
    main()
