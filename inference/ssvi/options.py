"""Options of sparse subspace variational inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ppl.backend import refuse_idle
from ppl.errors import ModelError
from ppl.inference.ssvi.scores import REMOVAL
from ppl.inference.ssvi.structured import Sets

Estimators = Literal["auto", "local", "flipout", "sampling", "natural"]
_RATES = {
    "adam": (0.05, 0.05),
    "sgd": (0.01, 0.01),
    "natural": (0.05, 0.05),
}  # of means, of raw scales
_BATCHES_OF_EVIDENCE = 4  # from which the noise of a gradient is known

_CHOICES: dict[str, tuple[Any, ...]] = {
    "budgets": ("uniform", "erk", "global"),
    "estimator": get_args(Estimators),
    "removal": tuple(REMOVAL),
    "addition": ("gradient", "t_like", "evidence"),
    "rejoin": ("zero", "value"),
    "at": ("draw", "mean"),
    "sets": get_args(Sets),
    "prior_inputs": ("active", "all"),
    "kernel": ("auto", "csr", "dense"),
    "optimiser": ("adam", "sgd"),
    "schedule": ("cosine", "constant"),
    "fresh": ("median", "mean", "tiny", "initial"),
}


@dataclass(frozen=True)
class SSVI:
    """Sparse subspace variational inference: Gaussians on a small set of weights, which moves while they are fitted.

    All other weights are zero, and nothing is stored for them. Now and then the weights that matter least leave the set, and
    those with the largest gradient enter it. Biases, norms, weights of lifted modules and latents that are no weights are
    outside the budget and always active.

    Args:
        density: share of the weights that is active; or ``"auto"``: every weight that the evidence pays for, from 0.1 on.
        budgets: ``"erk"``: layers with few inputs and outputs are denser; ``"uniform"``: one density, but a small first layer is
            dense and a small last layer denser; ``"global"``: starts as ``"erk"``, then one threshold over all layers.
        output: of ``"uniform"``: factor on the density of a small last layer.
        dense: names of layers that keep all weights, beside the budget.
        estimator: ``"auto"`` or ``"local"``: local reparameterisation, and Flipout where it does not apply; ``"flipout"``;
            ``"sampling"``: one weight draw a step; ``"natural"``: the natural-gradient step IVON at weight draws.
        removal: score by which weights leave: ``"snr"``, ``"magnitude"``, ``"mean_abs"``, ``"second_moment"``, ``"mean_exp"``,
            ``"snr_exp"``, ``"evidence"``, ``"random"``; ``"snr_abs"`` is another name of ``"snr"``, whose order it has.
        addition: ``"gradient"``: its size; ``"t_like"``: in standard errors over ``batches``; ``"evidence"``: the gain promised.
        at: gradients at a posterior ``"draw"`` or at the ``"mean"``.
        rejoin: how weights that have just left compete with all others: by their gradient at ``"zero"``, as these do, found from
            their values and curvatures; or by that at their ``"value"``, next to none where they fit, as in [Li2024].
        batches: that the gradient is averaged over; 1 by default, 4 where its noise must be known.
        rate: share of a set that is replaced at the first update; 0: a static random set.
        every: steps between updates; by default a fortieth of the run, at least 20, at most 100.
        until: share of the run after which sets stay.
        sets: what is active as a whole: a ``"weight"``; ``"neuron"``: an input unit or channel; ``"output"``: an output unit or
            channel, of all layers but the last; ``"channel"``: an input channel of convolutions; ``"kernel"`` of a convolution;
            ``"block"``.
        block: of ``"block"``: output units and inputs.
        fresh: scale of new weights: the ``"median"`` of their layer, the ``"mean"`` of its raw parameters, ``"tiny"`` (1e-6) or
            ``"initial"``.
        kernel: of linear layers: ``"csr"`` (compressed rows), ``"dense"``, or ``"auto"``: what a timing at the start finds
            faster. Results differ by rounding.
        prior_inputs: laws of variance ``1 / inputs`` (:func:`ppl.nn.fan_in`, the default of layers, and :func:`ppl.nn.laplace`)
            count the ``"active"`` inputs that units have at the start, or ``"all"``.
        prior_inclusion: of ``density="auto"``: prior probability that a weight is active. A ``spike_slab`` prior has its own.
        learning_rate: of means, and but for ``"natural"`` of params. Of Adam in units of ``inputs ** -0.5`` with the inputs that
            units have at the start, 0.05 by default; of SGD plain, 0.01; of ``"natural"`` the share of a Newton step, 0.05.
        scale_rate: of raw scales: 0.05 for Adam, 0.01 for SGD.
        optimiser: ``"adam"`` or ``"sgd"``.
        momentum: of SGD.
        weight_decay: of params, which have no prior.
        schedule: of rates: ``"cosine"`` or ``"constant"``.
        warmup: steps over which the weight of the KL term rises; below 1 a share of the run, half of it by default: with the
            whole term from the start most units stay at the prior.
        tempering: weight of the KL term; below 1 a cold posterior.
        draws: that a step averages.
        initial_mean: spread of the first means; by default from the number of inputs that units really have.
        initial_sd: first scales, in units of that spread; smaller where noise would be more than 5 % of a layer's outputs.
        augment: functions of a covariate's batch and a generator, ``{"x": flip}``.

    Sources: [Li2024]; [Shen2024] (IVON); [Mocanu2018], [Evci2020] (ERK).

    >>> SSVI(density=0.05).rates
    (0.05, 0.05)
    """

    density: float | Literal["auto"] = 0.1
    budgets: Literal["uniform", "erk", "global"] = "erk"
    output: float = 4.0
    dense: tuple[str, ...] = ()
    estimator: Estimators = "auto"
    removal: str = "snr"
    addition: Literal["gradient", "t_like", "evidence"] = "gradient"
    at: Literal["draw", "mean"] = "draw"
    rejoin: Literal["zero", "value"] = "zero"
    batches: int | None = None
    rate: float = 0.5
    every: int | None = None
    until: float = 0.75
    sets: Sets = "weight"
    block: tuple[int, int] = (16, 16)
    fresh: Literal["median", "mean", "tiny", "initial"] = "median"
    kernel: Literal["auto", "csr", "dense"] = "auto"
    prior_inputs: Literal["active", "all"] = "active"
    prior_inclusion: float = 0.5
    learning_rate: float | None = None
    scale_rate: float | None = None
    optimiser: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.5
    tempering: float = 1.0
    draws: int = 1
    initial_mean: float | None = None
    initial_sd: float = 0.1
    augment: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise ModelError(
                    f"SSVI({option}=...): expected one of {', '.join(map(repr, choices))}, got {getattr(self, option)!r}."
                )
        _check_numbers(self)
        _check_together(self)

    @classmethod
    def paper(cls, **changes: Any) -> SSVI:
        """The settings of the public code of [Li2024] for CIFAR; the model needs ``prior=nn.isotropic(0.005), bias=nn.point()``.

        Differs: first scales are 6e-4 for all weights, not drawn around it; means have the KL term alone, and no weight
        decay beside it, which would be a second prior.

        >>> SSVI.paper(density=0.05).tempering
        0.01
        """
        output = 1.0 if changes.get("budgets", "uniform") == "uniform" else cls.output
        settings = cls(
            density=0.1, budgets="uniform", output=output, estimator="local", removal="snr_abs", rate=0.3, prior_inputs="all",
            every=100, fresh="mean", rejoin="value", learning_rate=0.01, scale_rate=0.01, optimiser="sgd", weight_decay=5e-4,
            warmup=0.5, tempering=0.01, initial_mean=0.01, initial_sd=0.06,
        )  # fmt: skip
        return replace(settings, **changes)

    @property
    def is_natural(self) -> bool:
        """Whether steps are IVON's."""
        return self.estimator == "natural"

    @property
    def rates(self) -> tuple[float, float]:
        """First rates of means and of raw scales."""
        kind = "natural" if self.is_natural else self.optimiser
        mean, scale = _RATES[kind]
        mean = mean if self.learning_rate is None else self.learning_rate
        return mean, scale if self.scale_rate is None else self.scale_rate

    @property
    def batch_count(self) -> int:
        """Batches that a growth gradient is averaged over."""
        if self.batches is not None:
            return self.batches
        return _BATCHES_OF_EVIDENCE if self.needs_noise else 1

    @property
    def needs_noise(self) -> bool:
        """Whether growth compares gradients with their noise."""
        return self.addition != "gradient" or self.density == "auto"

    @property
    def is_shared(self) -> bool:
        """Whether layers have no budgets of their own."""
        return self.budgets == "global" or self.density == "auto"


