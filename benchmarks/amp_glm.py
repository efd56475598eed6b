"""Sparse probit, logistic, one-bit and Poisson regression: AMP beside cross-validated penalties.

    python benchmarks/amp_glm.py [--seeds 3] [--size 1000] [--only probit logit]

A tenth of 1000 coefficients matters; 3000 rows. Neither the share of non-zeros nor their scale is known to
AMP. Beside it scikit-learn: logistic regression with an L1 penalty of ten strengths, five folds (it stands for
probit and for signs too: only the direction is judged), and for counts Poisson regression with the ridge
penalty of ten, chosen by five folds; and, where ``$PPL_PEERS`` names an interpreter that has it, skglm with an
L1 penalty for them. Errors in dB, of the direction except for counts, beside what state evolution
predicts for a large random matrix and known constants; CPU seconds of whole calls on one thread; medians and
ranges over seeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.driving import ask_peer, peers, show, write_table  # noqa: E402
from benchmarks.sensing import (  # noqa: E402
    cpu,
    direction_db,
    markdown,
    nmse_db,
    sparse_vector,
    spread,
)
from ppl import Model, UnsupportedError, infer  # noqa: E402
from ppl.inference.amp import state_evolution  # noqa: E402
from ppl.models import one_bit, sparse_binary, sparse_counts  # noqa: E402
from ppl.models.sparse import sensing_matrix  # noqa: E402

SHARE = 0.1
POWER = 3.5  # mean square of the score A x of probit and logistic regression


class Setting(NamedTuple):
    """A channel: how it is drawn, fitted and judged."""

    program: Model[Any]
    power: float  # mean square of the score
    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    score: Callable[[Any, np.ndarray], float]
    rival: str


def _probit(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (z + rng.standard_normal(len(z)) > 0).astype(float)


def _logit(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (z + rng.logistic(size=len(z)) > 0).astype(float)


def _sign(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (z > 0).astype(float)


def _poisson(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(np.exp(z)).astype(float)


L1, RIDGE = "L1 logistic, cross-validated", "ridge Poisson, cross-validated"
SKGLM = "L1 Poisson by skglm, cross-validated"
SETTINGS = {
    "probit": Setting(sparse_binary(link="probit"), POWER, _probit, direction_db, L1),
    "logit": Setting(sparse_binary(link="logit"), POWER, _logit, direction_db, L1),
    "one-bit": Setting(one_bit, 1.0, _sign, direction_db, L1),
    "poisson": Setting(sparse_counts, 1.0, _poisson, nmse_db, RIDGE),
}


def case_of(name: str, size: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Data and true coefficients."""
    setting, rng = SETTINGS[name], np.random.default_rng(seed)
    x = sparse_vector(size, SHARE, rng)
    matrix = sensing_matrix(3 * size, size, seed=seed + 1000)
    # The mean square of the score is that of x times the gain of a row.
    x *= np.sqrt(setting.power / np.mean(np.square(matrix @ x)))
    return {"A": matrix, "y": setting.draw(matrix @ x, rng)}, x


