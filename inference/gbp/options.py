"""Options of Gaussian belief propagation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ppl.backend import refuse_idle
from ppl.errors import ModelError, nearest

Schedule = Literal["auto", "flood", "sweep", "tree", "layers", "residual", "random", "attention"]
_CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": (
        "auto",
        "flood",
        "sweep",
        "tree",
        "layers",
        "residual",
        "random",
        "attention",
    ),
    "matching": ("gradient", "energy"),
    "variance": ("auto", "gbp", "check", "exact"),
    "form": ("auto", "innovation", "schur"),
}


@dataclass(frozen=True)
class GBP:
    """Gaussian belief propagation on linearised factors.

    Args:
        schedule: order of updates. ``flood``: all factors from the last round's beliefs; ``sweep``: site after site, along
            ordered plates forwards and backwards; ``tree``: from the leaves of a spanning tree to its root and back (exact
            on trees; also the choice for small pose graphs, where most variables have no factor of their own); ``layers``: sites
            in program order up and down; ``residual``: the share ``active`` of rows whose messages change most;
            ``random``: every row with probability ``active``; ``attention``: only ``rows``.
        active: share of rows updated in a round by ``residual`` and ``random``, in (0, 1].
        rows: masks of the rows that ``attention`` updates, by site, bool ``[*plates]``; other sites rest.
        damping: share of the old message kept, in [0, 1); by default 0 (0.1 once the means swing to and fro), and 0.4
            where factors on several variables are nonlinear and the schedule is not ``tree``.
        dropout: probability in [0, 1) that a message keeps its old value in a round.
        relinearise: when nonlinear factors move: ``1``: every round (or every so many), ``"jit"``: each row when its
            variables have moved, ``"outer"``: all, when the linear problem has converged.
        threshold: of ``"jit"``, in standard deviations of the beliefs.
        min_linear: of ``"jit"``: rounds between two moves of a row.
        undamped: rounds after a move in which a row's messages are not damped.
        proximal: a unary factor around the current means with this share of the assembled curvature; by default 1e-6 where
            nonlinear factors join variables that no prior places (pose graphs), and 0 elsewhere.
        cure: restart with more damping, then with a proximal factor, when the messages diverge.
        matching: robust weights by the slope of the loss (``"gradient"``: iteratively reweighted least squares) or by its
            height (``"energy"``: other fixed points, those of the published methods).
        graduated: start robust thresholds this many times too wide and shrink them (graduated non-convexity). By default
            10 where a kernel is not convex (40 for a truncated one by slope), and 1 (not at all) elsewhere.
        graduated_steps: number of rounds until they have their own width.
        variance: ``"gbp"``: of the messages, wrong on loopy graphs, mostly too small; ``"check"``: these, with their measured
            ratio to exact ones; ``"exact"``: by a sparse solve; ``"auto"``: exact where that takes a second or two.
        start: first values by latent, ``[*plates, *event]``; prior means by default.
        form: of a factor's messages; ``"innovation"`` is safe in float32, ``"schur"`` admits improper cavities.

    Source: [Ortiz2021]; robust and nonlinear factors [Ortiz2020]; defaults measured on the problems of the tests.

    >>> GBP(damping=0.4).schedule
    'auto'
    """

    schedule: Schedule = "auto"
    active: float = 0.1
    rows: Mapping[str, Any] | None = None
    damping: float | None = None
    dropout: float = 0.0
    relinearise: int | Literal["auto", "jit", "outer"] = "auto"
    threshold: float = 0.1
    min_linear: int = 8
    undamped: int = 6
    proximal: float | None = None
    cure: bool = True
    matching: Literal["gradient", "energy"] = "gradient"
    graduated: float | None = None
    graduated_steps: int = 60
    variance: Literal["auto", "gbp", "check", "exact"] = "auto"
    start: Mapping[str, Any] | None = None
    form: Literal["auto", "innovation", "schur"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ModelError(
                    f"GBP({name}=...): expected one of {', '.join(choices)}, got {value!r}."
                    f"{nearest(str(value), choices)}"
                )
        self._check_ranges()
        if self.schedule == "attention" and not self.rows:
            raise ModelError("GBP(schedule='attention'): say which rows: rows={'site': mask}.")
        jit = (self.cure or self.relinearise in ("auto", "jit"), "relinearise='jit'")
        refuse_idle(
            self,
            active=(self.schedule in ("residual", "random"), "schedule='residual' or 'random'"),
            rows=(self.schedule == "attention", "schedule='attention'"),
            threshold=jit,
            min_linear=jit,
            graduated_steps=(self.graduated != 1, "graduated above 1"),
        )

    def _check_ranges(self) -> None:
        ranges = {"damping": (0.0, 1.0), "dropout": (0.0, 1.0), "proximal": (0.0, float("inf"))}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value < high:
                raise ModelError(
                    f"GBP({name}=...): expected {low} <= {name} < {high}, got {value!r}."
                )
        if self.graduated is not None and not self.graduated >= 1:
            raise ModelError(
                f"GBP(graduated=...): expected a factor of at least 1, got {self.graduated!r}."
            )
        if not self.graduated_steps >= 1:
            raise ModelError(
                f"GBP(graduated_steps=...): expected at least 1, got {self.graduated_steps!r}."
            )
        if not 0 < self.active <= 1:
            raise ModelError(f"GBP(active=...): expected 0 < active <= 1, got {self.active!r}.")
        whole = isinstance(self.relinearise, int) and self.relinearise >= 1
        if not whole and self.relinearise not in ("auto", "jit", "outer"):
            raise ModelError(
                "GBP(relinearise=...): expected 'auto', 'jit', 'outer' or a number of rounds, "
                f"got {self.relinearise!r}."
            )


__all__ = ["GBP"]
