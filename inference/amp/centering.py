"""Mean removal: an equivalent problem whose matrix has row and column means of zero.

A common component of all rows or columns is one very large singular value, the commonest reason for GAMP to run
away.  Write ``A = B + g 1' + 1 c'`` with the row means ``g`` and the column means ``c`` of what remains.  Then

    z = B x + g u / a + 1 w / b,    0 = 1' x - u / a,    0 = c' x - w / b

with two more coefficients ``u, w`` of flat prior and two more outputs observed to be zero.  The scales ``a, b`` and
those of the two new rows give every new row and column the norm of an ordinary one.  Run it with vector variances:
the new coefficients and outputs have others than the ordinary ones.

Source: [Vila2015] section IV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.inference.amp.operators import Map, Operator, dense
from ppl.inference.amp.rules.priors import Gaussian
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.shapes import broadcast_shapes

_FLAT = 1e6  # variance of the new coefficients, in units of what the prior of x implies
_TIED = 1e-10  # variance of the new outputs, likewise


@dataclass(frozen=True)
class Joined(Rule):
    """Rules of consecutive blocks of the last axis, as one rule.

    >>> one, zero = torch.ones(()), torch.zeros(())
    >>> both = Joined((Gaussian(zero, one), Gaussian(one, one)), (2, 1))
    >>> both.moments(torch.zeros(3), one.expand(1)).mean
    tensor([0.0000, 0.0000, 0.5000])
    """

    rules: tuple[Rule, ...]
    sizes: tuple[int, ...]

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        """Block by block; ``vr`` has a last axis of one or of all blocks."""
        return self._joined([rule.moments(*each) for rule, each in self._blocks(r, vr)])

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        """Block by block."""
        return self._joined([rule.mode(*each) for rule, each in self._blocks(r, vr)])

    def log_prob(self, x: Tensor) -> Tensor:
        """Block by block."""
        parts = zip(self.rules, x.split(self.sizes, -1), strict=True)
        return torch.cat([rule.log_prob(part) for rule, part in parts], -1)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[*batch, sum of sizes]`` of priors."""
        pairs = [rule.prior_moments() for rule in self.rules]
        blocks = [
            [_wide(each, size) for each in pair]
            for pair, size in zip(pairs, self.sizes, strict=True)
        ]
        means, variances = zip(*blocks, strict=True)
        return _concatenated(means), _concatenated(variances)

    def _blocks(self, r: Tensor, vr: Tensor) -> list[tuple[Rule, tuple[Tensor, Tensor]]]:
        spread = (
            [vr] * len(self.sizes) if vr.shape[-1:] != r.shape[-1:] else vr.split(self.sizes, -1)
        )
        parts = zip(r.split(self.sizes, -1), spread, strict=True)
        return list(zip(self.rules, parts, strict=True))

    def _joined(self, parts: list[Moments]) -> Moments:
        columns = zip(*parts, strict=True)
        wide = (
            [_wide(each, size) for each, size in zip(column, self.sizes, strict=True)]
            for column in columns
        )
        return Moments(*(_concatenated(column) for column in wide))


