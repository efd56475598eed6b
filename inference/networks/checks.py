"""What stops a run: a loss, a gradient or a state that is no number, and a loss that runs away; the layer it began in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from ppl.batches import Batch
from ppl.errors import NumericalError
from ppl.inference.networks.forward import Wrap, callables, values_of
from ppl.inference.networks.noise import generator_of
from ppl.inference.networks.records import Problem, State, sds, slices
from ppl.inference.networks.slopes import drawn
from ppl.inference.networks.structure import ProductNode

_AWAY = 1e4  # times the first loss, and nats for an example
_HELP = "The last good state is kept: lower learning_rate, raise warmup, or look at the data of that batch."


def check_loss(problem: Problem, state: State, batch: Batch | None, loss: float) -> None:
    """Refuse a loss that is no number, or has run away from the first.

    Raises:
        NumericalError: it names the first layer whose output is not finite.
    """
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss is {loss}{_of_part(batch)}: {_first_layer(problem, state, batch)}. {_HELP}"
        )
    if state.step and loss > _AWAY * (abs(state.first) + 1.0):
        raise NumericalError(
            f"the loss runs away: {loss:.3g} nats an example, {state.first:.3g} in the first step; the largest weights are those "
            f"of '{_largest(problem, state)}'. {_HELP}"
        )


def refuse_step(
    problem: Problem, state: State, batch: Batch | None, mean: Tensor, raw: Tensor
) -> NoReturn:
    """Name the array whose step is no number.

    Raises:
        NumericalError: always.
    """
    for array, where in zip(problem.arrays, slices(problem, state), strict=True):
        if not bool(mean[where].isfinite().all()) or not bool(raw[where].isfinite().all()):
            raise NumericalError(
                f"the gradient of '{array.name}' is not finite{_of_part(batch)}. {_HELP}"
            )
    names = ", ".join(v.name for v in problem.params)
    raise NumericalError(
        f"the gradient of the params ({names}) is not finite{_of_part(batch)}. {_HELP}"
    )


def _of_part(batch: Batch | None) -> str:
    return "" if batch is None else f" on part {batch.part} of plate '{batch.plate}'"


def _largest(problem: Problem, state: State) -> str:
    tops = [
        float(state.mean[w].abs().max()) if w.stop > w.start else 0.0
        for w in slices(problem, state)
    ]
    return problem.arrays[max(range(len(tops)), key=tops.__getitem__)].name


def _first_layer(problem: Problem, state: State, batch: Batch | None) -> str:
    """Evaluate the step once more, and look at what goes into and comes out of every layer."""
    for array, where in zip(problem.arrays, slices(problem, state), strict=True):
        if not bool(state.mean[where].isfinite().all()):
            return f"the weights '{array.name}' are not finite"
    seen: list[str] = []
    tops: dict[str, float] = {}
    for number in range(problem.rule.draws):
        _again(problem, state, batch, number, _looked_at(seen, tops))
        if seen:
            return seen[0]
    largest = max(tops, key=tops.__getitem__, default="none")
    size = f", the largest of layer '{largest}' ({tops[largest]:.3g})" if tops else ""
    return f"all outputs of layers are finite{size}, the likelihood is not"


def _looked_at(seen: list[str], tops: dict[str, float]) -> Wrap:
    """Adds to ``seen`` what is not finite, and to ``tops`` the largest outputs of every layer."""

    def wrap(node: ProductNode, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def checked(x: Tensor, *bias: Tensor) -> Tensor:
            if not bool(x.isfinite().all()):
                seen.append(f"what layer '{node.name}' gets is not finite")
            y = run(x, *bias)
            if not bool(y.isfinite().all()):
                seen.append(f"the first output that is not finite is that of layer '{node.name}'")
            tops[node.name] = float(y.detach().abs().max()) if y.numel() else 0.0
            return y

        return checked

    return wrap


@torch.no_grad()
def _again(problem: Problem, state: State, batch: Batch | None, number: int, wrap: Wrap) -> None:
    """A draw of the step, with the noise that it had."""
    generator = generator_of(problem, state, number)
    draw = drawn(problem, state, sds(problem, state), generator)
    values = values_of(problem, state, draw)
    functions = callables(problem, state, draw, generator, wrap)
    problem.program({**values, **functions}, batch, problem.rule.augment, generator)


__all__ = ["check_loss", "refuse_step"]
