"""Vector approximate message passing for ``y ~ p(y | A x)``, ``x ~ p(x)``: exact on large matrices of any spectrum.

Expectation propagation with isotropic Gaussian messages on the chain prior - ``z = A x`` - channel.  A step asks the
prior and the channel for their moments, sends both onwards without what it had told them (the extrinsic messages),
combines the two in one linear least-squares problem, and sends that back.  With a Gaussian channel this is VAMP for
linear regression: its extrinsic message is the data and the noise precision, always.

The linear problem needs ``(A A' + c I)^-1`` alone, in the smaller of its two forms: by eigenvectors computed once, or
by conjugate gradients started from the last solution, with traces from the Lanczos picture of the spectrum.

Near the edge of what the data can tell, an undamped iteration circles around its fixed point for hundreds of steps.
So the step size follows what two successive steps say of the slope: one where the iteration creeps, less where it turns.

Sources: [Rangan2019] algorithms 2 and 3, which write the linear step with the SVD; [Schniter2016] for the channel;
[BarzilaiBorwein1988] for the step size, ``<dx, dg> / <dg, dg>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.inference.amp.evidence import (
    Message,
    linear_log_normaliser,
    map_objective,
    vamp_free_energy,
)
from ppl.inference.amp.operators import Operator
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.inference.amp.safeguards import (
    Control,
    Info,
    all_finite,
    forget_objectives,
    is_at_end,
    is_struggling,
    judge,
    select,
    start_control,
)
from ppl.inference.amp.spectrum import Spectrum

_ALPHA = 1e-10  # a message keeps at least this share of the precision, and at most one minus it
_LARGE = 1e11  # limit of a precision, in units of its prior value, and of its inverse
_WEAK = 1e-3  # precision of the first message into the prior, likewise
_RATES = (0.8, 1.0)  # of the step size after a refused and an accepted step
_TUNING = 0.15  # share, on a log scale, of the best step size of the last two steps in the next one
_LOWEST = 0.6  # to which tuning may take it; refused steps alone take it below
# Share of the posterior variance below which the two beliefs count as agreed.  Not a small one: with a channel that
# is not Gaussian they agree at first because neither knows anything, and differ more while they learn.
_NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class Problem:
    """What stays the same during a run."""

    operator: Operator
    kind: Literal["sum", "max"] = "sum"  # posterior means, or the posterior mode
    solver: Literal["factor", "cg"] = (
        "factor"  # eigenvectors once, or conjugate gradients every step
    )
    max_step: float = 1.0  # in (0, 1]: share of a new message
    min_step: float = 0.2
    cg_steps: int = 50  # at most, a step
    cg_tol: float = 1e-8  # of the residual, relative to the right-hand side

    @property
    def spectrum(self) -> Spectrum:
        """Eigenvalues behind the traces: exact if they are known, else by Lanczos."""
        return self.operator.gram.spectrum if self.solver == "factor" else self.operator.spectrum


class State(NamedTuple):
    """Four messages, the moments they lead to, and the last solution of the linear problem."""

    mean: Tensor  # [*batch, n] of x, by the prior's moments
    variance: Tensor  # [*batch, n] of x
    to_prior: Message  # n
    from_prior: Message  # n
    to_channel: Message  # m
    from_channel: Message  # m
    solution: Tensor  # [*batch, min(m, n)]: warm start of conjugate gradients
    scale: Tensor  # [*batch, 1]: prior variance of x, the unit of all limits
    kept: (
        Tensor  # [*batch, 1]: extrinsic messages of negative precision, which kept their old value
    )
    residual: (
        Tensor  # [*batch, n]: by how much to_prior.mean would have moved in the last step, undamped
    )
    used: Tensor  # [*batch, 1]: step size of the last step; 0: there was none to compare with
    control: Control


class Linear(NamedTuple):
    """Answer of the linear step: Gaussian, with one variance for all coefficients and one for all outputs."""

    mean: Tensor  # [*batch, n]
    variance: Tensor  # [*batch, 1]
    image: Tensor  # [*batch, m]
    image_variance: Tensor  # [*batch, 1]
    solution: Tensor  # [*batch, min(m, n)]


def init(problem: Problem, mean: Tensor, variance: Tensor) -> State:
    """Start from a mean and a variance of the coefficients, usually those of the prior.

    Args:
        problem: what to solve.
        mean: ``[*batch, n]``; its batch axes are those of the run.
        variance: broadcasts with ``mean``.
    """
    operator = problem.operator
    variance = variance.expand_as(mean).clone()
    scale = variance.mean(-1, keepdim=True)
    image = operator.mv(mean)
    precision = 1.0 / (scale * _gain(operator))
    return State(
        mean,
        variance,
        Message(mean, _WEAK / scale),
        Message(mean, 1.0 / scale),
        Message(image, precision),
        Message(image, precision / _LARGE),
        mean.new_zeros(*mean.shape[:-1], min(operator.shape)),
        scale,
        torch.zeros_like(scale),
        torch.zeros_like(mean),
        torch.zeros_like(scale),
        start_control(mean, problem.max_step),
    )


def step(problem: Problem, state: State, prior: Rule, channel: Rule) -> tuple[State, Info]:
    """Both separable answers, the linear one, and the messages back.

    Args:
        problem: what to solve.
        state: messages of the last step.
        prior: rule of the coefficients; may differ from step to step.
        channel: rule of the outputs, with the data; likewise.

    Source: [Schniter2016] algorithm 1; [Rangan2019] algorithm 3 where the channel is Gaussian.
    """
    tried, objective, gap = _tried(problem, state, prior, channel)
    finite = all_finite(*tried[:2], *tried.to_prior, *tried.to_channel, gap)
    bounds = (problem.min_step, problem.max_step)
    accepted, control = judge(state.control, None, gap, finite, bounds, _RATES)
    tuned = torch.where(accepted, _tuned(problem, state, tried), control.step_size)
    control = control._replace(step_size=tuned)
    kept = select(accepted, tried, state)._replace(control=control)
    moved = torch.linalg.vector_norm(tried.mean - state.mean, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(tried.mean, dim=-1, keepdim=True)
    change = moved / (state.control.step_size * length.clamp(min=torch.finfo(length.dtype).tiny))
    fields = (
        torch.where(accepted, change, torch.inf),
        objective.unsqueeze(-1),
        accepted,
        state.control.step_size,
        control.refused + kept.kept,
        is_at_end(control, problem.min_step),
        is_struggling(control),
    )
    return kept, Info(*(each.squeeze(-1) for each in fields))


def forget(state: State) -> State:
    """Forget what steps of the past are compared by: after new parameters they cannot be compared."""
    unused = torch.zeros_like(state.used)
    return state._replace(control=forget_objectives(state.control), used=unused)


def prior_input(state: State) -> tuple[Tensor, Tensor]:
    """Pseudo-observation of the coefficients ``(r, vr)``, which does not contain their prior."""
    return state.to_prior.mean, state.to_prior.precision.reciprocal()


def channel_input(state: State) -> tuple[Tensor, Tensor]:
    """Pseudo-observation of the outputs ``(p, vp)``, which does not contain their own data."""
    return state.to_channel.mean, state.to_channel.precision.reciprocal()


def _tried(
    problem: Problem, state: State, prior: Rule, channel: Rule
) -> tuple[State, Tensor, Tensor]:
    """The candidate, its objective ``[*batch]``, and the gap that the control watches ``[*batch, 1]``."""
    beta, unit = state.control.step_size, 1.0 / state.scale
    unit_z = unit / _gain(problem.operator)
    z = _answer(problem, channel, *channel_input(state))
    from_channel, lost_z = _extrinsic(
        z.mean, z.variance, state.to_channel, state.from_channel, unit_z
    )
    linear = solve_linear(problem, state.from_prior, from_channel, state.solution)
    back, lost_a = _extrinsic(linear.mean, linear.variance, state.from_prior, state.to_prior, unit)
    residual = back.mean - state.to_prior.mean
    to_prior = _damped(state.to_prior, back, beta)
    back, lost_b = _extrinsic(
        linear.image, linear.image_variance, from_channel, state.to_channel, unit_z
    )
    x = _answer(problem, prior, to_prior.mean, to_prior.precision.reciprocal())
    from_prior, lost_x = _extrinsic(x.mean, x.variance, to_prior, state.from_prior, unit)
    tried = State(
        x.mean,
        x.variance.expand_as(x.mean),
        to_prior,
        from_prior,
        _damped(state.to_channel, back, beta),
        from_channel,
        linear.solution,
        state.scale,
        state.kept + lost_x + lost_z + lost_a + lost_b,
        residual,
        beta,
        state.control,
    )
    floor = _NEGLIGIBLE * tried.variance.mean(-1, keepdim=True)
    gap = (linear.mean - x.mean).square().mean(-1, keepdim=True).maximum(floor) / state.scale
    if problem.kind == "max":
        image = problem.operator.mv(x.mean)
        return tried, map_objective(*prior_input(tried), x, channel.log_prob(image)), gap
    return tried, _free_energy(problem, tried, state, x, z, linear), gap


def _tuned(problem: Problem, state: State, tried: State) -> Tensor:
    """Step size of the next step ``[*batch, 1]``.

    A step of size ``b`` along the residual ``f`` changes it to ``f + b (J - 1) f``, for the slope ``J`` of the
    undamped iteration.  The size that would have left the least of it, ``b <f, f - f'> / |f - f'|^2``, is about
    1 where the iteration creeps (``J`` near 1 asks for more) and less where it turns (``J`` negative or complex).
    """
    beta, change = tried.used, state.residual - tried.residual
    size = change.square().sum(-1, keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)
    best = state.used * (state.residual * change).sum(-1, keepdim=True) / size
    best = torch.where(state.used > 0.0, best.clamp(min=problem.min_step), beta)
    lowest = beta.clamp(max=_LOWEST)
    return torch.maximum(beta * (best / beta) ** _TUNING, lowest).clamp(max=problem.max_step)


def _free_energy(
    problem: Problem, tried: State, state: State, x: Moments, z: Moments, linear: Linear
) -> Tensor:
    """J at the messages that this step has used."""
    normaliser = linear_log_normaliser(
        problem.operator,
        problem.spectrum,
        state.from_prior,
        tried.from_channel,
        linear.mean,
        linear.image,
    )
    at_prior = (tried.to_prior, state.from_prior, x)
    return vamp_free_energy(*at_prior, state.to_channel, tried.from_channel, z, normaliser)


def solve_linear(problem: Problem, x: Message, z: Message, start: Tensor) -> Linear:
    """Combine the messages on ``x`` and on ``z = A x``.

    With ``c = g_x / g_z``, ``mean = r_x + A' (A A' + c I)^-1 (r_z - A r_x)``, or for a tall matrix
    ``r_x + (A' A + c I)^-1 A' (r_z - A r_x)``.

    Args:
        problem: the operator, and how to solve.
        x: message on the coefficients.
        z: message on the outputs.
        start: of conjugate gradients ``[*batch, min(m, n)]``.
    """
    operator = problem.operator
    misfit = z.mean - operator.mv(x.mean)
    target = misfit if operator.is_wide else operator.rmv(misfit)
    shift = x.precision / z.precision
    if problem.solver == "factor":
        values, vectors = operator.gram
        solution = ((target @ vectors) / (values + shift)) @ vectors.mT
        left = torch.zeros_like(shift)
    else:
        solution, left = conjugate_gradients(problem, target, shift, start)
    mean = x.mean + (operator.rmv(solution) if operator.is_wide else solution)
    # For a wide matrix A mean needs no product: A A' solution = target - c solution - what is left.
    image = z.mean - shift * solution - left if operator.is_wide else operator.mv(mean)
    variance, image_variance = _variances(problem, x.precision, z.precision)
    return Linear(mean, variance, image, image_variance, solution)


def conjugate_gradients(
    problem: Problem, target: Tensor, shift: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve ``(Gram + shift) w = target`` for every batch element; returns ``w`` and the residual.

    Args:
        problem: operator, steps and tolerance.
        target: ``[*batch, min(m, n)]``.
        shift: ``[*batch, 1]``, positive.
        start: like ``target``.

    Source: [HestenesStiefel1952].
    """
    gram, tiny = problem.operator.small_gram, torch.finfo(target.dtype).tiny
    solution = start
    residual = target - gram(solution) - shift * solution
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    enough = problem.cg_tol**2 * target.square().sum(-1, keepdim=True)
    for _ in range(problem.cg_steps):
        if bool((size <= enough).all()):
            break
        image = gram(direction) + shift * direction
        length = size / (direction * image).sum(-1, keepdim=True).clamp(min=tiny)
        solution = solution + length * direction
        residual = residual - length * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + (size / before.clamp(min=tiny)) * direction
    return solution, residual


def _variances(problem: Problem, gx: Tensor, gz: Tensor) -> tuple[Tensor, Tensor]:
    """Mean posterior variance of the coefficients and of the outputs ``[*batch, 1]``."""
    m, n = problem.operator.shape
    spectrum = problem.spectrum
    inside = spectrum.sum(lambda values: 1.0 / (gz * values + gx)) + (n - min(m, n)) / gx
    outside = spectrum.sum(lambda values: values / (gz * values + gx))
    return inside / n, outside / m


def _extrinsic(
    mean: Tensor, variance: Tensor, incoming: Message, old: Message, unit: Tensor
) -> tuple[Message, Tensor]:
    """A belief without the message that came in; the old message where no proper one remains.

    With ``alpha = variance * incoming.precision``: precision ``incoming.precision (1 / alpha - 1)`` and mean
    ``(mean - alpha incoming.mean) / (1 - alpha)``, [Rangan2019] algorithm 2.  A belief wider than the incoming message
    (alpha > 1) happens with priors and channels that are not log-concave.
    """
    alpha = variance.mean(-1, keepdim=True) * incoming.precision
    proper = (alpha < 1.0).to(alpha.dtype)
    alpha = alpha.clamp(_ALPHA, 1.0 - _ALPHA)
    precision = (incoming.precision * (1.0 / alpha - 1.0)).clamp(unit / _LARGE, unit * _LARGE)
    new = Message((mean - alpha * incoming.mean) / (1.0 - alpha), precision)
    return select(proper > 0, new, old), 1.0 - proper


def _damped(old: Message, new: Message, beta: Tensor) -> Message:
    return Message(*(a + beta * (b - a) for a, b in zip(old, new, strict=True)))


def _answer(problem: Problem, rule: Rule, mean: Tensor, variance: Tensor) -> Moments:
    return rule.mode(mean, variance) if problem.kind == "max" else rule.moments(mean, variance)


def _gain(operator: Operator) -> float:
    """Mean squared norm of a row: variance of an output for coefficients of variance one."""
    return operator.squared_frobenius / operator.shape[0]
