"""Sparse linear regression: how near to the best possible error is AMP, and how fast beside the Lasso?

    python benchmarks/amp_sparse.py [--seeds 3] [--size 2000] [--only iid1000 group300]

A tenth of 2000 coefficients matters, noise is 30 dB below the signal, and neither the share, nor the
slab, nor the noise is known to AMP. Beside it: the posterior mean of one who knows the support; the
Lasso path of scikit-learn with the best of 60 penalties chosen by the truth; LassoCV; and, where
``$PPL_PEERS`` names an interpreter that has them, vampyre and tramp, both of which are told the true
constants. NMSE in dB and CPU seconds on one thread, medians and ranges over the seeds. AMP's seconds
are those of the whole call of ``infer``: trace, bind, look at the matrix, factorise, sweep, posterior.
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
    Sensed,
    cpu,
    grouped_vector,
    markdown,
    nmse_db,
    oracle,
    sensed,
    sparse_vector,
    spread,
)
from ppl import infer  # noqa: E402
from ppl.models import group_sparse, sparse_linear  # noqa: E402
from ppl.models.sparse import MatrixKind  # noqa: E402

SHARE = 0.1


class Setting(NamedTuple):
    """Rows (of a size of 2000), matrix, members of a group, and what was measured elsewhere."""

    rows: int
    kind: MatrixKind = "independent"
    members: int = 1
    title: str = ""


SETTINGS = {
    "iid1000": Setting(1000, title="1000 rows"),
    "iid600": Setting(600, title="600 rows"),
    "condition100": Setting(1000, "conditioned", title="1000 rows, condition number 100"),
    "correlated": Setting(
        1000, "correlated", title="1000 rows, neighbouring columns correlate by 0.9"
    ),
    "offset": Setting(1000, "offset", title="1000 rows, entries with a mean of one sd"),
    "group4": Setting(300, members=4, title="300 rows, groups of 4"),
    "group10": Setting(300, members=10, title="300 rows, groups of 10"),
    "group50": Setting(300, members=50, title="300 rows, groups of 50"),
}


def case_of(setting: Setting, size: int, seed: int) -> Sensed:
    """The problem of a seed."""
    rng = np.random.default_rng(seed)
    if setting.members > 1:
        x = grouped_vector(size, setting.members, SHARE, rng)
    else:
        x = sparse_vector(size, SHARE, rng)
    return sensed(x, setting.rows * size // 2000, setting.kind, seed=seed)


def amp(case: Sensed, **options: Any) -> np.ndarray:
    """Posterior means with nothing known."""
    fitted = infer(sparse_linear, case.data, method="amp", start="data", seed=0, **options)
    return fitted.mean("x").numpy()


def amp_groups(case: Sensed, members: int) -> np.ndarray:
    """Posterior means with the groups known."""
    groups = np.repeat(np.arange(len(case.x) // members), members)
    fitted = infer(
        group_sparse(rate=0.3), {**case.data, "group": groups}, method="amp", start="data", seed=0
    )
    return fitted.mean("x").numpy()


def centred(case: Sensed, penalties: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrix and outcomes without their column means, and penalties from the largest that matters down."""
    matrix, y = case.matrix - case.matrix.mean(0), case.y - case.y.mean()
    top = np.abs(matrix.T @ y).max() / len(y)
    return matrix, y, np.geomspace(top, 1e-3 * top, penalties)


def lasso_by_truth(case: Sensed) -> np.ndarray:
    """The coefficients on a path of 60 penalties that are nearest to the truth."""
    from sklearn.linear_model import lasso_path

    matrix, y, penalties = centred(case, 60)
    _, path, _ = lasso_path(matrix, y, alphas=penalties)
    return path[:, np.square(path - case.x[:, None]).sum(0).argmin()]