@dataclass(frozen=True)
class Centered:
    """The problem with two more coefficients and two more outputs, and the way there and back."""

    operator: Operator
    shape: tuple[int, int]  # of the original
    weights: Tensor  # [2, n]: the new coefficients are weights @ x

    def prior(self, rule: Rule, mean: Tensor, variance: Tensor) -> Joined:
        """Prior of all coefficients, with the moments of the original ones ``[*batch, n]``."""
        middle, spread = self._implied(mean, variance)
        return Joined((rule, Gaussian(middle, _FLAT * spread)), (self.shape[1], 2))

    def channel(self, rule: Rule, variance: Tensor) -> Joined:
        """Channel of all outputs, for a mean prior variance of ``x [*batch, 1]``."""
        zero = torch.zeros_like(variance)
        gain = self.operator.squared_frobenius / self.shape[0]
        return Joined((rule, Gaussian(zero, _TIED * gain * variance)), (self.shape[0], 2))

    def start(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Moments ``[*batch, n + 2]`` to start from, given those of the original coefficients."""
        middle, spread = self._implied(mean, variance)
        return torch.cat([mean, middle], -1), torch.cat([variance.expand_as(mean), spread], -1)

    def _implied(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        spread = variance.expand_as(mean) @ self.weights.square().mT
        return mean @ self.weights.mT, spread.clamp(min=torch.finfo(mean.dtype).tiny)


def remove_means(operator: Operator) -> Centered:
    """The equivalent problem whose matrix has no row and column means.

    >>> remove_means(dense(torch.ones(2, 3))).operator.shape
    (4, 5)
    """
    m, n = operator.shape
    g = operator.row_means
    c = operator.column_means - g.mean()
    rest = operator.squared_frobenius - n * float(g.square().sum()) - m * float(c.square().sum())
    rest = max(rest, 1e-6 * operator.squared_frobenius)
    column, row = (rest / n) ** 0.5, (rest / m) ** 0.5  # norms of an ordinary column and row
    ones = torch.ones_like(c)
    left = torch.stack([g, torch.ones_like(g)], -1)  # [m, 2]: A = B + left @ right
    right = torch.stack([ones, c])  # [2, n]
    left_norm, right_norm = (
        left.norm(dim=0).clamp(min=1e-6 * column),
        right.norm(dim=1).clamp(min=1e-6 * row),
    )
    inward = left * (column / left_norm)  # [m, 2], columns of ordinary norm
    tie = row / right_norm  # [2]: rows of ordinary norm
    back = -tie * column / left_norm  # [2]: what the new coefficients take off the new rows
    big = _augmented(operator, left, right, inward, tie, back, rest)
    return Centered(big, operator.shape, right * (left_norm / column).unsqueeze(-1))


def _augmented(
    operator: Operator,
    left: Tensor,
    right: Tensor,
    inward: Tensor,
    tie: Tensor,
    back: Tensor,
    rest: float,
) -> Operator:
    """``[[A - left right, inward], [tie right, back]]``."""
    m, n = operator.shape
    if operator.kind == "dense":
        top = torch.cat([operator.to_dense() - left @ right, inward], -1)
        return dense(torch.cat([top, torch.cat([tie.unsqueeze(-1) * right, back.diag()], -1)]))

    def mv(x: Tensor) -> Tensor:
        old, new = x[..., :n], x[..., n:]
        scores = old @ right.mT
        top = operator.mv(old) - scores @ left.mT + new @ inward.mT
        return torch.cat([top, tie * scores + back * new], -1)

    def rmv(z: Tensor) -> Tensor:
        old, new = z[..., :m], z[..., m:]
        scores = tie * new - old @ left
        return torch.cat([operator.rmv(old) + scores @ right, old @ inward + back * new], -1)

    squares = _block_squares(
        m, n, rest, inward.square(), (tie.unsqueeze(-1) * right).square(), back.square()
    )
    total = rest + float(
        inward.square().sum() + (tie * right.norm(dim=1)).square().sum() + back.square().sum()
    )
    kind = f"centred {operator.kind}"
    return Operator((m + 2, n + 2), mv, rmv, kind, total, operator.dtype, operator.device, *squares)


def _block_squares(
    m: int, n: int, rest: float, inward: Tensor, tied: Tensor, back: Tensor
) -> tuple[Map, Map]:
    """Products with the squares: exact for what is new, the mean square for the old block.

    One variance for everything would mix the new coefficients and the noiseless outputs with the ordinary ones.
    """

    def mv(x: Tensor) -> Tensor:
        old, new = x[..., :n], x[..., n:]
        top = old.mean(-1, keepdim=True) * (rest / m) + new @ inward.mT
        return torch.cat([top, old @ tied.mT + back * new], -1)

    def rmv(z: Tensor) -> Tensor:
        old, new = z[..., :m], z[..., m:]
        left = old.mean(-1, keepdim=True) * (rest / n) + new @ tied
        return torch.cat([left, old @ inward + back * new], -1)

    return mv, rmv


def _wide(values: Tensor, size: int) -> Tensor:
    return values.expand(*values.shape[:-1], size) if values.ndim else values.expand(size)


def _concatenated(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    lead = broadcast_shapes(*(each.shape[:-1] for each in parts))
    return torch.cat([each.expand(*lead, each.shape[-1]) for each in parts], -1)
