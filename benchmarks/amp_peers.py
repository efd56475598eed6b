"""Fit a sparse linear regression with vampyre and with tramp: the peers of amp_sparse.py.

    python amp_peers.py CASE.npz

The archive has A, x, y, noise (standard deviation) and share (of non-zeros); slabs are standard normal.
Both packages are told these constants. The singular value decomposition of A is inside their times; imports and
first calls, on a small corner of the problem, are not. Prints a JSON line a way of fitting, or one that says what
was skipped and why. Run by an interpreter that has the packages (README.md here) and nothing of ours.
"""

import argparse
import fractions
import json
import math
import time

import numpy as np


def revive_names():
    """Give back what vampyre, and the networkx 1.11 that tramp needs, expect of older versions."""
    fractions.gcd = math.gcd
    for name, kind in {"complex": complex, "float": float, "product": np.prod}.items():
        if name not in vars(np):
            setattr(np, name, kind)


def vampyre(case, iterations):
    """VAMP with the singular value decomposition inside the time."""
    import vampyre as vp

    shape = (case["A"].shape[1],)
    parts = [vp.estim.DiscreteEst(0, 1, shape), vp.estim.GaussEst(0, 1, shape)]
    weights = np.array([1 - case["share"], case["share"]])
    prior = vp.estim.MixEst(parts, w=weights, name="Input")
    operator = vp.trans.MatrixLT(case["A"], shape)
    channel = vp.estim.LinEst(operator, case["y"], case["noise"] ** 2, map_est=False, name="Output")
    messages = vp.estim.MsgHdlSimp(map_est=False, shape=shape)
    solver = vp.solver.Vamp(prior, channel, messages, nit=iterations)
    solver.solve()
    return solver.zhat


def tramp(case, damping):
    """Expectation propagation on the chain prior - linear - Gaussian, to the package's own tolerance."""
    from tramp.algos import ExpectationPropagation
    from tramp.channels import LinearChannel
    from tramp.likelihoods import GaussianLikelihood
    from tramp.priors import GaussBernoulliPrior
    from tramp.variables import SISOVariable

    prior = GaussBernoulliPrior(size=(case["A"].shape[1],), rho=case["share"])
    likelihood = GaussianLikelihood(y=case["y"], var=case["noise"] ** 2)
    x, z = SISOVariable(id="x"), SISOVariable(id="z")
    chain = prior @ x @ LinearChannel(W=case["A"]) @ z @ likelihood
    run = ExpectationPropagation(chain.to_model())
    run.iterate(max_iter=200, damping=damping)
    return run.get_variable_data("x")["r"]


WAYS = {
    "vampyre, VAMP, 10 iterations": lambda case: vampyre(case, 10),
    "vampyre, VAMP, 40 iterations": lambda case: vampyre(case, 40),
    "tramp, EP": lambda case: tramp(case, None),
    "tramp, EP damped by 0.3": lambda case: tramp(case, 0.3),
}


def small(case):
    """A corner of a problem: what is imported on first use is not in the times."""
    part = {**case, "A": case["A"][:50, :100].copy(), "x": case["x"][:100]}
    return {**part, "y": part["A"] @ part["x"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    with np.load(parser.parse_args().case) as archive:
        case = {name: archive[name] for name in archive.files}
    case["noise"], case["share"] = float(case["noise"]), float(case["share"])
    revive_names()
    for name, way in WAYS.items():
        try:
            way(small(case))
            begun = time.process_time()
            found = way(case)
            seconds = time.process_time() - begun
        except (ImportError, AttributeError, ArithmeticError, ValueError) as error:
            print(json.dumps({"skipped": f"{name}: {type(error).__name__}: {error}"}), flush=True)
            continue
        error = np.square(found - case["x"]).sum() / np.square(case["x"]).sum()
        score = 10 * np.log10(error)
        print(json.dumps({"method": name, "nmse_db": score, "cpu_s": seconds}), flush=True)


if __name__ == "__main__":
    main()
