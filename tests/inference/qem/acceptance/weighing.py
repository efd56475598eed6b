"""One E-step of the code under test, laid out for the enumeration oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams
from tests.inference.qem.acceptance import enumeration as en

# The settings of [Heap2025]: products of Normals from N(0, 1), no bridge.
PLAIN: dict[str, Any] = {"start": "standard", "joint_up_to": 0, "bridge": False}


class EStep(NamedTuple):
    """What the code under test made of a structure, and the enumeration of the same particles."""

    problem: Any
    q: Any
    here: Any  # evaluated log-densities
    axes: dict[str, en.Axis]
    index: dict[str, np.ndarray]  # axis -> [n, *plates]
    values: dict[str, np.ndarray]  # latent -> [*plates, K]
    log: np.ndarray  # log weight of every index tuple, [n]

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights of the index tuples."""
        return en.normalised(self.log)

    @property
    def factors(self):
        """Log-factors of the contraction."""
        return self.here.factors()

    @property
    def plan(self):
        """The contraction plan."""
        return self.problem.weighting.plan

    def marginals(self):
        """Log evidence and weights of all particles by the code under test."""
        found = weigh(self.here)
        return float(found.log_z), {a: w.numpy() for a, w in found.marginals.items()}


def e_step(
    structure: en.Structure,
    particles: int | Mapping[str, int],
    *,
    joint: bool = False,
    seed: int = 0,
    **settings: Any,
) -> EStep:
    """Draw particles from random proposals, weigh them, and enumerate the same sum."""
    options = QEM(
        **{**PLAIN, "joint_up_to": 6 if joint else 0},
        particles=particles,
        groups=structure.groups,
    )
    bound = structure.program.bind(structure.data)
    problem = prepare(bound, options, Settings(Streams(seed), **settings))
    q = scattered(init(problem).q, seed, problem.blocks)
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    here = evaluated(problem, problem.weighting, drawn, q)
    axes, values, log_q = {}, {}, {}
    for block in problem.blocks:
        k = problem.weighting.sizes[block.axis]
        plates = structure.plates[block.names[0]]
        axes[block.axis] = en.Axis(block.names, plates, k, block.enumerated)
        if block.enumerated:
            values[block.names[0]] = np.broadcast_to(np.arange(float(k)), (*plates, k))
            continue
        for name in block.names:
            values[name] = drawn[block.axis].values[name].numpy()
        free = np.stack([values[m.name] for m in block.gaussian], -1)
        log_q[block.axis] = proposal_density(q.proposals[block.axis].joint, free, is_path(block))
    index = en.index_tuples(axes)
    data = {n: np.asarray(v) for n, v in structure.data.items()}
    log = en.log_weights(axes, index, values, log_q, lambda z: structure.log_joint(z, data))
    return EStep(problem, q, here, axes, index, values, log)


def is_path(block: Any) -> bool:
    """Whether the states of a chain are proposed given the ones before."""
    return block.chain is not None and block.form is not None


def proposal_density(joint: Any, free: np.ndarray, path: bool) -> np.ndarray:
    """Of particles ``[*plates, K, D]`` by scipy."""
    mean, cov = joint.mean.numpy(), joint.cov.numpy()
    if path:
        return en.log_gauss_markov(mean, cov, free)
    full = cov.ndim > mean.ndim
    return (en.log_joint_normal if full else en.log_product_normal)(mean, cov, free)


def scattered(q: Any, seed: int, blocks: Any) -> Any:
    """Proposals with random means and spreads, so that no element or block is like another."""
    generator = torch.Generator().manual_seed(seed + 17)
    made = {}
    for block in blocks:
        if block.enumerated:
            continue
        proposal = q.proposals[block.axis]
        mean, cov = proposal.joint.mean, proposal.joint.cov
        shift = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        if cov.ndim > mean.ndim:
            root = 0.6 * torch.randn(cov.shape, generator=generator, dtype=mean.dtype)
            cov = root @ root.mT + 0.5 * cov
        else:
            cov = (0.3 * torch.randn(cov.shape, generator=generator, dtype=mean.dtype)).exp()
        if is_path(block):  # nothing stands before the first state
            d = mean.shape[-1] // 2
            cov[..., 0, :d, d:] = cov[..., 0, d:, :d] = 0.0
        joint = proposal.joint._replace(mean=0.5 * shift, cov=cov)
        made[block.axis] = proposal._replace(joint=joint)
    return q._replace(proposals=made)