def _check_numbers(options: SSVI) -> None:
    _check_range(options, "density", options.density == "auto" or _in(options.density, 0, 1))
    for option in ("rate", "until"):
        value = getattr(options, option)
        _check_range(options, option, value == 0 or _in(value, 0, 1))
    inclusion = options.prior_inclusion
    _check_range(options, "prior_inclusion", _in(inclusion, 0, 1) and inclusion != 1)
    for option in (
        "learning_rate",
        "scale_rate",
        "initial_mean",
        "initial_sd",
        "tempering",
        "output",
    ):
        value = getattr(options, option)
        known = value is None or (isinstance(value, (int, float)) and value > 0)
        _check_range(options, option, known, "a positive number")
    for option in ("batches", "every", "draws"):
        value = getattr(options, option)
        known = value is None or (isinstance(value, int) and value >= 1)
        _check_range(options, option, known, "a whole number of at least 1")
    momentum = options.momentum
    _check_range(
        options,
        "momentum",
        momentum == 0 or _in(momentum, 0, 1) and momentum != 1,
        "a share below 1",
    )
    for option in ("warmup", "weight_decay"):
        value = getattr(options, option)
        _check_range(options, option, isinstance(value, (int, float)) and value >= 0, "0 or more")


def _in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low < value <= high


