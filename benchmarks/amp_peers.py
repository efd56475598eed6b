"""Fit a sparse linear regression with vampyre and with tramp: the peers of amp_sparse.py.

    python amp_peers.py CASE.npz

The archive has A, x, y, noise (standard deviation) and share (of non-zeros); slabs are standard normal.
Both packages are told these constants. Prints a JSON line a way of fitting, and one that says what was
skipped and why. Run by an interpreter that has the packages, from checkouts on its path, and nothing of ours:

    python3.11 -m venv peers && peers/bin/pip install "numpy<2" "scipy<1.12" pandas networkx daft
    GAMPTeam/vampyre and sphinxteam/tramp of GitHub on peers' PYTHONPATH or in its site-packages
"""

import argparse
import json
import time

import numpy as np


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
    """Expectation propagation on the chain prior - linear - Gaussian."""
    from tramp.algos import EarlyStopping, ExpectationPropagation
    from tramp.channels import LinearChannel
    from tramp.likelihoods import GaussianLikelihood
    from tramp.priors import GaussBernouilliPrior
    from tramp.variables import SISOVariable

    prior = GaussBernouilliPrior(size=(case["A"].shape[1],), rho=case["share"])
    likelihood = GaussianLikelihood(y=case["y"], var=case["noise"] ** 2)
    x, z = SISOVariable(id="x"), SISOVariable(id="z")
    student = (prior @ x @ LinearChannel(W=case["A"]) @ z @ likelihood).to_model()
    run = ExpectationPropagation(student)
    run.iterate(max_iter=250, damping=damping, callback=EarlyStopping(tol=1e-8))
    return run.get_variables_data(["x"])["x"]["r"]


WAYS = {
    "vampyre, VAMP, 10 iterations": lambda case: vampyre(case, 10),
    "vampyre, VAMP, 40 iterations": lambda case: vampyre(case, 40),
    "tramp, EP": lambda case: tramp(case, 0.0),
    "tramp, EP damped by 0.3": lambda case: tramp(case, 0.3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    with np.load(parser.parse_args().case) as archive:
        case = {name: archive[name] for name in archive.files}
    case["noise"], case["share"] = float(case["noise"]), float(case["share"])
    for name, way in WAYS.items():
        begun = time.process_time()
        try:
            found = way(case)
        except (ImportError, AttributeError, FloatingPointError, ValueError) as error:
            print(json.dumps({"skipped": f"{name}: {type(error).__name__}: {error}"}), flush=True)
            continue
        seconds = time.process_time() - begun
        error = np.square(found - case["x"]).sum() / np.square(case["x"]).sum()
        print(
            json.dumps({"method": name, "nmse_db": 10 * np.log10(error), "cpu_s": seconds}),
            flush=True,
        )


if __name__ == "__main__":
    main()