def amp(name: str, data: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    """Posterior means."""
    fitted = infer(SETTINGS[name].program, data, method="amp", seed=0, **options)
    return fitted.mean("x").numpy()


def cross_validated(name: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """Coefficients at the best penalty of scikit-learn."""
    from sklearn.linear_model import LogisticRegressionCV, PoissonRegressor
    from sklearn.model_selection import GridSearchCV

    if name == "poisson":
        grid = {"alpha": np.geomspace(1e-4, 10.0, 10)}
        search = GridSearchCV(PoissonRegressor(max_iter=300), grid, cv=5)
        return search.fit(data["A"], data["y"]).best_estimator_.coef_
    penalty = {"l1_ratios": (1.0,), "solver": "liblinear", "scoring": "neg_log_loss"}
    search = LogisticRegressionCV(
        Cs=np.geomspace(0.01, 10.0, 10), cv=5, fit_intercept=False, **penalty
    )
    return search.fit(data["A"] * np.sqrt(3.0), data["y"]).coef_.ravel()


def predicted(name: str, size: int) -> float | None:
    """The error that state evolution gives for the true constants, on the scale of the score."""
    setting = SETTINGS[name]
    slab = np.sqrt(3 * setting.power / SHARE)
    constants = {"rate": SHARE, "slab": slab}
    known = {k: v for k, v in constants.items() if k in setting.program.graph().variables}
    sizes = {"row": 3 * size, "coef": size}
    try:
        nmse = 10 ** (state_evolution(setting.program, sizes, params=known).nmse_db / 10)
    except UnsupportedError:
        return None
    if setting.score is direction_db:  # of a posterior mean: its cosine with the truth is that
        nmse = 2 - 2 * np.sqrt(1 - nmse)
    return float(10 * np.log10(nmse))


def measure(name: str, size: int, seeds: int, with_rivals: bool) -> list[dict[str, Any]]:
    """One record a method and seed."""
    methods: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
        "amp": lambda data: amp(name, data),
        "amp, GLM-VAMP": lambda data: amp(name, data, variant="vamp"),
    }
    if with_rivals:
        methods[SETTINGS[name].rival] = lambda data: cross_validated(name, data)
    rows, limit = [], predicted(name, size)
    for seed in range(seeds):
        data, x = case_of(name, size, seed)
        found = {}
        for method, work in methods.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of scikit-learn's stopping at weak penalties
                found[method] = cpu(lambda work=work, data=data: work(data))  # type: ignore[misc]
        if name == "poisson" and with_rivals and peers():
            found |= ask(data)
        for method, (seconds, coefs) in found.items():
            what = {"setting": name, "method": method, "seed": seed, "predicted_db": limit}
            score = SETTINGS[name].score(coefs, x)
            rows.append(show("sparse generalised linear models", **what, db=score, cpu_s=seconds))
    return rows


def ask(data: dict[str, np.ndarray]) -> dict[str, tuple[float, np.ndarray]]:
    """Seconds and coefficients of skglm on the same arrays, if it is there."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "case.npz")
        np.savez(path, **data)
        (answer,) = ask_peer("amp_glm_peer.py", path)
    if "skipped" in answer:
        print(f"skipped: {answer['skipped']}")
        return {}
    return {SKGLM: (answer["cpu_s"], np.array(answer["coefs"]))}


def table(rows: list[dict[str, Any]], size: int) -> str:
    """One row a channel and method."""
    lines = []
    for name in dict.fromkeys(r["setting"] for r in rows):
        own = [r for r in rows if r["setting"] == name]
        # An L1 penalty where there is one: a ridge does not look for few coefficients.
        rivals = [m for m in (SKGLM, SETTINGS[name].rival) if any(r["method"] == m for r in own)]
        rival = [r["cpu_s"] for r in own if r["method"] in rivals[:1]]
        for method in dict.fromkeys(r["method"] for r in own):
            found = [r for r in own if r["method"] == method]
            seconds = [r["cpu_s"] for r in found]
            ratio = f"{median(seconds) / median(rival):.3f}" if rival else ""
            score, limit = spread([r["db"] for r in found]), found[0]["predicted_db"]
            shown = "" if limit is None else f"{limit:.1f}"
            lines.append([name, method, score, shown, spread(seconds, 2), ratio])
    head = [
        "channel",
        "method",
        "error, dB",
        "predicted for AMP",
        "CPU s",
        "of the L1 or ridge fit",
    ]
    note = (
        f"{size} coefficients, a tenth of them not zero, {3 * size} rows; scores of mean square "
        f"{POWER:g} (probit, logit) or 1. Error of the direction; of the coefficients for counts."
    )
    return f"{note}\n\n{markdown(head, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--no-rivals", action="store_true", help="AMP alone")
    parser.add_argument("--quiet", action="store_true", help="leave the stored table as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not peers():
        print("skipped: skglm, because $PPL_PEERS names no interpreter that has it")
    for name in arguments.only:  # what is imported and compiled on first use
        data, _ = case_of(name, 30, 0)
        amp(name, data, max_iters=3)
    rows = []
    for name in arguments.only:
        rows += measure(name, arguments.size, arguments.seeds, not arguments.no_rivals)
    text = table(rows, arguments.size)
    print("\n" + text) if arguments.quiet else write_table("amp_glm", text)


if __name__ == "__main__":
    main()
