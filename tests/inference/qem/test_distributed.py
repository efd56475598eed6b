"""A plate spread over two processes: the result of one, to rounding, with one all-reduce a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppl
from ppl import Normal, UnsupportedError, infer, latent, model, observe, plate

PROGRAM = """
import json, sys, warnings
import torch, torch.distributed as dist
from ppl import HalfNormal, Normal, Poisson, given, infer, latent, model, observe, plate
warnings.simplefilter("ignore")

calls, reduce = [], dist.all_reduce
def counted(*a, **k):
    calls.append(1)
    return reduce(*a, **k)
dist.all_reduce = counted

@model
def schools():
    level = latent("level", Normal(0.0, 3.0))
    spread = latent("spread", HalfNormal(2.0))
    school = plate("school")
    with school:
        effect = latent("effect", Normal(level + given("size"), spread))
    with plate("pupil", within=school):
        observe("y", Normal(effect, 1.0))

g = torch.Generator().manual_seed(1)
n = 37
school = torch.cat([torch.arange(n), torch.randint(0, n, (80,), generator=g)])
size = torch.randn(n, generator=g, dtype=torch.float64)
effect = 1.0 + size + torch.randn(n, generator=g, dtype=torch.float64)
y = effect[school] + torch.randn(len(school), generator=g, dtype=torch.float64)
marks = []
posterior = infer(
    schools, {"school": school, "size": size, "y": y}, method="qem", seed=0, particles=20,
    max_iters=25, tol=0, final_particles=20, replicates=2, distribute="school", progress=False,
    callbacks=[lambda p: marks.append(len(calls))],
)
run = posterior._continue.__self__
local = run.state.q.proposals["k:effect"].joint.mean.shape[0]
result = {
    "mean": {n: posterior.mean(n).tolist() for n in ("level", "spread", "effect")},
    "log_evidence": posterior.log_evidence.value,
    "trace": posterior.trace["log_evidence"][-3:].tolist(),
    "reduced": [b - a for a, b in zip(marks[-4:], marks[-3:])],
    "local": local,
}
with open(sys.argv[1] + f".{dist.get_rank()}", "w") as f:
    json.dump(result, f)
dist.destroy_process_group()
"""


def start(folder: Path, processes: int) -> subprocess.Popen:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(ppl.__file__).absolute().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(program), str(folder / str(processes))]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_find_what_one_finds(tmp_path):
    runs = [start(tmp_path, n) for n in (1, 2)]
    for run in runs:
        out, _ = run.communicate(timeout=120)
        assert run.returncode == 0, out
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("1.0", "2.0", "2.1")
    )
    assert first["mean"] == second["mean"]  # gathered: both have all of it
    assert one["local"] == 37 and first["local"] + second["local"] == 37
    for name, value in one["mean"].items():
        torch.testing.assert_close(
            torch.tensor(first["mean"][name]), torch.tensor(value), rtol=1e-9, atol=1e-9
        )
    assert first["trace"] == pytest.approx(one["trace"], rel=1e-9)
    assert first["log_evidence"] == pytest.approx(one["log_evidence"], rel=1e-9)
    assert first["reduced"] == [1, 1, 1]


@model
def groups():
    level = latent("level", Normal(0.0, 3.0))
    with plate("group"):
        observe("y", Normal(latent("effect", Normal(level, 1.0)), 1.0))


def test_one_process_alone_is_told_how_to_start_more(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UnsupportedError, match="torchrun --nproc-per-node 2"):
        infer(groups, {"y": torch.zeros(4)}, method="qem", distribute="group")
