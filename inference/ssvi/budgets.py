"""How many weights of each layer are active.

``uniform`` gives layers one density, ``erk`` more to layers with few inputs and outputs; both are fixed for a run. Where a
budget is shared (``"global"``) or found from the data (``density="auto"``) they say where the run starts.

Sources: [Li2024] (uniform); [Mocanu2018] and [Evci2020] section 3 (ERK).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_SMALL = 0.01  # share of the weights that a layer may have to stay dense for being the first
_OUTPUT = 4.0  # an output layer that small is kept at so many times the density


def uniform(
    shapes: Sequence[tuple[int, ...]], density: float, output: float = _OUTPUT
) -> list[int]:
    """One density for all layers, but a small first layer is dense and a small output layer denser.

    The exceptions come on top: they are for layers with at most 1 % of the weights, so that the density of the whole stays within
    a few per cent.

    Args:
        shapes: ``(outputs, inputs, *kernel)`` of the layers, inputs first.
        density: share of the weights.
        output: factor on the density of the last layer, where it is small.

    >>> uniform([(64, 3, 3, 3), (512, 512, 3, 3), (10, 512)], 0.1)
    [1728, 235930, 2048]
    """
    sizes = [math.prod(s) for s in shapes]
    small = [n <= _SMALL * sum(sizes) for n in sizes]
    densities = [density] * len(sizes)
    if len(sizes) > 1 and small[-1]:
        densities[-1] = min(1.0, output * density)
    if len(sizes) > 1 and small[0]:
        densities[0] = 1.0
    return [_count(d, n) for d, n in zip(densities, sizes, strict=True)]


def erk(shapes: Sequence[tuple[int, ...]], density: float) -> list[int]:
    """Numbers in proportion to ``outputs + inputs + kernel``, none above the layer's size, ``density`` in all.

    >>> erk([(256, 784), (256, 256), (10, 256)], 0.05)
    [7688, 3785, 1966]
    """
    sizes = [math.prod(s) for s in shapes]
    total = density * sum(sizes)
    sums = [float(sum(s)) for s in shapes]
    full: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in full]
        left = total - sum(sizes[i] for i in full)
        scale = left / sum(sums[i] for i in free) if free else 0.0
        over = {i for i in free if scale * sums[i] > sizes[i]}
        if not over:
            break
        full |= over
    counts = [float(sizes[i]) if i in full else scale * sums[i] for i in range(len(sizes))]
    return [max(1, min(n, round(c))) for n, c in zip(sizes, counts, strict=True)]


def _count(density: float, size: int) -> int:
    return max(1, min(size, round(density * size)))
