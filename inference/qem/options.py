"""Options of QEM, and the step sizes that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppl.errors import ModelError
from ppl.inference.particles.options import ParticleOptions, Start, is_number


@dataclass(frozen=True)
class QEM(ParticleOptions):
    """Expectation maximisation on massively parallel importance weights.

    Args:
        step: share of the new moments in the average: ``"schedule"``, a constant, or a function of the iteration.
        bridge: temper the posterior while its effective sample size is low.
        variance_correction: divide variances by ``1 - sum(w^2)``; helps with few particles, hurts elsewhere.
        stratified: particles within plates, where a few for each of many elements must do, are drawn one from each of as many
            shares of their proposal: less noise at the same cost. False draws them one by one, as the source does; by default
            that goes with the bridge.
        distribute: a plate whose elements are spread over the processes of ``torch.distributed``, started by torchrun.
        **others: those of :class:`ParticleOptions`: ``particles``, ``groups``, ``q``, ``start``, ``joint_up_to``,
            ``paths_up_to``, ``enumerate_up_to``, ``final_particles``, ``tails``, ``replicates``, ``chains``.

    Source: [Heap2025]; the bridge, joint blocks and stratified particles [McKay1979] are additions.
    """

    start: Start = "auto"
    step: str | float | Any = "schedule"
    bridge: bool = True
    variance_correction: bool = False
    stratified: bool | None = None
    distribute: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = callable(self.step) or is_number(self.step)
        if not known and self.step != "schedule":
            raise ModelError(
                f"QEM(step=...): expected 'schedule', a number in (0, 1] or a function, got {self.step!r}."
            )
        if isinstance(self.step, (int, float)) and not 0 < self.step <= 1:
            raise ModelError(f"QEM(step=...): a constant step lies in (0, 1], got {self.step!r}.")
        for option in ("bridge", "variance_correction", "stratified"):
            value = getattr(self, option)
            if not isinstance(value, bool) and (option, value) != ("stratified", None):
                raise ModelError(f"QEM({option}=...): expected True or False, got {value!r}.")
        if not (self.distribute is None or isinstance(self.distribute, str)):
            raise ModelError(
                f"QEM(distribute=...): expected the name of a plate, got {self.distribute!r}."
            )

    def stratifies(self, plates: Sequence[str]) -> bool:
        """Within plates: the noise of many elements adds up in what they say of the rest.

        >>> QEM().stratifies(("school",)), QEM().stratifies(())
        (True, False)
        """
        asked = self.bridge if self.stratified is None else self.stratified
        return asked and bool(plates)

    @property
    def wants_sites(self) -> bool:
        """Where the weights may be tempered, and neither counts nor proposals were chosen by hand."""
        chosen = self.particles is not None or self.distribute is not None
        return self.bridge and self.joint_up_to > 0 and not chosen

    def step_at(self, t: int) -> float:
        """Share of the new moments at iteration ``t`` = 0, 1, ... since the bridge was crossed.

        The default falls as ``t^-0.6``, so that the variance of the average falls with it (Theorem 1 of [Heap2025]),
        between a cap that keeps a bad start from making the proposal a near point mass and a floor.

        >>> [round(QEM().step_at(t), 3) for t in (0, 10, 1000)]
        [0.3, 0.205, 0.016]
        """
        if callable(self.step):
            asked = float(self.step(t))
            if not 0 < asked <= 1:
                raise ModelError(
                    f"QEM(step=...): a step lies in (0, 1], the function gave {asked!r} at {t}."
                )
            return asked
        if isinstance(self.step, str):
            return min(max((t + 4.0) ** -0.6, 0.01), 0.3)
        return float(self.step)
