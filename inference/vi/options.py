"""Options of variational inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ppl.backend import refuse_idle
from ppl.errors import ModelError
from ppl.inference.networks.records import warmup_steps
from ppl.inference.particles.options import Groups, ParticleOptions

_CHOICES = {
    "family": ("mean_field", "low_rank", "full_rank"),
    "estimator": ("auto", "pathwise", "total", "natural", "local", "flipout"),
    "optimiser": ("adam", "sgd"),
    "start": ("prior", "standard"),
}
_PARALLEL_PARTICLES = 10
_DRAWS = 8
NETWORK_OPTIONS = ("momentum", "weight_decay", "augment", "initial_sd")


@dataclass(frozen=True)
class _Independent(ParticleOptions):
    """Blocks whose proposals read no others."""

    joint_chains: ClassVar[bool] = False


@dataclass(frozen=True)
class VI:
    """Variational inference: a Gaussian on the unconstrained scale, fitted by ascent of a bound on the log evidence.

    Args:
        family: ``"mean_field"``, ``"low_rank"`` (diagonal plus rank ``rank``) or ``"full_rank"``; of all latents together, or of
            each block where ``parallel``.
        rank: of ``"low_rank"``.
        estimator: ``"pathwise"``: gradient through the draws only, q's own parameters held fixed (sticking the landing; with
            several particles doubly reparameterised); ``"total"``: through draws and densities; ``"natural"``: the
            natural-gradient step IVON, for ``"mean_field"``; ``"local"``, ``"flipout"``: noise in the outputs of layers, or
            signs for every example, see below. ``"auto"``: ``"local"`` for networks, else ``"pathwise"``.
        parallel: weigh all combinations of the particles of all blocks, as QEM does; else one joint draw a particle.
        particles: of the bound: 1 is the ELBO, more tighten it (the importance-weighted bound, or the massively parallel one).
            1 by default, 10 where ``parallel``.
        draws: independent estimates of the bound that a step averages; even numbers come in antithetic pairs. 8 by default, 1
            for several particles and for networks, whose draws are all independent.
        learning_rate: of Adam or SGD, in prior standard deviations and in logs of scales; of ``"natural"`` the share of a Newton
            step. 0.05 by default, 0.1 for ``"natural"``, 0.05 for that of networks. Of networks: Adam's in units of
            ``inputs ** -0.5`` of a layer, SGD's plain.
        optimiser: ``"adam"`` or ``"sgd"``.
        settle: shrink the step when only noise is left, and average the last iterates; of networks, shrink it along a cosine
            over the run. False: a constant step.
        warmup: steps over which the weight of the KL term rises from 0 to 1; below 1 a share of the run. 0 by default, half of
            the run for networks: with the whole term from the start most units stay at the prior.
        tempering: weight of the KL term; below 1 a cold posterior. Discrete latents are not tempered.
        start: locations and units from the ``"prior"``, or ``"standard"`` Normals on the unconstrained scale.
        groups: of ``parallel``: latents that share one particle index.
        joint_up_to: of ``parallel``: largest number of scalars in an automatic block.
        enumerate_up_to: largest number of values of a discrete latent that is summed exactly.
        final_draws: for moments of latents that are not on the real line, the bound, and the diagnostics; not for networks, which
            take as many as their size allows.
        momentum: of SGD, for networks.
        weight_decay: of params in networks, added to the gradient of the loss of one example; weights with a law have none.
        augment: functions of a batch of a covariate and a generator, ``{"x": flip}``, for networks.
        initial_sd: first standard deviations of a network's weights, in units of the spread of their first means.

    **Networks.** A model whose layers read latents (:mod:`ppl.nn`) is fitted by code of its own, unless it has discrete
    latents, latents of every element of the data, another family or several particles: one draw a step, ``"local"``
    where a product of a layer is the only reader of its weights, Flipout where weights are used more than once in an
    example, and draws of whole arrays elsewhere. ``"pathwise"`` and ``"natural"`` draw all weights. N is the size of
    the data plate. A run lasts for ``max_iters`` steps, or some 20 epochs and at least 2000 steps; ``tol`` has no say.

    ``infer(..., minibatch={"row": 128})`` takes the elements of a plate in parts; latents within it are then mean-field and
    independent of the others, and their parameters move with their own elements.

    Sources: [Kucukelbir2017]; [Burda2016] (several particles); [Roeder2017], [Tucker2019] (gradients); [Shen2024] (IVON).

    >>> VI(family="full_rank").particle_count
    1
    """

    family: Literal["mean_field", "low_rank", "full_rank"] = "mean_field"
    rank: int = 10
    estimator: Literal["auto", "pathwise", "total", "natural", "local", "flipout"] = "auto"
    parallel: bool = False
    particles: int | None = None
    draws: int | None = None
    learning_rate: float | None = None
    optimiser: Literal["adam", "sgd"] = "adam"
    settle: bool = True
    warmup: float | None = None
    tempering: float = 1.0
    start: Literal["prior", "standard"] = "prior"
    groups: Groups = "auto"
    joint_up_to: int = 12
    enumerate_up_to: int = 64
    final_draws: int = 4000
    momentum: float = 0.9
    weight_decay: float = 0.0
    augment: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    initial_sd: float = 0.1

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise ModelError(
                    f"VI({option}=...): expected one of {', '.join(map(repr, choices))}, got {getattr(self, option)!r}."
                )
        for option in ("rank", "particles", "draws", "final_draws"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ModelError(
                    f"VI({option}=...): expected a whole number of at least 1, got {value!r}."
                )
        numbers = all(
            isinstance(v, (int, float)) for v in (self.rate, self.tempering, self.warmup or 0)
        )
        if not numbers or not self.rate > 0 or not self.tempering > 0 or (self.warmup or 0) < 0:
            raise ModelError(
                "VI: learning_rate and tempering are positive, warmup is not negative; got "
                f"{self.learning_rate!r}, {self.tempering!r}, {self.warmup!r}."
            )
        if not (0 <= self.momentum < 1 and self.weight_decay >= 0 and self.initial_sd > 0):
            raise ModelError(
                "VI: momentum lies in [0, 1), weight_decay is not negative and initial_sd positive; got "
                f"{self.momentum!r}, {self.weight_decay!r}, {self.initial_sd!r}."
            )
        _check_natural(self)
        _check_used(self)

    @property
    def particle_count(self) -> int:
        """Particles of the bound."""
        return self.particles or (_PARALLEL_PARTICLES if self.parallel else 1)

    @property
    def draw_count(self) -> int:
        """Estimates of the bound that a step averages."""
        return self.draws or (_DRAWS if self.particle_count == 1 else 1)

    def warmup_steps(self, steps: int, share: float = 0.0) -> int:
        """Steps with a part of the KL term only, in a run of so many; ``share`` of it by default."""
        return warmup_steps(share if self.warmup is None else self.warmup, steps)

    @property
    def rate(self) -> float:
        """The first step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.1 if self.estimator == "natural" else 0.05

    def blocks(self) -> ParticleOptions:
        """What the shared particle code needs to know."""
        return _Independent(
            particles=self.particle_count,
            groups=self.groups,
            start=self.start,
            joint_up_to=0 if self.family == "mean_field" else self.joint_up_to,
            enumerate_up_to=self.enumerate_up_to,
        )


def _check_used(options: VI) -> None:
    refuse_idle(
        options,
        rank=(options.family == "low_rank", "family='low_rank'"),
        groups=(options.parallel, "parallel=True, which has blocks"),
        joint_up_to=(
            options.parallel and options.family != "mean_field",
            "parallel=True with family='low_rank' or 'full_rank'",
        ),
        momentum=(options.optimiser == "sgd", "optimiser='sgd'"),
    )


def _check_natural(options: VI) -> None:
    if options.estimator != "natural":
        return
    wrong = {
        "family": options.family != "mean_field",
        "particles": options.particle_count != 1,
        "parallel": options.parallel,
        "optimiser": options.optimiser != "adam",
    }
    if any(wrong.values()):
        names = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
        raise ModelError(
            f"VI(estimator='natural') is the natural-gradient step of a mean-field Gaussian with one particle, and has a step of "
            f"its own; it does not go with the given {names}. Average draws with draws=..., or take estimator='pathwise'."
        )
