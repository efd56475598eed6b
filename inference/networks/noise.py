"""Random numbers of a step as functions of the seed, the run and the number of the step: a run continues bit for bit.

A weight draw needs a Gaussian number for every weight, which takes a third of the time of a gradient. Beyond 2^16
weights they are therefore read from a table of twice as many, made anew every 64 steps, from a place that is drawn in
every step. Within a step all numbers are independent; between steps of one table a number comes back at another weight.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ppl.inference.networks.records import Problem, State

_FEW = 2**16  # numbers that are drawn anew in every step
_BLOCK = 64  # steps that read one table


def generator_of(problem: Problem, state: State, draw: int = 0) -> Generator:
    """The generator of one draw of one step."""
    return _seeded(problem, state.step, state.run, draw + 1)


def standard_noise(problem: Problem, state: State, generator: Generator, count: int) -> Tensor:
    """Standard Normal numbers ``[count]``; they are read only."""
    like = state.raw
    if count <= _FEW:
        return like.new_empty(count).normal_(generator=generator)
    block = state.step // _BLOCK
    key = (block, count)
    known = problem.table.get(state.run)
    if known is None or known[0] != key:
        source = _seeded(problem, block, state.run, 0)
        known = (key, like.new_empty(table_size(count)).normal_(generator=source))
        problem.table[state.run] = known
    at = int(torch.randint(count, (), generator=generator, device=like.device))
    return known[1][at : at + count]


def table_size(count: int) -> int:
    """Numbers that are kept from step to step for draws of ``count``."""
    return 2 * count if count > _FEW else 0


def _seeded(problem: Problem, number: int, run: int, kind: int) -> Generator:
    mixed = problem.seed
    for part in (number, run, kind):
        mixed = (mixed * 0x5851F42D4C957F2D + part + 0x14057B7EF767814F) % 2**63
        mixed ^= mixed >> 31
    return torch.Generator(problem.bound.device).manual_seed(mixed)


__all__ = ["generator_of", "standard_noise", "table_size"]