def _check_range(
    options: SSVI, option: str, is_known: bool, what: str = "a share, at most 1"
) -> None:
    if not is_known:
        raise ModelError(f"SSVI({option}=...): expected {what}, got {getattr(options, option)!r}.")


def _check_together(options: SSVI) -> None:
    if options.is_shared and options.sets != "weight":
        raise ModelError(
            f"SSVI(sets={options.sets!r}): groups of weights have a budget in every layer. Take budgets='erk' or 'uniform' and a "
            "density, or sets='weight'."
        )
    if options.batches == 1 and options.needs_noise:
        raise ModelError(
            "SSVI(batches=1): the noise of a gradient is not known from one batch, and addition='t_like' or 'evidence' and "
            "density='auto' need it. Take batches=2 or more."
        )
    _check_used(options)


def _check_used(options: SSVI) -> None:
    """Refuse what another option leaves without a say."""
    default = {f.name: f.default for f in fields(options)}
    natural = [
        n for n in ("optimiser", "momentum", "scale_rate") if getattr(options, n) != default[n]
    ]
    if options.is_natural and natural:
        raise ModelError(
            f"SSVI(estimator='natural', {natural[0]}=...): the natural-gradient step is an optimiser of its own. Leave "
            f"{natural[0]} out."
        )
    free = [
        n for n in ("removal", "addition") if getattr(options, n) not in (default[n], "evidence")
    ]
    if options.density == "auto" and free:
        raise ModelError(
            f"SSVI(density='auto', {free[0]}={getattr(options, free[0])!r}): where the evidence decides how many weights there "
            f"are, it decides which. Leave {free[0]} out, or give a density."
        )
    refuse_idle(
        options,
        output=(options.budgets == "uniform", "budgets='uniform'"),
        block=(options.sets == "block", "sets='block'"),
        momentum=(options.optimiser == "sgd", "optimiser='sgd'"),
        prior_inclusion=(options.density == "auto", "density='auto'"),
        kernel=(options.sets not in ("neuron", "output"), "sets that are no whole units"),
    )


__all__ = ["SSVI", "Estimators"]
