"""Bayesian networks beside plain ones.

    python benchmarks/networks step_time
    python benchmarks/networks uci [--sets boston yacht] [--splits 5] [--methods "vi" "ssvi 0.1"]
    python benchmarks/networks images [--sets mnist] [--nets mlp] [--size ci|cpu|full] [--methods "ssvi 0.05"]
    python benchmarks/networks cifar [--size ci|full] [--device cuda]

Every run is a line in ``results/networks_*.jsonl``; what is kept there is not run again, so that an interrupted table goes on
where it stopped (``--fresh`` forgets it). Tables are written to ``results/networks_*.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.networks import cifar, images, step_time, uci  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"networks_{options.table}"
    file = options.output / f"{name}.jsonl"
    if options.fresh:
        file.unlink(missing_ok=True)
    text = _table(options, file)
    head = f"`{' '.join(['python benchmarks/networks', *(arguments or sys.argv[1:])])}`"
    threads = f"torch {torch.__version__}, {options.threads} of {os.cpu_count()} cores"
    written = f"# {_TITLES[options.table]}\n\n{head}, {threads}\n\n{text}\n"
    name += f"_{options.size}" if options.table in ("images", "cifar") else ""
    (options.output / f"{name}.md").write_text(written, encoding="utf-8")
    print("\n" + text)


_TITLES = {
    "step_time": "What does a step cost?",
    "uci": "Regression: nine sets with their standard splits",
    "images": "Images: accuracy, likelihood, calibration and density",
    "cifar": "CIFAR-10 (JPEG q75)",
}


def _table(options: argparse.Namespace, file: Path) -> str:
    if options.table == "step_time":
        return step_time.run(file)
    if options.table == "uci":
        chosen = options.methods or [uci.PLAIN, *uci.METHODS]
        return uci.run(options.sets or uci.UCI, chosen, options.splits, file)
    if options.table == "images":
        return images.run(
            options.sets or list(images.SETS),
            options.nets,
            options.methods,
            options.size,
            file,
            options.device,
        )
    return cifar.run(options.methods, options.size, file, options.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/networks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("table", choices=list(_TITLES))
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--nets", nargs="+", default=list(images.NETS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--size", default="ci", choices=["ci", "cpu", "full"])
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
