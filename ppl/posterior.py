"""The result of ``infer``: one class for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import Bound
from ppl.diagnostics import Diagnostics, LooResult
from ppl.errors import DataError, UnsupportedError, nearest
from ppl.manifolds import manifold_of
from ppl.marginals import Marginal
from ppl.streams import Streams

if TYPE_CHECKING:
    from ppl.model import Model
    from ppl.nn.compression import Compressed
    from ppl.nn.export import Network
    from ppl.plots import Plots

Sampler = Callable[[int, Streams], Mapping[str, Tensor]]
Joints = Callable[[str], "Joint"]


class Evidence(NamedTuple):
    """Log of the probability of the data, in nats."""

    value: float
    se: float  # standard error; 0 when exact
    kind: str  # "exact", "estimate" (unbiased before the log), "bound", "Bethe" or "Laplace"

    def __str__(self) -> str:
        if not self.se > 0:  # exact, or one replicate only
            return f"{self.value:.2f} ({self.kind})"
        decimals = min(max(-math.floor(math.log10(self.se)), 0), 6)
        return f"{self.value:.{decimals}f} ± {self.se:.{decimals}f} ({self.kind})"


class Joint(NamedTuple):
    """The Gaussian of all variables that a factor touches, one for each element of its plates."""

    names: tuple[str, ...]  # of the variables; one that is touched twice stands twice
    mean: tuple[Tensor, ...]  # of each: [*plates of the factor, *event]
    covariance: Tensor  # [*plates of the factor, D, D], coordinates in the order of the names


class Independent:
    """A sampler for posteriors in which all latents are independent: each is drawn from its own marginal.

    A file of such a posterior keeps the marginals and no draws.

    Args:
        marginals: Gaussians (whole or sparse), Gaussian vectors, weighted points, or tables.

    Attributes:
        independent: a sampler that says so is replaced by this class in a file.
    """

    independent = True

    def __init__(self, marginals: Mapping[str, Marginal]) -> None:
        self.marginals = dict(marginals)

    def __call__(self, n: int, streams: Streams) -> dict[str, Tensor]:
        """``n`` draws ``[n, *plates, *event]`` of every site."""
        return {name: mg.draw(m, n, streams.of(name)) for name, m in self.marginals.items()}


class Posterior:
    """What is known after the fit. Sites are addressed by name; tensors are ``[*plates, *event]``.

    Of a site on a manifold the mean is an element of the group, ``sd`` and ``covariance`` speak of
    tangent coordinates at it, and quantiles of the numbers that an element is stored as.

    Args:
        bound: the graph and its data.
        marginals: what is known of each latent.
        method: name of the backend.
        sampler: joint draws of all latents.
        log_evidence: when the backend has one; a function where it takes work that not everybody needs.
        diagnostics: of the run.
        params: learned constants.
        seed: of the run.
        joints: the joint Gaussian of the variables that a factor touches, by its name.

    Attributes:
        method: name of the backend; ``why`` says how it was chosen.
        log_evidence: :class:`Evidence`, or None when the backend has none.
        trace: a tensor ``[steps]`` for each metric.
        diagnostics: effective sample sizes, Pareto k, convergence, warnings.
    """

    def __init__(
        self,
        bound: Bound,
        marginals: Mapping[str, Marginal],
        *,
        method: str,
        sampler: Sampler,
        log_evidence: Evidence | Callable[[], Evidence | None] | None = None,
        diagnostics: Diagnostics | None = None,
        params: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        joints: Joints | None = None,
    ) -> None:
        self.bound = bound
        self.marginals = dict(marginals)
        self.method = method
        self.why = "asked for by name"
        self._evidence = log_evidence
        self.diagnostics = diagnostics or Diagnostics({}, {}, True, 0, 0.0, (), {})
        self.trace: dict[str, Tensor] = {}
        self.params = dict(params or {})
        self.seed = seed
        self.model: Model[Any] | None = None
        self._sampler = sampler
        self._joints = joints
        self._continue: Callable[[int], Posterior] | None = None
        self._extend: Callable[..., Posterior] | None = None
        self._draws: dict[str, Tensor] | None = None
        # Means [runs, *plates, *event] in the restarts that reach the best log evidence within 3 nats, the best first.
        self.restart_means: dict[str, Tensor] = {}

    @property
    def log_evidence(self) -> Evidence | None:
        """Log of the probability of the data, where the backend has it."""
        if callable(self._evidence):
            self._evidence = self._evidence()
        return self._evidence

    # ---- marginals ------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Any:
        """The factor graph that was fitted."""
        return self.bound.graph

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Names of the elements of each plate, in the order of the tensors."""
        return self.bound.labels

    def marginal(self, name: str) -> Marginal:
        """All that is kept of one site: weighted points, a Gaussian, a sparse one, pieces, or a table."""
        if name in self.marginals:
            return self.marginals[name]
        if name in self.bound.graph.deterministics:
            draws = self._pool()[name].to(self.bound.dtype)
            even = torch.full((len(draws),), 1 / len(draws), dtype=draws.dtype, device=draws.device)
            return mg.Weighted(draws, even.reshape(-1, *(1,) * (draws.ndim - 1)))
        if name in self.params:
            return mg.Gaussian(self.params[name], torch.zeros_like(self.params[name]))
        raise self._unknown(name)

    def mean(self, name: str) -> Tensor:
        """Posterior mean."""
        return mg.mean(self.marginal(name))

    def sd(self, name: str) -> Tensor:
        """Posterior standard deviation."""
        return mg.sd(self.marginal(name))

    def covariance(self, name: str) -> Tensor:
        """Posterior covariance ``[*plates, d, d]`` of the entries of one event.

        On a manifold ``d`` counts the tangent coordinates at the mean, otherwise the entries of the
        event in row-major order.

        Raises:
            DataError: the site is discrete, or was kept entry by entry.
        """
        marginal, event = self.marginal(name), self._event_ndim(name)
        if isinstance(marginal, mg.Table) or self._is_discrete(name):
            raise DataError(f"covariance('{name}'): the site is discrete. Use probs.")
        if self._manifold(name) is not None and not isinstance(marginal, mg.JointGaussian):
            raise DataError(
                f"covariance('{name}'): {self.method} keeps no tangent coordinates. Use samples."
            )
        try:
            return mg.covariance(marginal, event)
        except ValueError as error:
            raise DataError(
                f"covariance('{name}'): {error}. Estimate it from posterior.samples(n)['{name}']."
            ) from None

    def joint(self, site: str) -> Joint:
        """The joint Gaussian of the variables that each element of a factor touches.

        Args:
            site: name of a factor, such as the observation of an edge between two poses.

        Raises:
            DataError: there is no such factor.
            UnsupportedError: the backend has no joint Gaussians.
        """
        factors = self.bound.graph.factors
        if site not in factors:
            raise DataError(
                f"joint('{site}'): no factor has that name.{nearest(site, factors)} Factors: {', '.join(factors)}."
            )
        if self._joints is None:
            raise UnsupportedError(
                f"joint('{site}'): {self.method} keeps no joint Gaussians of factors. Use samples(n), or method='gbp' "
                "or 'laplace'."
            )
        return self._joints(site)

    def quantile(self, name: str, q: float | Sequence[float] | Tensor) -> Tensor:
        """Posterior quantiles: ``[*plates, *event]`` for one level, ``[Q, *plates, *event]`` for several."""
        centre = self.mean(name)
        levels = torch.as_tensor(q, dtype=centre.dtype, device=centre.device)
        if bool(((levels < 0) | (levels > 1)).any()):
            raise DataError(f"quantile('{name}', {q}): expected levels between 0 and 1.")
        out = mg.quantile(self.marginal(name), levels.reshape(-1))
        return out[0] if levels.ndim == 0 else out

    def interval(self, name: str, mass: float = 0.9) -> Tensor:
        """Central interval ``[2, *plates, *event]`` that holds ``mass`` of the posterior."""
        return self.quantile(name, [(1 - mass) / 2, (1 + mass) / 2])

    def probs(self, name: str) -> Tensor:
        """Probabilities ``[*plates, V]`` of a discrete site's values 0, 1, ..., V-1."""
        variable = self.bound.graph.variables.get(name)
        if variable is None:
            raise self._unknown(name)
        if not variable.is_discrete:
            raise DataError(f"probs('{name}'): the site is continuous. Use mean, sd or quantile.")
        return mg.probs(self.marginal(name), variable.cardinality)

    def inclusion(self, name: str) -> Tensor:
        """Posterior probability ``[*plates, *event]`` that an element of a spike and slab is not zero.

        Raises:
            DataError: the site has no point mass at zero, or it was not kept.
        """
        found = mg.inclusion(self.marginal(name))
        if found is None:
            known = [n for n, m in self.marginals.items() if mg.inclusion(m) is not None]
            raise DataError(
                f"inclusion('{name}'): its law has no point mass at zero.{nearest(name, known)} Sites that have: "
                f"{', '.join(known) or 'none'}. Use probs('{name}') for a discrete site."
            )
        return found

    def samples(self, n: int | None = None, *, seed: int | None = None) -> dict[str, Tensor]:
        """``n`` joint draws of all latents, params and deterministic sites: ``[n, *plates, *event]`` each.

        1000 by default, 30 of a network of more than 10 000 weights.
        """
        return self._complete(self.latent_draws(n, seed=seed))

    def latent_draws(self, n: int | None = None, *, seed: int | None = None) -> dict[str, Tensor]:
        """``n`` joint draws of all latents and params, as :meth:`samples` has them, without deterministic sites."""
        from ppl.portions import draws_of

        if n is None:
            n = draws_of(self.bound, None)
        if n < 1:
            raise DataError(f"samples({n}): expected at least one draw.")
        streams = Streams(self.seed + 1 if seed is None else seed, "cpu")
        draws = dict(self._sampler(n, streams))
        # Of a model without latents there is one draw, which stands for all of them.
        count = len(next(iter(draws.values()))) if draws else 1
        return draws | {k: v.expand(count, *v.shape) for k, v in self.params.items()}

    # ---- tables ---------------------------------------------------------------------------------------------

    def summary(self, names: Sequence[str] | None = None) -> Any:
        """A :class:`~ppl.summary.Summary` of all scalars: mean, sd, quantiles, effective sample size."""
        from ppl.summary import summarise

        return summarise(self, names)

    def __str__(self) -> str:
        from ppl.summary import headline

        return headline(self)

    __repr__ = __str__

    # ---- prediction -----------------------------------------------------------------------------------------

    def predict(
        self,
        data: Any = None,
        *,
        n: int | None = None,
        sites: Sequence[str] | None = None,
        seed: int | None = None,
        **binding: Any,
    ) -> Any:
        """Draws of the observed sites for new data; see :func:`ppl.prediction.predict`."""
        from ppl.prediction import predict

        return predict(self, data, n=n, sites=sites, seed=seed, **binding)

    def forecast(
        self,
        data: Mapping[str, Any] | None = None,
        *,
        n: int = 1000,
        seed: int | None = None,
        **steps: int,
    ) -> Any:
        """Draws of the next ``steps`` elements of an ordered plate: ``forecast(year=10)``.

        ``data`` holds the covariates of the new elements, if the model reads any along the plate.
        """
        from ppl.forecasting import forecast

        return forecast(self, data, n=n, seed=seed, **steps)

    def log_likelihood(
        self, data: Any = None, *, n: int | None = None, seed: int | None = None, **binding: Any
    ) -> dict[str, Tensor]:
        """Log-likelihood ``[n, *plates]`` of every observed entry under joint posterior draws.

        ``binding``: ``sizes`` and ``labels`` of plates, as in :meth:`predict`.
        """
        from ppl.prediction import log_likelihood

        return log_likelihood(self, data, n=n, seed=seed, **binding)

    def loo(self, *, n: int = 1000, seed: int | None = None) -> LooResult:
        """Leave-one-out predictive score by Pareto-smoothed importance sampling."""
        from ppl.prediction import leave_one_out

        return leave_one_out(self, n=n, seed=seed)

    # ---- networks -------------------------------------------------------------------------------------------

    @property
    def support(self) -> dict[str, Tensor]:
        """Places ``[k]``, flat and ascending, of the weights of each layer that are not exactly zero.

        By name of the array: all places where it is dense. Of a spike and slab those that may be included.
        """
        from ppl.nn.support import support

        return support(self)

    @property
    def density(self) -> float:
        """Share of the weights of all layers that is not exactly zero; biases and norms do not count."""
        from ppl.nn.support import density

        return density(self)

    def compress(self, *, sd: bool = True, site: str | None = None) -> Compressed:
        """The network at its mean without what is zero; see :func:`ppl.nn.compression.compress`."""
        from ppl.nn.compression import compress

        return compress(self, sd=sd, site=site)

    def to_module(
        self,
        which: Literal["mean", "sample"] = "mean",
        *,
        seed: int | None = None,
        site: str | None = None,
    ) -> Network:
        """A ``torch.nn.Module`` from covariates to the arguments of the observed law, such as logits.

        Its weights are their posterior means, or one joint draw; see :func:`ppl.nn.export.to_module`.
        """
        from ppl.nn.export import to_module

        return to_module(self, which, seed=seed, site=site)

    # ---- exchangeable components ----------------------------------------------------------------------------

    def relabelled(
        self,
        components: str | None = None,
        *,
        by: str | None = None,
        n: int = 4000,
        seed: int | None = None,
    ) -> Posterior:
        """The posterior with exchangeable components numbered alike in every draw.

        The components of a mixture may be renumbered at will (label switching; the warnings say where), so that a mean of
        "component 1" over draws, or its comparison between two runs, means something only after this.

        Args:
            components: a plate, or a latent, whose elements are exchangeable; the only such ones by default.
            by: a site that ascends with the number. By default numbers are chosen so that the components of all draws
                are as alike as they can be; see :mod:`ppl.labels`.
            n: joint draws that the new posterior consists of.
            seed: of these draws.

        Raises:
            DataError: no components of the model are exchangeable, or none of that name.
        """
        from ppl.labels import relabelled

        return relabelled(self, components, by, n, seed)

    # ---- moving on ------------------------------------------------------------------------------------------

    def reweight(self, particles: int = 1000, *, seed: int | None = None) -> Posterior:
        """This posterior as the proposal of massively parallel importance weighting.

        Returns:
            A posterior with log evidence, effective sample sizes and corrected moments, whatever the backend was.

        Raises:
            UnsupportedError: the posterior gives probability zero to what the model does not.
        """
        from ppl.driver import reweight
        from ppl.portions import is_large

        if is_large(self.bound):
            raise UnsupportedError(
                "reweight: the layers of the model have more than 10 000 weights, and of importance weights of so many unknowns "
                "one outweighs all others. Judge the fit by log_likelihood of data that it has not seen."
            )
        sparse = [
            n
            for n, m in self.marginals.items()
            if isinstance(m, mg.SparseGaussian) and m.density < 1
        ]
        if sparse:
            raise UnsupportedError(
                f"reweight: the posterior has elements of '{sparse[0]}' at zero with certainty, where the model's law has a "
                "density: importance weights need a proposal that reaches all of it. Reweight a fit by method='vi'."
            )
        return reweight(self, particles, seed)

    def resume(self, iterations: int = 100) -> Posterior:
        """Run ``iterations`` more steps from where the fit ended."""
        if self._continue is None:
            raise UnsupportedError(
                "this posterior cannot be resumed: its backend does not iterate, or it was loaded from a file. "
                "Fit again with a larger max_iters, or with checkpoint= and the same file."
            )
        return self._continue(iterations)

    def extend(
        self,
        new_data: Any,
        *,
        labels: Mapping[str, Sequence[Any]] | None = None,
        sizes: Mapping[str, int] | None = None,
        along: str | None = None,
        max_iters: int | None = None,
        **options: Any,
    ) -> Posterior:
        """Continue with more data, from where the fit ended.

        Args:
            new_data: the new rows only: a mapping of arrays, a data frame, or a list of these. New
                elements stand behind the old ones in their plates; columns that point into a plate
                use positions in the grown plate, or labels.
            labels: names of new elements, where no column of the new data tells.
            sizes: of plates after they have grown, where neither arrays nor pointers tell.
            along: plate along which arrays of several plates grow, where their shapes do not tell.
            max_iters: most steps; as in the fit by default.
            **options: of the backend, such as ``lag={"time": 50}``.

        Returns:
            The posterior given all data; this one stays as it is.

        Raises:
            UnsupportedError: the backend cannot continue. ``infer(model, new_data, prior=posterior)``
                works with every backend.
            DataError: the new rows do not fit the old ones.
        """
        if self._extend is None:
            raise UnsupportedError(
                "this posterior cannot be extended: it was loaded from a file. Use infer(model, new_data, prior=posterior), "
                "which carries what it knows of each latent over to the next fit."
            )
        binding = {"labels": labels, "sizes": sizes, "along": along}
        return self._extend(new_data, binding, max_iters, options)

    # ---- out ------------------------------------------------------------------------------------------------

    def save(self, file: str | Path) -> None:
        """Write tensors and JSON, never a pickle of objects; :func:`ppl.load` reads it back."""
        from ppl.save import save

        save(self, file)

    def to_arviz(self, *, n: int = 1000) -> Any:
        """What the installed ArviZ uses: InferenceData before 1.0, a DataTree since."""
        from ppl.export import to_arviz

        return to_arviz(self, n)

    def to_frame(self) -> Any:
        """The summary as a pandas data frame."""
        from ppl.export import to_frame

        return to_frame(self)

    @property
    def plot(self) -> Plots:
        """``plot.trace()``, ``plot.forest()``, ``plot.ppc()``."""
        from ppl.plots import Plots

        return Plots(self)

    # ---- inside ---------------------------------------------------------------------------------------------

    def _pool(self) -> dict[str, Tensor]:
        if self._draws is None:
            self._draws = self.samples()
        return self._draws

    def _complete(self, known_draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws of latents and params together with what the model reports of them."""
        from ppl.simulation import Known, simulate

        draws = dict(known_draws)
        n = len(next(iter(draws.values()))) if draws else 1
        names = [d for d in self.bound.graph.deterministics if d not in draws]
        if names:
            known = {k: Known(v) for k, v in draws.items()}
            known |= {
                k: Known(v.expand(n, *v.shape))
                for k, v in self.bound.values.items()
                if self._is_observed(k)
            }
            draws |= simulate(self.bound, n, Streams(self.seed), known=known, sites=names)
        return draws

    def _event_ndim(self, name: str) -> int:
        graph = self.bound.graph
        if name in graph.variables:
            return len(graph.variables[name].event_shape)
        return len(graph.nodes[graph.factors[name].value.id].event_shape)

    def _is_discrete(self, name: str) -> bool:
        variable = self.bound.graph.variables.get(name)
        return variable is not None and variable.is_discrete

    def _manifold(self, name: str) -> Any:
        variable = self.bound.graph.variables.get(name)
        return None if variable is None else manifold_of(variable)

    def _is_observed(self, name: str) -> bool:
        return self.bound.graph.variables[name].role == "observed"

    def _unknown(self, name: str) -> DataError:
        known = [*self.marginals, *self.params, *self.bound.graph.deterministics]
        observed = name in self.bound.graph.variables
        note = " It was observed: use predict()." if observed else nearest(name, known)
        return DataError(f"the posterior has no site '{name}'.{note} Sites: {', '.join(known)}.")
