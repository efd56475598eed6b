"""Where does sparse recovery succeed? A picture over undersampling and sparsity, beside the l1 curve.

    python benchmarks/amp_phase.py [--size 500] [--grid 16] [--trials 4] [--picture amp_phase.png]

Noise is 60 dB below the signal, and nothing is known to AMP. A trial succeeds where the error is below -40 dB. The
picture shows the share of successes for every m / n (rows over coefficients) and k / m (non-zeros over rows), the
curve of Donoho and Tanner below which the l1 norm finds the truth; above k = m no method can. All trials of a cell
share a matrix and run as right-hand sides of one fit, by VAMP, which settles in fewer sweeps than GAMP near the
transition. The table has, for every m / n, the k / m at which half of the trials succeed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.amp_scale import many_sides  # noqa: E402
from benchmarks.driving import RESULTS, show, write_table  # noqa: E402
from benchmarks.sensing import cpu, markdown, nmse_db, sparse_vector  # noqa: E402
from ppl import infer  # noqa: E402
from ppl.models.sparse import sensing_matrix  # noqa: E402

SUCCESS_DB = -40.0
SNR_DB = 60.0


def l1_curve(delta: np.ndarray) -> np.ndarray:
    """Largest k / m at which the l1 norm finds sparse vectors, for m / n = ``delta``; weak threshold.

    With M(c) = (1 + c^2) P(-c) - c p(c), p and P of the standard normal law, it is
    max over c of [1 - (2 / delta) M(c)] / [1 + c^2 - 2 M(c)].

    Source: [Donoho2009].

    >>> l1_curve(np.array([0.5])).round(2).tolist()
    [0.39]
    """
    c = np.linspace(0.01, 6.0, 2001)[:, None]
    mass = (1 + c**2) * norm.cdf(-c) - c * norm.pdf(c)
    return ((1 - 2 / delta * mass) / (1 + c**2 - 2 * mass)).max(0).clip(0, 1)


def cell(size: int, delta: float, rho: float, trials: int, seed: int) -> dict[str, Any]:
    """Errors of some vectors that share a matrix."""
    rng = np.random.default_rng(seed)
    rows = max(2, round(delta * size))
    share = max(1, round(rho * rows)) / size
    matrix = sensing_matrix(rows, size, seed=seed)
    x = np.stack([sparse_vector(size, share, rng) for _ in range(trials)])
    x *= np.sqrt(share * size) / np.linalg.norm(
        x, axis=1, keepdims=True
    )  # one noise is fair to all
    z = x @ matrix.T
    noise = np.sqrt(np.mean(z**2) * 10 ** (-SNR_DB / 10))
    y = z + noise * rng.standard_normal(z.shape)
    data = {"A": matrix, "y": y.T}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # above the transition nothing has to converge
        options = {"variant": "vamp", "start": "data", "max_iters": 500}
        seconds, fitted = cpu(lambda: infer(many_sides, data, method="amp", seed=0, **options))
    found = fitted.mean("x").numpy()
    errors = [nmse_db(a, b) for a, b in zip(found, x, strict=True)]
    return show(
        "phase transition",
        delta=delta,
        rho=rho,
        size=size,
        trials=trials,
        success=float(np.mean(np.array(errors) < SUCCESS_DB)),
        worst_db=max(errors),
        sweeps=fitted.diagnostics.iterations,
        cpu_s=seconds,
    )


def half_way(rhos: np.ndarray, success: np.ndarray) -> float:
    """Sparsity at which success falls below a half, by a straight line between two cells."""
    below = np.flatnonzero(success < 0.5)
    if not len(below):
        return float(rhos[-1])
    k = int(below[0])
    if k == 0:
        return float(rhos[0] * 0.5)
    step = (success[k - 1] - 0.5) / (success[k - 1] - success[k])
    return float(rhos[k - 1] + step * (rhos[k] - rhos[k - 1]))


def draw(deltas: np.ndarray, rhos: np.ndarray, success: np.ndarray, file: Path) -> None:
    """The picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 5), layout="constrained")
    shown = axes.pcolormesh(
        deltas, rhos, success.T, vmin=0, vmax=1, cmap="Greys_r", shading="nearest"
    )
    line = np.linspace(deltas[0] / 2, 1, 200)
    axes.plot(line, l1_curve(line), color="C1", lw=2, label="l1 (Donoho and Tanner)")
    half = [half_way(rhos, row) for row in success]
    axes.plot(deltas, half, "o-", color="C0", ms=4, lw=1.5, label="AMP, half of the trials")
    axes.set(xlabel="m / n, rows over coefficients", ylabel="k / m, non-zeros over rows")
    axes.set(title="Share of vectors that are found", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")
    figure.colorbar(shown, ax=axes)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def table(deltas: np.ndarray, rhos: np.ndarray, success: np.ndarray, note: str) -> str:
    """Markdown."""
    rows = [
        [f"{d:.2f}", f"{half_way(rhos, s):.2f}", f"{l1:.2f}"]
        for d, s, l1 in zip(deltas, success, l1_curve(deltas), strict=True)
    ]
    head = ["m / n", "k / m at which AMP finds half of the vectors", "l1 curve"]
    return f"{note}\n\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--picture", type=Path, default=RESULTS / "amp_phase.png")
    parser.add_argument("--quiet", action="store_true", help="leave the stored table as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = (np.arange(arguments.grid) + 0.5) / arguments.grid
    success = np.zeros((len(steps), len(steps)))
    for i, delta in enumerate(steps):
        for j, rho in enumerate(steps):
            if j > 1 and success[i, j - 1] == 0 and success[i, j - 2] == 0:
                break  # denser vectors are not found either
            seed = 1000 * i + j
            success[i, j] = cell(arguments.size, delta, rho, arguments.trials, seed)["success"]
    try:
        draw(steps, steps, success, arguments.picture)
        print(f"picture: {arguments.picture}")
    except ImportError:
        print("skipped: the picture, because matplotlib is not installed")
    note = (
        f"{arguments.size} coefficients, {arguments.trials} vectors a cell, {SNR_DB:.0f} dB, nothing "
        f"known; found: error below {SUCCESS_DB:.0f} dB."
    )
    text = table(steps, steps, success, note)
    print("\n" + text) if arguments.quiet else write_table("amp_phase", text)


if __name__ == "__main__":
    main()
