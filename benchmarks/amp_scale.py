"""How far does AMP reach: a million unknowns without a matrix, a hundred right-hand sides at once?

    python benchmarks/amp_scale.py [--exponents 16 20] [--sides 100] [--threads 2]

A signal of 2^20 points with a tenth of its cosine coefficients not zero is sampled at half of its points, noise
30 dB below: NMSE, seconds, CPU seconds of all threads beside those of one pair of transforms, peak memory above
that of the loaded program. Then right-hand sides that share a dense matrix of 1000 x 2000: CPU seconds of all at
once beside those of one. Each job runs in a process of its own, so that one peak does not hide another.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributions import constraints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.driving import show, write_table  # noqa: E402
from benchmarks.sensing import cpu, markdown, nmse_db, sparse_vector  # noqa: E402
from ppl import Normal, SpikeSlab, dot, given, infer, latent, model, observe, param, plate  # noqa: E402
from ppl.models import sparse_spectrum  # noqa: E402
from ppl.models.sparse import sensing_matrix  # noqa: E402
from ppl.models.transforms import dct, inverse_dct  # noqa: E402

SHARE, SNR = 0.1, 1e-3
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@model
def many_sides() -> None:
    """``sparse_linear`` for several vectors that share the matrix and the constants."""
    rate = param("rate", 0.1, support=constraints.unit_interval)
    slab = param("slab", 1.0, support=constraints.positive)
    noise = param("noise", 0.1, support=constraints.positive)
    case, row, coef = plate("case"), plate("row"), plate("coef")
    with case, coef:
        x = latent("x", SpikeSlab(rate, slab=Normal(0.0, slab)))
    with row:
        with coef:
            matrix = given("A")
        with case:
            observe("y", Normal(dot(matrix, x, over=coef), noise))


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fastest(work: Callable[[], Any], repeats: int = 5) -> float:
    """CPU seconds of the fastest of some repeats."""
    return min(cpu(work)[0] for _ in range(repeats))


def spectrum(size: int, dtype: str, **options: Any) -> dict[str, Any]:
    """A signal of ``size`` points seen at half of them."""
    rng = np.random.default_rng(0)
    x = sparse_vector(size, SHARE, rng)
    at = np.sort(rng.permutation(size)[: size // 2])
    z = dct(torch.as_tensor(x))[torch.as_tensor(at)].numpy()
    y = z + np.sqrt(SNR * np.mean(z**2)) * rng.standard_normal(len(z))
    vector = torch.as_tensor(x, dtype=DTYPES[dtype])
    pair = fastest(lambda: inverse_dct(dct(vector)))
    before, begun = peak_mib(), time.perf_counter()
    settings = {"method": "amp", "dtype": DTYPES[dtype], "seed": 0, **options}
    used, fitted = cpu(lambda: infer(sparse_spectrum(size), {"at": at, "y": y}, **settings))
    seconds = time.perf_counter() - begun
    return show(
        "a million unknowns",
        unknowns=size,
        dtype=dtype,
        variant=fitted.variant.split(":")[0],
        sweeps=fitted.diagnostics.iterations,
        nmse_db=nmse_db(fitted.mean("x"), x),
        seconds=seconds,
        cpu_s=used,
        pair_of_transforms_s=pair,
        peak_mib=peak_mib() - before,
        vector_mib=vector.numel() * vector.element_size() / 2**20,
    )


def sides(count: int, sweeps: int = 30) -> dict[str, Any]:
    """``count`` right-hand sides at once and one alone, as many sweeps each."""
    rng = np.random.default_rng(0)
    matrix = sensing_matrix(1000, 2000)
    x = np.stack([sparse_vector(2000, SHARE, rng) for _ in range(count)])
    z = x @ matrix.T
    y = z + np.sqrt(SNR * np.mean(z**2)) * rng.standard_normal(z.shape)

    def run(number: int) -> Any:
        data = {"A": matrix, "y": y[:number].T}
        return infer(many_sides, data, method="amp", seed=0, tol=0.0, max_iters=sweeps)

    run(1)
    one, before = fastest(lambda: run(1)), peak_mib()
    seconds, fitted = cpu(lambda: run(count))
    return show(
        "many right-hand sides",
        sides=count,
        nmse_db=nmse_db(fitted.mean("x"), x),
        one_s=one,
        seconds=seconds,
        ratio=seconds / one,
        peak_mib=peak_mib() - before,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    large = [
        [
            str(r["unknowns"]),
            r["dtype"],
            r["variant"],
            str(r["sweeps"]),
            f"{r['nmse_db']:.1f}",
            f"{r['seconds']:.1f}",
            f"{r['cpu_s']:.1f}",
            f"{r['cpu_s'] / r['pair_of_transforms_s']:.0f}",
            f"{r['peak_mib']:.0f}",
            f"{r['peak_mib'] / r['vector_mib']:.0f}",
        ]
        for r in rows
        if "unknowns" in r
    ]
    batch = [
        [
            str(r["sides"]),
            f"{r['nmse_db']:.1f}",
            f"{r['one_s']:.3f}",
            f"{r['seconds']:.2f}",
            f"{r['ratio']:.1f}",
            f"{r['peak_mib']:.0f}",
        ]
        for r in rows
        if "sides" in r
    ]
    head = ["unknowns", "numbers", "variant", "sweeps", "NMSE, dB", "seconds", "CPU s"]
    head += ["pairs of transforms in that time", "peak, MiB", "peak, vectors of x"]
    other = [
        "right-hand sides",
        "NMSE, dB",
        "one alone, CPU s",
        "all at once, CPU s",
        "ratio",
        "peak, MiB",
    ]
    first = "## A subsampled cosine transform, half of the points, 30 dB, nothing known"
    second = "## Right-hand sides that share a dense 1000 x 2000 matrix, 30 sweeps"
    return "\n\n".join([first, markdown(head, large), second, markdown(other, batch)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exponents", type=int, nargs="+", default=[16, 20])
    parser.add_argument("--sides", type=int, nargs="+", default=[100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="leave the stored table as it is")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        kind, *rest = arguments.one
        spectrum(int(rest[0]), rest[1]) if kind == "spectrum" else sides(int(rest[0]))
        return
    jobs = [["spectrum", str(2**k), d] for k in arguments.exponents for d in DTYPES]
    jobs += [["sides", str(count)] for count in arguments.sides]
    rows = []
    for job in jobs:
        # One thread for right-hand sides: threads that wait for each other burn CPU seconds, too.
        threads = 1 if job[0] == "sides" else arguments.threads
        command = [sys.executable, __file__, "--threads", str(threads), "--one", *job]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{job} failed:\n{out.stderr[-3000:]}")
        print(out.stdout.strip(), flush=True)
        rows.append(json.loads(out.stdout.strip().splitlines()[-1]))
    text = table(rows)
    print("\n" + text) if arguments.quiet else write_table("amp_scale", text)


if __name__ == "__main__":
    main()
