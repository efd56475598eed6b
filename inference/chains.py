"""Log-sums over all paths of a Markov chain of particle indices, and joint draws of paths.

Shapes: ``first [*outer, S]`` is the log-factor of the first state, ``unary [*outer, T, S]`` one of
every state, ``step [*outer, T - 1, S, S]`` of a state given the one before it (previous, current).
Outer dimensions broadcast, so a factor that does not depend on one has length 1 there.

Source: forward filtering and backward sampling, [Bishop2006] section 13.2.2; the product of
transfer matrices in a tree is [Sarkka2021] section III.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl.inference.logspace import draw_categorical, log_matmul, log_sum, log_sum_product

_PRODUCT_ELEMENTS = 100_000  # joint entries above which a scan step is a matrix product


def filtered(first: Tensor, unary: Tensor, step: Tensor | None) -> list[Tensor]:
    """Forward messages: log of the sum over earlier states, for each t a tensor ``[*outer, S]``."""
    units = unary.unbind(-2)
    messages = [first + units[0]]
    if step is None:
        return messages
    for move, unit in zip(step.unbind(-3), units[1:], strict=True):
        messages.append(_advance(messages[-1], move) + unit)
    return messages


def _advance(message: Tensor, move: Tensor) -> Tensor:
    states = move.shape[-1]
    shared = move.numel() == states * states  # the same transition for every outer element
    if shared and message.numel() * states > _PRODUCT_ELEMENTS:
        flat = log_matmul(message.reshape(-1, states), move.reshape(states, states))
        return flat.reshape(message.shape)
    return log_sum_product(message.unsqueeze(-1), move, (-2,))


def with_leave(step: Tensor | None, leave: Tensor | None) -> Tensor | None:
    """Transitions with the factors of the state before in them."""
    return step if step is None or leave is None else step + leave.unsqueeze(-1)


def tree(first: Tensor, unary: Tensor, step: Tensor | None) -> Tensor:
    """Log of the sum over all paths, ``[*outer]``, by matrix products in a tree of depth log2 T.

    >>> tree(torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, 2, 2)).exp()
    tensor(8.)
    """
    start = first + unary[..., 0, :]
    if step is None or not step.shape[-3]:
        return log_sum(start, (-1,))
    moves = step + unary[..., 1:, None, :]
    while (count := moves.shape[-3]) > 1:
        paired = log_matmul(moves[..., 0 : count - 1 : 2, :, :], moves[..., 1:count:2, :, :])
        moves = torch.cat([paired, moves[..., count - 1 :, :, :]], -3) if count % 2 else paired
    return log_sum(log_matmul(start.unsqueeze(-2), moves[..., 0, :, :]).squeeze(-2), (-1,))


def draw_backward(
    messages: list[Tensor],
    into: Callable[[int, Tensor], Tensor],
    n: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw whole paths: the last state from its message, then each state given the one after it.

    Args:
        messages: of ``filtered`` with outer axes indexed away, T tensors ``[1 or n, *plates, S]``.
        into: ``into(t, state)`` gives the log-factor ``[n, *plates, S]`` of the state at t - 1
            given the drawn ``state [n, *plates]`` at t.
        n: number of paths.
        generator: source of randomness.

    Returns:
        Long ``[n, *plates, T]``.
    """
    path = [draw_categorical(messages[-1], n, generator)]
    for t in range(len(messages) - 1, 0, -1):
        path.append(draw_categorical(messages[t - 1] + into(t, path[-1]), n, generator))
    return torch.stack(path[::-1], -1)
