"""What a run leaves: moments and inclusion probabilities, Bethe evidence, errors predicted and estimated, draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.diagnostics import Diagnostics
from ppl.errors import DataError, NumericalError, nearest
from ppl.inference.amp import structure as gates
from ppl.inference.amp.coefficients import Block, Params
from ppl.inference.amp.draws import drawn, slab_of
from ppl.inference.amp.elements import described
from ppl.inference.amp.forecast import predicted
from ppl.inference.amp.learning import Pseudo
from ppl.inference.amp.outcomes import Seen
from ppl.inference.amp.problem import Problem
from ppl.inference.amp.rules.mixtures import Discrete
from ppl.inference.amp.rules.priors import Gaussian, Sparse
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.inference.amp.structure import Structure, make_structure
from ppl.inference.amp.sweep import State, is_vamp, pseudo
from ppl.marginals import Marginal
from ppl.posterior import Evidence, Posterior
from ppl.streams import Streams

_MANY = 0.2  # share of refused sweeps that is worth a warning


class AMPPosterior(Posterior):
    """A posterior of message passing: independent elements given the gates.

    Means, standard deviations and quantiles are those of the law of each element given its pseudo-observation: with the
    point mass of a spike, and cut at the edges of the support.

    Attributes:
        variant: ``"gamp"`` or ``"vamp"``, and why.
        estimated_mse: by latent, mean posterior variance: what the run believes of its own squared error.
    """

    variant: str
    estimated_mse: Mapping[str, float]
    _inclusions: Mapping[str, Tensor]
    _predict_mse: Callable[[], float | None]

    def inclusion(self, name: str) -> Tensor:
        """Posterior probability ``[*plates, *event]`` that an element is not zero.

        Raises:
            DataError: the site has no point mass at zero.
        """
        if name in self._inclusions:
            return self._inclusions[name]
        if name not in self.marginals:
            raise self._unknown(name)
        known = ", ".join(self._inclusions) or "none"
        raise DataError(
            f"inclusion('{name}'): its law has no point mass at zero.{nearest(name, self._inclusions)} "
            f"Sites that have: {known}. Use probs('{name}') for a discrete site."
        )

    @cached_property
    def predicted_mse(self) -> float | None:
        """Mean squared error of the coefficients that state evolution predicts for a matrix of this size.

        It is computed from the laws alone, learned params included, not from the data; compare it with
        ``estimated_mse``. None where there is no such prediction: gates, several latents, laws that vary by element.
        """
        return self._predict_mse()


class _Best(NamedTuple):
    """The best restart by itself: every leading axis has length one."""

    params: dict[str, Tensor]
    cavities: tuple[Tensor, ...]
    at: Pseudo
    structure: Structure | None
    objective: Tensor  # [1, B]
    agreement: str


def posterior(problem: Problem, state: State) -> AMPPosterior:
    """Moments, evidence and diagnostics of the best restart."""
    with torch.no_grad():
        best = _best(problem, state)
        priors = problem.model.priors(best.params, best.cavities)
        found = _marginals(problem, best, priors)
        evidence = _evidence(problem, best, priors)
    names = [v.name for v in problem.bound.graph.latents]
    result = AMPPosterior(
        problem.bound,
        {name: found[name] for name in names},
        method="amp",
        sampler=lambda n, streams: _draws(problem, best, n, streams),
        log_evidence=evidence,
        diagnostics=_diagnostics(problem, state, best),
        params={k: v[0] for k, v in best.params.items()},
        seed=problem.settings.streams.seed,
    )
    result.variant = _variant(problem, state)
    result.estimated_mse = {n: float(mg.sd(found[n]).square().mean()) for n in names}
    result._inclusions = _inclusions(problem, best, priors)
    vamp = is_vamp(problem, state)
    result._predict_mse = lambda: predicted(problem, best.params, vamp)
    return result


def _best(problem: Problem, state: State) -> _Best:
    """The restart of the lowest free energy, and how many others agree."""
    total = state.objective.sum(1)
    total = torch.where(total.isnan(), torch.inf, total)
    i = int(total.argmin())
    near = int((total < total[i] + 3).sum())
    text = (
        f"{near} of {len(total)} restarts reach the best objective within 3 nats"
        if len(total) > 1
        else ""
    )
    one = slice(i, i + 1)
    at = pseudo(problem, state)
    own = Pseudo(*([(m[one], v[one]) for m, v in part] for part in at))
    structure = problem.model.structure
    if structure is not None and problem.restarts > 1:
        structure = make_structure(problem.bound, problem.model.linear, 1, problem.settings.memory)
    params = {k: v[one] for k, v in state.params.items()}
    cavities = tuple(c[one] for c in state.cavities)
    return _Best(params, cavities, own, structure, state.objective[one], text)


# ---- marginals ---------------------------------------------------------------------------------


def _marginals(problem: Problem, best: _Best, priors: list[Rule]) -> dict[str, Marginal]:
    found: dict[str, Marginal] = {}
    pairs = zip(problem.model.blocks, priors, best.at.blocks, strict=True)
    for block, rule, (r, vr) in pairs:
        answer = rule.mode(r, vr) if problem.options.kind == "max" else rule.moments(r, vr)
        if not bool(answer.mean.isfinite().all() & answer.variance.isfinite().all()):
            raise NumericalError(
                f"amp: '{block.mixed.latent}': no finite moments at the last accepted sweep. Scale data and priors to "
                "order one, or use damping=0.5."
            )
        found[block.mixed.latent] = _marginal(problem, block, rule, answer, r, vr)
    if best.structure is not None:
        evidence = problem.model.evidence(best.params, best.at.blocks)
        tables = gates.exchange(best.structure, best.params, evidence, sweep=1 << 30).tables
        for v in best.structure.gates:
            found[v.name] = mg.Table(_normalised(tables[v.name][0]))
    return found


def _marginal(
    problem: Problem, block: Block, rule: Rule, answer: Moments, r: Tensor, vr: Tensor
) -> Marginal:
    def shaped(x: Tensor) -> Tensor:
        return block.frame.shaped(x.expand_as(r))[0]

    latent = problem.bound.graph.variables[block.mixed.latent]
    if latent.is_discrete:
        return mg.Table(_table(rule, r, vr, shaped))
    return described(rule, answer, r, vr, shaped, is_product=bool(block.mixed.gate))


def _table(rule: Rule, r: Tensor, vr: Tensor, shaped: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(rule, Discrete):
        weight = rule.posterior(r, vr).weight
        return torch.stack([shaped(w) for w in weight.unbind(-1)], -1)
    on = shaped(rule.moments(r, vr).mean).clamp(0, 1)
    return torch.stack([1 - on, on], -1)


def _normalised(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True)


def _inclusions(problem: Problem, best: _Best, priors: list[Rule]) -> dict[str, Tensor]:
    found = {}
    pairs = zip(problem.model.blocks, priors, best.at.blocks, strict=True)
    for block, rule, (r, vr) in pairs:
        if isinstance(rule, Sparse):
            share = rule.inclusion(r, vr).expand_as(r)
            found[block.mixed.latent] = block.frame.shaped(share)[0]
    return found


# ---- evidence and diagnostics ------------------------------------------------------------------


def _evidence(problem: Problem, best: _Best, priors: list[Rule]) -> Evidence | None:
    if problem.options.kind == "max" or not bool(best.objective.isfinite().all()):
        return None
    value = -float(best.objective.sum())
    if best.structure is not None:
        # The sweep's priors stand for the gates' joint law element by element: put the joint one in their place.
        evidence = problem.model.evidence(best.params, best.at.blocks)
        joint = gates.log_evidence(best.structure, best.params, evidence)
        apart = [
            rule.moments(r, vr).log_z.expand_as(r).sum()
            for rule, block, (r, vr) in zip(
                priors, problem.model.blocks, best.at.blocks, strict=True
            )
            if block.is_gated
        ]
        value += float(joint.sum() - sum(apart))
    return Evidence(value, 0.0, "Bethe")


def _variant(problem: Problem, state: State) -> str:
    if state.switched:
        return (
            f"vamp: GAMP ran away at sweep {state.switched} and was given up ({problem.choice.why})"
        )
    name = "vamp" if is_vamp(problem, state) else "gamp"
    means = (
        ", row and column means removed" if problem.centered is not None and name == "gamp" else ""
    )
    return f"{name}: {problem.choice.why}{means}"


def _rule_names(problem: Problem, best: _Best) -> str:
    """Which scalar rule each latent and each observed site has."""
    model = problem.model
    rules = [*model.priors(best.params, best.cavities), *model.channels(best.params)]
    names = [*(b.mixed.name for b in model.blocks), *(o.site for o in model.outcomes)]
    inner = [r.rule if isinstance(r, Seen) else r for r in rules]
    return ", ".join(f"{n}: {type(r).__name__}" for n, r in zip(names, inner, strict=True))


def _diagnostics(problem: Problem, state: State, best: _Best) -> Diagnostics:
    m, n = problem.operator.shape
    notes: dict[str, object] = {
        "variant": _variant(problem, state),
        "map": f"{problem.operator.kind}, {m} rows, {n} coefficients",
        "rules": _rule_names(problem, best),
        "refused": f"{int(state.refused.max())} messages or sweeps refused",
    }
    if best.agreement:
        notes["restarts"] = best.agreement
    warnings = []
    if state.ended:
        remedy = (
            "variant='vamp' or 'auto'"
            if not is_vamp(problem, state)
            else "damping=0.5, or scaled data"
        )
        warnings.append(
            f"diverged at sweep {state.ended}: no smaller step is accepted, and this is the last accepted state. "
            f"Use {remedy}"
        )
    elif float(state.refused.max()) > _MANY * max(state.sweep, 50):
        warnings.append(
            f"{int(state.refused.max())} messages or sweeps were refused in {state.sweep} sweeps; the fixed point may be "
            "a poor approximation"
        )
    return Diagnostics({}, {}, not state.ended, state.sweep, 0.0, tuple(warnings), notes)


# ---- draws -------------------------------------------------------------------------------------


def _draws(problem: Problem, best: _Best, n: int, streams: Streams) -> dict[str, Tensor]:
    """Gates jointly, then every element given its gates."""
    generator = streams.of("elements")
    with torch.no_grad():
        chosen: dict[str, Tensor] = {}
        if best.structure is not None:
            evidence = problem.model.evidence(best.params, best.at.blocks)
            own = streams.of("gates")
            chosen = gates.draw(best.structure, best.params, evidence, n, own)
        found = {k: v.to(problem.bound.dtype) for k, v in chosen.items()}
        for block, (r, vr) in zip(problem.model.blocks, best.at.blocks, strict=True):
            value = _block_draws(block, best.params, chosen, r, vr, n, generator)
            found[block.mixed.latent] = block.frame.shaped(value)
    return {v.name: found[v.name] for v in problem.bound.graph.latents}


def _block_draws(
    block: Block,
    params: Params,
    chosen: Mapping[str, Tensor],
    r: Tensor,
    vr: Tensor,
    n: int,
    generator: torch.Generator,
) -> Tensor:
    """Draws ``[n, B, k]`` of one block."""
    e = block.elements
    if e is None:
        return drawn(block.base(params), r, vr, n, generator)[:, 0]
    values = gates.joint_values(e, chosen).reshape(n, *r.shape[1:])  # [n, B, k]
    out = torch.zeros((n, *r.shape[1:]), dtype=r.dtype, device=r.device)
    activity = block.activities(params)
    for v in range(e.combinations):
        if activity is None:
            rule = block.cases(params)[v]
        else:
            base = block.base(params)
            assert isinstance(base, Sparse)
            share = activity[..., v].expand(1, *r.shape[1:])
            rule = base.with_activity(share.logit().clamp(-700, 700))
        part = drawn(rule, r, vr, n, generator)[:, 0]
        if block.mixed.gate and activity is not None and not bool(activity[..., v].any()):
            slab = slab_of(rule)  # type: ignore[arg-type]
            assert isinstance(slab, Gaussian)
            part = drawn(slab, r, torch.full_like(vr, torch.inf), n, generator)[:, 0]
        out = torch.where(values == v, part, out)
    return out
