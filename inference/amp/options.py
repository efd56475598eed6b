"""Options of AMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ppl.errors import ModelError


@dataclass(frozen=True)
class AMP:
    """Approximate message passing for one linear map between a separable prior and separable outcomes.

    Args:
        variant: ``"gamp"`` (two products with the matrix a sweep; right for i.i.d.-like matrices), ``"vamp"`` (any
            spectrum, at the price of a factorisation or of conjugate gradients), or by a probe of the spectrum.
        kind: posterior means (``"sum"``) or the posterior mode (``"max"``: Lasso and its relatives).
        variances: of GAMP: one for all coefficients, or one each (needs the squares of the matrix); one each where
            latents of different priors stand beside each other, by default.
        solver: of VAMP: eigenvectors of the smaller Gram matrix once, or conjugate gradients every sweep.
        damping: share of the old messages that is kept, 0 to 1; a little where EM or gates change the priors on the way,
            none elsewhere, by default. The step control damps more where it has to.
        means: of GAMP: ``"remove"`` row and column means of the matrix by two more unknowns, ``"keep"`` them, or as
            the probe says.
        learn: whether EM learns the params of the model, or the names of those it learns.
        learn_from: sweep after which EM starts.
        start: of the params: as the model ``"given"`` them, or read off the ``"data"``, which a sparse regression of
            unknown scale wants: noise of 20 dB, sparsity by the phase transition, the prior's scale by the size of the
            responses; for probit, logistic and ordinal outcomes by a predictor of three times the noise of the link,
            for counts by their logarithms.
        tolerance: relative change of the mean below which a run has converged; ``infer(tol=)`` overrides it. With neither
            set, a run also ends when its evidence has stayed within a tenth of a nat for twenty sweeps.
        switch: go over to VAMP when GAMP runs away, with the switch named in the result.
        turbo: share of the new log-odds that gates (group bits, chains) send back in a sweep, 0 to 1.

    Source: [Rangan2011] (GAMP), [Rangan2019] (VAMP), [Vila2015] (damping, step control, mean removal), [Vila2013] (EM and
        its start), [Schniter2010] (turbo).
    """

    variant: Literal["auto", "gamp", "vamp"] = "auto"
    kind: Literal["sum", "max"] = "sum"
    variances: Literal["auto", "scalar", "vector"] = "auto"
    solver: Literal["auto", "factor", "cg"] = "auto"
    damping: float | None = None
    means: Literal["auto", "keep", "remove"] = "auto"
    learn: bool | Sequence[str] = True
    learn_from: int = 3
    start: Literal["given", "data"] = "given"
    tolerance: float = 1e-5
    switch: bool = True
    turbo: float = 0.7

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join(map(repr, allowed))
                raise ModelError(
                    f"AMP({name}=...): expected one of {shown}, got {getattr(self, name)!r}."
                )
        if self.damping is not None and not 0 <= self.damping < 1:
            raise ModelError(f"AMP(damping=...): expected 0 <= damping < 1, got {self.damping!r}.")
        if not 0 < self.turbo <= 1:
            raise ModelError(f"AMP(turbo=...): expected 0 < turbo <= 1, got {self.turbo!r}.")
        if not self.tolerance > 0 or self.learn_from < 1:
            raise ModelError(
                "AMP: expected a positive tolerance and learn_from of at least 1, got "
                f"tolerance={self.tolerance!r}, learn_from={self.learn_from!r}."
            )

    def learns(self, name: str) -> bool:
        """Whether EM learns a param.

        >>> AMP(learn=["noise"]).learns("rho")
        False
        """
        return self.learn if isinstance(self.learn, bool) else name in self.learn


_CHOICES = {
    "variant": ("auto", "gamp", "vamp"),
    "kind": ("sum", "max"),
    "variances": ("auto", "scalar", "vector"),
    "solver": ("auto", "factor", "cg"),
    "means": ("auto", "keep", "remove"),
    "start": ("given", "data"),
}
