"""One iteration of the QEM authors' code, timed: the peer that ``qem_speed.py`` puts beside ours.

    $PPL_PEERS benchmarks/qem_peer.py MODEL K [--repeats 15]

Runs in an interpreter of its own (PyTorch 2.3.1 with its CUDA libraries, numpy < 2, opt_einsum: the code needs named
tensors and ``functorch.dim`` of that time). ``$PPL_ALAN`` is a clone of https://github.com/alan-ppl/alan. Models and data are
those of its own examples, at the revision named below. An iteration is what the authors time: sampling, the log
evidence, the update. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

_HEAD = "09ae599"
# model -> folder of its example, revision; the paper plots earlier revisions of bus and radon.
MODELS = {
    "bus_breakdown": ("bus_breakdown", _HEAD),
    "bus_logdelay": ("bus_breakdown", "1385e98"),
    "movielens": ("movielens", _HEAD),
    "occupancy": ("occupancy", _HEAD),
    "radon": ("radon", _HEAD),
    "radon_counties": ("radon", "1385e98"),
    "covid": ("covid", _HEAD),
    "chimpanzees": ("chimpanzees", _HEAD),
}


def extract(clone: str, revision: str, path: str, into: Path) -> None:
    """Files of one revision."""
    archive = subprocess.run(
        ["git", "-C", clone, "archive", revision, path], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "x", "-C", str(into)], input=archive, check=True)


def simulated_chimpanzees(folder: Path) -> None:
    """Data of the right shapes: the authors' repository has the model without them."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    for name in ("condition", "prosoc_left", "data"):
        for part, repeats in (("train", 10), ("test", 2)):
            rows = torch.bernoulli(torch.full((7, 6, repeats), 0.5), generator=generator)
            torch.save(rows, folder / f"{name}_{part}.pt")


def problem(model: str, folder: Path):
    """The authors' problem object."""
    name, revision = MODELS[model]
    clone = os.environ["PPL_ALAN"]
    extract(clone, revision, "src", folder)
    extract(clone, revision, f"examples/models/{name}", folder)
    example = folder / "examples" / "models" / name
    if model == "chimpanzees":
        simulated_chimpanzees(example / "data")
    sys.path.insert(0, str(folder / "src"))
    spec = importlib.util.spec_from_file_location(name, example / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module._load_and_generate_problem(
        torch.device("cpu"), "qem", 0, f"{example}/data/", False
    )
    return made[0]


def measure(model: str, k: int, repeats: int, seconds: float) -> dict[str, object]:
    """Median time of an iteration, and memory above what the problem itself takes."""
    with tempfile.TemporaryDirectory() as folder:
        made = problem(model, Path(folder))
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, log_z, begin = [], [], time.process_time()
    for i in range(repeats + 3):
        start = time.process_time()
        sample = made.sample(k, False)
        log_z.append(float(sample.elbo_nograd()))
        sample.update_qem_params(0.1)
        taken = time.process_time() - start
        if i >= 3 or taken > 1:  # the first ones of a quick model warm up
            times.append(taken)
        if times and time.process_time() - begin > seconds:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "model": model,
        "particles": k,
        "ms": 1e3 * median(times),
        "ms_min": 1e3 * min(times),
        "peak_mib": peak / 1024,
        "repeats": len(times),
        "log_z": log_z[:2],
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("particles", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20.0, help="stop after this long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        json.dumps(
            measure(arguments.model, arguments.particles, arguments.repeats, arguments.seconds)
        )
    )
