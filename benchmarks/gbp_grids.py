"""Images: how well and how fast do messages denoise, and how near are they to the memory's bandwidth?

    python benchmarks/gbp_grids.py [--only bear] [--side 1024] [--rounds 200]

The first frame of the bear video, in which a tenth of the pixels is noise, with the pairwise model
and the settings of [Nabarro2024] (200 rounds, damping 0.7, truncated losses): PSNR in dB and seconds
on one core, in float32. A grid with Huber losses of a megapixel: seconds a round, bytes of messages
an edge, and the time that copying those bytes takes, which no round can beat.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.driving import fit, show, write_table  # noqa: E402
from ppl import DataError, Model, backend  # noqa: E402
from ppl.backend import Settings  # noqa: E402
from ppl.models import datasets, denoise, denoise_pairs  # noqa: E402
from ppl.models.grids import grid_pairs, peak_signal_to_noise  # noqa: E402
from ppl.streams import Streams  # noqa: E402

# The pairwise model with which the public code of [Ortiz2021] denoises this image; scales in units of the pixels.
PAIRWISE: dict[str, Any] = {
    "noise": 0.2,
    "noise_kernel": ("truncated", 0.14),
    "smooth": 1.3,
    "smooth_kernel": ("truncated", 0.35),
    "colours": True,
}
PUBLISHED = {"matching": "energy", "damping": 0.7, "schedule": "flood", "cure": False}


def bear_cases(noisy: np.ndarray) -> dict[str, tuple[Model[Any], Mapping[str, Any]]]:
    """The pairwise model with each pair once, with the doubled pairs of the public code, and with all pairs twice."""
    rows, columns, colours = noisy.shape
    doubled = {
        "pixel": noisy.reshape(-1, colours),
        **grid_pairs(rows, columns, doubled=True),
    }
    # Corners of the image are in no pair; their own pixel is all that is known of them.
    return {
        "pairs once": (denoise(**PAIRWISE), {"pixel": noisy}),
        "pairs twice": (denoise(**PAIRWISE, copies=2), {"pixel": noisy}),
        "doubled pairs": (denoise_pairs(**PAIRWISE), doubled),
    }


def bear(case: str, rounds: int) -> dict[str, Any]:
    """PSNR and seconds of one way to write the model."""
    clean, noisy = datasets.bear()
    program, data = bear_cases(noisy)[case]
    run = fit(
        program,
        data,
        "gbp",
        max_iters=rounds,
        dtype=torch.float32,
        with_posterior=True,
        start={"x": data["pixel"]},
        variance="gbp",
        **PUBLISHED,
    )
    assert run.posterior is not None
    found = run.posterior.mean("x").double().numpy().reshape(clean.shape)
    corrupted = (clean != noisy).any(2)
    return show(
        "denoising the bear",
        case=case,
        rounds=len(run.steps),
        seconds=run.setup_s + run.fit_s,
        setup_s=run.setup_s,
        psnr_noisy=peak_signal_to_noise(noisy, clean),
        psnr=peak_signal_to_noise(found, clean),
        psnr_corrupted=peak_signal_to_noise(found[corrupted], clean[corrupted]),
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def fastest(work: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest of some repeats."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def huge(side: int, rounds: int) -> dict[str, Any]:
    """A Huber grid of ``side`` squared pixels in float32: seconds a round, and of a copy of its messages."""
    rng = np.random.default_rng(0)
    image = rng.random((side, side), dtype=np.float32)
    program = denoise(noise_kernel=("huber", 1.0))
    bound = program.bind({"pixel": image}, dtype=torch.float32)
    record = backend.resolve("gbp", {"schedule": "flood", "variance": "gbp"})[2]
    module = backend.load("gbp")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = module.prepare(bound, record, Settings(Streams(0), max_iters=rounds))
    state = module.init(problem)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        state, _ = module.step(problem, state, None)
        times.append(time.perf_counter() - begun)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    edges = 4 * side * (side - 1)  # slots of pairs; a pixel's own factor never changes its Jacobian
    messages = torch.ones(2 * edges, dtype=torch.float32)
    target = torch.empty_like(messages)
    floor = fastest(lambda: target.copy_(messages))
    seconds = median(times[1:])
    return show(
        "a round on a large Huber grid",
        side=side,
        edges=edges,
        seconds=seconds,
        seconds_min=min(times),
        seconds_max=max(times),
        messages_per_second=edges / seconds,
        message_bytes_an_edge=8,
        peak_bytes_an_edge=peak / edges,
        floor_s=floor,
        times_floor=seconds / floor,
        rounds=rounds,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "## The bear, frame 0, pairwise, 258 x 454 x 3",
        "",
        "| model | rounds | PSNR before, dB | PSNR, dB | of the corrupted pixels | seconds (of these set-up) | peak, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in (r for r in rows if "case" in r):
        lines.append(
            f"| {r['case']} | {r['rounds']} | {r['psnr_noisy']:.2f} | {r['psnr']:.2f} | {r['psnr_corrupted']:.2f} | "
            f"{r['seconds']:.1f} ({r['setup_s']:.1f}) | {r['peak_mib']:.0f} |"
        )
    lines += [
        "",
        "The authors' code on another machine: 30.8 dB (doubled pairs), 129 s, 1.4 GB.",
        "",
        "## A round on a Huber grid, float32, one core",
        "",
        "| pixels | message slots | seconds a round (range) | million messages a second | peak bytes a slot "
        "| copying the messages, s | times that |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in (r for r in rows if "side" in r):
        cells = [
            f"{r['side']} x {r['side']}",
            str(r["edges"]),
            f"{r['seconds']:.3f} ({r['seconds_min']:.3f} - {r['seconds_max']:.3f})",
            f"{r['messages_per_second'] / 1e6:.1f}",
            f"{r['peak_bytes_an_edge']:.0f}",
            f"{r['floor_s']:.4f}",
            f"{r['times_floor']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A message is two numbers, 8 bytes; the copy reads and writes each once. A round also reads the beliefs, the robust",
        "weights and the pixels, and writes the beliefs.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["bear", "huge"], help="printed, not kept")
    parser.add_argument("--rounds", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--side", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--huge-rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        kind, *rest = arguments.one
        bear(rest[0], int(rest[1])) if kind == "bear" else huge(int(rest[0]), int(rest[1]))
        return
    jobs = [["huge", str(side), str(arguments.huge_rounds)] for side in arguments.side]
    jobs = [] if arguments.only == "bear" else jobs
    if arguments.only != "huge":
        try:
            cases = bear_cases(datasets.bear()[1])
            jobs = [["bear", c, str(n)] for c in cases for n in arguments.rounds] + jobs
        except DataError as error:
            print(f"skipped: {error}")
    rows = []
    for job in jobs:  # a process for each, so that one peak does not hide another
        command = [sys.executable, __file__, "--threads", str(arguments.threads), "--one", *job]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"{job} failed:\n{out.stderr[-3000:]}")
        print(out.stdout.strip(), flush=True)
        rows.append(json.loads(out.stdout.strip().splitlines()[-1]))
    write_table("gbp_grids", table(rows), keep=not arguments.only)


if __name__ == "__main__":
    main()