def lasso_cv(case: Sensed) -> np.ndarray:
    """Five folds, a path of 100 penalties each."""
    from sklearn.linear_model import LassoCV

    matrix, y, penalties = centred(case, 100)
    return LassoCV(cv=5, fit_intercept=False, alphas=penalties).fit(matrix, y).coef_


def methods(setting: Setting) -> dict[str, Callable[[Sensed], np.ndarray]]:
    """Everything that is compared on a setting, in the order of the table."""
    found: dict[str, Callable[[Sensed], np.ndarray]] = {"oracle support": oracle}
    if setting.members > 1:
        found["amp, groups known"] = lambda case: amp_groups(case, setting.members)
        return found | {"amp, groups unknown": amp}
    found |= {"amp": amp, "amp, GAMP": lambda case: amp(case, variant="gamp")}
    found["amp, VAMP"] = lambda case: amp(case, variant="vamp")
    return found | {"Lasso path, best by truth": lasso_by_truth, "LassoCV": lasso_cv}


def measure(name: str, size: int, seeds: int) -> list[dict[str, Any]]:
    """One record a method and seed."""
    rows = []
    for seed in range(seeds):
        case = case_of(SETTINGS[name], size, seed)
        for method, work in methods(SETTINGS[name]).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the Lasso's convergence at tiny penalties
                seconds, found = cpu(lambda work=work, case=case: work(case))  # type: ignore[misc]
            rows.append(record(name, method, seed, nmse_db(found, case.x), seconds))
        rows += [] if SETTINGS[name].members > 1 or not peers() else ask(name, case, seed)
    return rows


def ask(name: str, case: Sensed, seed: int) -> list[dict[str, Any]]:
    """The peers on the same arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "case.npz")
        np.savez(path, A=case.matrix, x=case.x, y=case.y, noise=case.noise, share=SHARE)
        answers = ask_peer("amp_peers.py", path)
    for answer in answers:
        if "skipped" in answer:
            print(f"skipped: {answer['skipped']}")
    return [
        record(name, a["method"], seed, a["nmse_db"], a["cpu_s"]) for a in answers if "method" in a
    ]


def record(name: str, method: str, seed: int, score: float, seconds: float) -> dict[str, Any]:
    """A JSON line."""
    return show(
        "sparse linear regression",
        setting=name,
        method=method,
        seed=seed,
        nmse_db=score,
        cpu_s=seconds,
    )


def table(rows: list[dict[str, Any]], size: int) -> str:
    """One table a setting, with CPU time relative to the Lasso path where it was run."""
    parts = [
        f"{size} coefficients, a tenth of them not zero, 30 dB; medians and ranges over seeds."
    ]
    for name in dict.fromkeys(r["setting"] for r in rows):
        own = [r for r in rows if r["setting"] == name]
        by = {
            m: [r for r in own if r["method"] == m] for m in dict.fromkeys(r["method"] for r in own)
        }
        path = by.get("Lasso path, best by truth")
        unit = median(r["cpu_s"] for r in path) if path else None
        lines = []
        for method, found in by.items():
            seconds = [r["cpu_s"] for r in found]
            ratio = f"{median(seconds) / unit:.2f}" if unit else ""
            score = spread([r["nmse_db"] for r in found])
            lines.append([method, score, spread(seconds, 3), ratio])
        head = ["method", "NMSE, dB", "CPU s", "of the Lasso path"]
        parts += [f"## {SETTINGS[name].title}", markdown(head, lines)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quiet", action="store_true", help="leave the stored table as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not peers():
        print("skipped: vampyre and tramp, because $PPL_PEERS names no interpreter that has them")
    for work in methods(SETTINGS["iid1000"]).values():  # what is imported and compiled on first use
        work(case_of(SETTINGS["iid1000"], 200, 0))
    rows = [
        row for name in arguments.only for row in measure(name, arguments.size, arguments.seeds)
    ]
    text = table(rows, arguments.size)
    print("\n" + text) if arguments.quiet else write_table("amp_sparse", text)


if __name__ == "__main__":
    main()
