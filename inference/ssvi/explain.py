"""What ``explain`` and the result say of the sets: active weights, kernels with their measured speed, what a step costs."""

from __future__ import annotations

from collections.abc import Sequence

from ppl.inference.networks import records as networks
from ppl.inference.networks.costs import table
from ppl.inference.ssvi.patterns import KERNELS
from ppl.inference.ssvi.records import Problem, State
from ppl.inference.ssvi.schedule import is_settled
from ppl.inference.ssvi.timing import Timing


def lines(problem: Problem, state: networks.State, measured: Sequence[Timing]) -> str:
    """A line on the whole, the table of costs by layer, and one of the kernels."""
    options, plan = problem.options, problem.plan
    active, every = counted(problem, state)
    size = "as many as the evidence pays for, from " if options.density == "auto" else ""
    moves = (
        f"of which {plan.rate:.0%} move every {plan.every} steps until step {plan.until}"
        if plan.rate and problem.layers
        else "which stays as it is"
    )
    head = f"{size}{active} of {every} weights ({active / every:.3g}), a set {moves}"
    kernels = kernel_lines(problem, [t.kernel for t in measured], measured)
    return "\n".join([head, table(problem.inner, state), f"kernels: {kernels}"])


def notes(
    problem: Problem,
    best: networks.State,
    state: State,
    run: int,
    measured: Sequence[Timing],
) -> dict[str, str]:
    """What the report says beside the notes of all methods for networks."""
    active, every = counted(problem, best)
    names = [KERNELS[k] for k in state.kernels]
    found = {"active": f"{active} of {every} weights ({active / every:.3g})"}
    if problem.layers and problem.plan.rate:
        settled = "settled" if is_settled(state.still[run]) else "moving to the end"
        found["sets"] = f"{settled}; {state.new[run]:.2%} new in the last update"
    return {**found, "kernels": kernel_lines(problem, names, measured)}


def counted(problem: Problem, state: networks.State) -> tuple[int, int]:
    """Active weights, and all weights, of arrays that products multiply by."""
    inner = problem.inner
    counts, weights = networks.sizes(inner, state), inner.network.weights
    return sum(counts[i] for i in weights), sum(inner.arrays[i].size for i in weights)


def kernel_lines(problem: Problem, names: Sequence[str], measured: Sequence[Timing]) -> str:
    """The kernel of every product, with its speed where that was measured."""
    found = []
    for node, name, timing in zip(problem.inner.network.products, names, measured, strict=True):
        known = timing.kernel == name and timing.seconds == timing.seconds
        speed = (
            f" ({1e3 * timing.seconds:.2g} ms forward and back, {timing.speed:.2g} times the speed of all weights)"
            if known
            else ""
        )
        found.append(f"{node.name} {name}{speed}")
    return ", ".join(found)


__all__ = ["counted", "kernel_lines", "lines", "notes"]
