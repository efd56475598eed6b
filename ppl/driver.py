"""``infer``: the one loop that drives every backend. Seeding, stopping, progress, checkpoints and errors live here."""

from __future__ import annotations

import copy
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ppl import backend as backends
from ppl.backend import Info, Reason, Settings
from ppl.batches import batches_of
from ppl.binding import Bound, Missing
from ppl.continual import with_prior
from ppl.errors import (
    DataError,
    ModelError,
    NumericalError,
    UnsupportedError,
    nearest,
    trim_traceback,
)
from ppl.graph import Graph
from ppl.growth import grown
from ppl.labels import report as label_report
from ppl.model import Model
from ppl.posterior import Posterior
from ppl.streams import Streams, isolated

_WINDOW = 20  # steps in a block of the stop rule


class Stop:
    """What a callback returns to end the run."""


class Progress(NamedTuple):
    """What a callback sees after each step."""

    iteration: int
    metrics: Mapping[str, float]
    seconds: float


Callback = Callable[[Progress], Any]


def infer(
    model: Model[Any],
    data: Any = None,
    *,
    method: Any = "auto",
    seed: int | None = None,
    prior: Posterior | None = None,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    minibatch: Mapping[str, int] | None = None,
    restarts: int = 1,
    max_iters: int | None = None,
    tol: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    missing: Missing = "marginalise",
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Posterior:
    """Fit a model to data.

    Args:
        model: what ``@model`` made.
        data: mapping of arrays, data frame, xarray Dataset, or a list of these.
        method: name of a backend, its options record, or ``"auto"``.
        seed: of every random number of the run; without one, a draw from torch's global generator.
        prior: a posterior that replaces the laws of the latents it knows (continual learning), see
            :mod:`ppl.continual`.
        sizes: of plates that no array shows.
        labels: names of the elements of plates.
        minibatch: number of elements of a plate used in a step, ``{"user": 1000}``; see :mod:`ppl.batches`.
        restarts: independent runs, batched; the best one is kept.
        max_iters: most steps; the backend's own limit by default.
        tol: of the stop rule: change of block means, in posterior standard deviations (0.1 by default; 0 never stops).
        device: where to run; that of the data by default.
        dtype: of the run. By default float64; float32 for networks whose data is float32.
        memory: budget for the largest arrays, in bytes or as text (``"4GiB"``).
        missing: what to do with NaN in observed sites: ``"marginalise"`` or ``"error"``.
        progress: whether to print a line; by default when the terminal is interactive.
        callbacks: called with a :class:`Progress` after each step; one that returns :class:`Stop` ends the run.
        checkpoint: file that the state is written to now and then; an existing one is continued.
        **options: of the backend.

    Returns:
        The posterior. Not converging is a field of its diagnostics and one warning, never an error.

    Raises:
        ModelError: the program is wrong.
        DataError: the data does not fit it.
        UnsupportedError: the backend cannot fit this model; every reason is listed.
        NumericalError: a step produced something impossible.

    >>> @model
    ... def coin():
    ...     bias = latent("bias", Beta(2.0, 2.0))
    ...     with plate("toss"):
    ...         observe("heads", Bernoulli(bias))
    >>> posterior = infer(coin, {"heads": [1, 1, 0, 1]}, method="exact")
    >>> round(float(posterior.mean("bias")), 4)
    0.625
    """
    _check_model(model)
    try:
        binding: dict[str, Any] = {"sizes": sizes, "labels": labels, "missing": missing}
        bound = _bound(model, data, prior, dtype=dtype, device=device, **binding)
        method, why = _choose(bound, options) if method == "auto" else (method, "asked for by name")
        name, backend, record = backends.resolve(method, options)
        if dtype is None and backends.runs_in_single(backend, bound, record):
            bound = _bound(model, data, prior, dtype=torch.float32, device=device, **binding)
        lacking = [
            *backends.sparse_reasons(backend, bound),
            *backends.network_reasons(backend, bound.graph, bound.columns),
        ]
        _check_supported(name, [*backend.supports(bound.graph), *lacking])
        streams = Streams(seed, bound.device)
        _check_stop(max_iters, tol)
        settings = Settings(streams, _restarts(restarts), _bytes(memory), max_iters, tol, minibatch)
        run = _Run(
            model,
            name,
            why,
            backend,
            record,
            settings,
            bound,
            progress,
            tuple(callbacks),
            checkpoint,
        )
        return run.fit()
    except (ModelError, DataError, UnsupportedError) as error:
        raise trim_traceback(error) from None


def explain(
    model: Model[Any],
    data: Any = None,
    *,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    memory: int | str | None = None,
) -> Explanation:
    """Which methods can fit the model, and why the others cannot; nothing is run.

    Without data only the structure counts; with data each method also says what it would do, and its cost.

    >>> @model
    ... def pick_one():
    ...     latent("x", Normal(0.0, 1.0))
    >>> {"exact", "qem"} <= set(explain(pick_one).usable)
    True
    """
    _check_model(model)
    bound = None
    if data is not None or sizes is not None or labels is not None:
        bound = model.bind(data, sizes=sizes, labels=labels, need_observed=False)
    graph = bound.graph if bound is not None else model.graph()
    rows = [_explained(name, graph, bound, memory) for name in backends.names()]
    return Explanation(tuple(rows), str(graph))


def _explained(name: str, graph: Graph, bound: Bound | None, memory: int | str | None) -> Explained:
    backend = backends.load(name)
    known = () if bound is None else bound.columns
    reasons = [*backend.supports(graph), *backends.network_reasons(backend, graph, known)]
    note = ""
    if bound is not None:
        reasons = [*reasons, *backends.sparse_reasons(backend, bound)]
    if not reasons and bound is not None and hasattr(backend, "describe"):
        settings = Settings(Streams(0, bound.device), memory=_bytes(memory))
        try:
            note = backend.describe(bound, backend.Options(), settings)
        except UnsupportedError as error:
            reasons = [Reason("", str(error))]
    return Explained(name, not reasons, tuple(reasons), note)


class Explained(NamedTuple):
    """One method: whether it can run, why not, and what it would do."""

    method: str
    usable: bool
    reasons: tuple[Reason, ...]
    note: str


@dataclass(frozen=True)
class Explanation:
    """The table of :func:`explain`; ``print`` it."""

    rows: tuple[Explained, ...]
    graph: str = field(repr=False, default="")

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of the methods that can run."""
        return tuple(r.method for r in self.rows if r.usable)

    def __str__(self) -> str:
        lines = [f"{'method':<8} {'usable':<6}  why"]
        for row in self.rows:
            notes = (row.note or "every factor has a rule").splitlines()
            texts = [str(r) for r in row.reasons] or notes
            lines.append(f"{row.method:<8} {'yes' if row.usable else 'no':<6}  {texts[0]}")
            lines += [" " * 17 + t for t in texts[1:]]
        return "\n".join(lines)


def reweight(posterior: Posterior, particles: int, seed: int | None) -> Posterior:
    """Importance weighting with a posterior as proposal, by the backend that owns it."""
    module = backends.load("qem")
    streams = Streams(posterior.seed if seed is None else seed, posterior.bound.device)
    with isolated(streams.seed):
        return module.reweight(posterior, particles, streams)  # type: ignore[attr-defined]


class _Run:
    """One fit: the loop, and what is kept of it."""

    def __init__(
        self,
        model: Model[Any],
        name: str,
        why: str,
        backend: backends.Backend,
        options: Any,
        settings: Settings,
        bound: Bound,
        progress: bool | None,
        callbacks: tuple[Callback, ...],
        checkpoint: str | Path | None,
    ) -> None:
        self.model, self.name, self.why, self.backend, self.settings, self.bound = (
            model,
            name,
            why,
            backend,
            settings,
            bound,
        )
        self.options, self.callbacks = options, callbacks
        self.line = _Line(name, progress)
        self.problem = backend.prepare(bound, options, settings)
        self.batches = batches_of(bound, settings.minibatch, settings.streams)
        self.limit: int = settings.max_iters or int(getattr(self.problem, "max_iters", 1))
        self.rule = _StopRule(0.1 if settings.tol is None else settings.tol)
        self.iteration, self.seconds, self.saved = 0, 0.0, 0.0
        self.metrics: dict[str, list[float]] = {}
        self.ended = ""
        self.file = Path(checkpoint) if checkpoint is not None else None
        with isolated(settings.streams.seed):
            self.state = backend.init(self.problem)
            self._restore()

    def fit(self) -> Posterior:
        with isolated(self.settings.streams.seed + 1 + self.iteration):
            self._loop()
            posterior = self.backend.posterior(self.problem, self.state)
        return self._finished(posterior)

    def _loop(self) -> None:
        start, before = time.perf_counter(), self.seconds
        self.ended = ""
        try:
            while not self.ended:
                if self.iteration >= self.limit:
                    self.ended = "limit"
                    break
                self.state, info = self._step()
                self.iteration += 1
                self.seconds = before + time.perf_counter() - start
                self._note(info)
        except KeyboardInterrupt:
            self.ended = "interrupted"
        finally:
            self.line.close()
            self._write(force=True)

    def _step(self) -> tuple[Any, Info]:
        try:
            batch = None if self.batches is None else self.batches.at(self.iteration)
            return self.backend.step(self.problem, self.state, batch)
        except torch.linalg.LinAlgError as error:
            raise NumericalError(
                f"{self.name}, step {self.iteration + 1}: {error}. Scale the data to order one, or give vague priors a scale."
            ) from error
        except NumericalError as error:
            raise NumericalError(f"{self.name}, step {self.iteration + 1}: {error}") from error

    def _note(self, info: Info) -> None:
        for key, value in info.metrics.items():
            self.metrics.setdefault(key, []).append(value)
        self.line.show(self.iteration, self.limit, info.metrics, self.seconds)
        seen = Progress(self.iteration, info.metrics, self.seconds)
        stopped = [c for c in self.callbacks if _is_stop(c(seen))]
        if info.done or self.rule.settled(info):
            self.ended = "converged"
        elif stopped:
            self.ended = "callback"
        self._write()

    def _finished(self, posterior: Posterior) -> Posterior:
        posterior.model, posterior.why, posterior.seed = (
            self.model,
            self.why,
            self.settings.streams.seed,
        )
        posterior.trace = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.metrics.items()}
        posterior._continue, posterior._extend = self._more, self._extended
        found = posterior.diagnostics
        notes = list(found.warnings)
        if self.ended == "interrupted":
            notes.insert(
                0, f"interrupted after {self.iteration} iterations; this is the state so far"
            )
        elif self.ended == "limit" and self.limit > 1:
            notes.insert(
                0,
                f"not converged after {self.iteration} iterations; continue with posterior.resume(100)",
            )
        seen, labels = label_report(posterior)
        posterior.diagnostics = replace(
            found,
            converged=self.ended == "converged" and found.converged,  # a backend may also give up
            iterations=self.iteration,
            seconds=self.seconds,
            warnings=(*notes, *labels),
            notes={**found.notes, **seen},
        )
        if notes:
            warnings.warn(f"{self.name}: " + "; ".join(notes), stacklevel=4)
        return posterior

    def _more(self, iterations: int) -> Posterior:
        self.limit = self.iteration + iterations
        self.rule = _StopRule(self.rule.tol)
        return self.fit()

    def _extended(
        self,
        data: Any,
        binding: Mapping[str, Any],
        max_iters: int | None,
        options: Mapping[str, Any],
    ) -> Posterior:
        """A run on more data that starts from the state of this one, which stays as it is."""
        try:
            extend = getattr(self.backend, "extend", None)
            if extend is None:
                raise UnsupportedError(
                    f"{self.name} cannot continue a fit with more data. Use infer(model, new_data, method='{self.name}', "
                    "prior=posterior), which carries what is known of each latent over to the next fit."
                )
            _check_options(self.name, extend, options)
            _check_stop(max_iters, None)
            run = copy.copy(self)
            run.bound = grown(self.model, self.bound, data, **binding)
            _check_supported(self.name, self.backend.supports(run.bound.graph))
        except (ModelError, DataError, UnsupportedError) as error:
            raise trim_traceback(error) from None
        run.problem = self.backend.prepare(run.bound, self.options, self.settings)
        run.batches = batches_of(run.bound, self.settings.minibatch, self.settings.streams)
        given = max_iters or self.settings.max_iters
        run.limit = given or int(getattr(run.problem, "max_iters", 1))
        run.rule, run.metrics, run.file = _StopRule(self.rule.tol), {}, None
        run.iteration, run.seconds, run.saved = 0, 0.0, 0.0
        with isolated(self.settings.streams.seed + 2 + self.iteration):
            run.state = extend(self.problem, self.state, run.problem, **options)
        return run.fit()

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def _write(self, force: bool = False) -> None:
        if self.file is None or not (force or self.seconds - self.saved > 10):
            return
        self.saved = self.seconds
        leaves, _ = tree_flatten(self.state)
        content = {
            "fingerprint": self.bound.graph.fingerprint(),
            "method": self.name,
            "leaves": leaves,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "streams": self.settings.streams.state(),
            "seed": self.settings.streams.seed,
        }
        partial = self.file.with_suffix(self.file.suffix + ".part")
        torch.save(content, partial)
        partial.replace(self.file)

    def _restore(self) -> None:
        if self.file is None or not self.file.exists():
            return
        content = torch.load(self.file, weights_only=True)
        if (
            content.get("fingerprint") != self.bound.graph.fingerprint()
            or content.get("method") != self.name
        ):
            raise DataError(
                f"checkpoint '{self.file}' belongs to another model or method. Name another file, or delete this one."
            )
        _, spec = tree_flatten(self.state)
        self.state = tree_unflatten(content["leaves"], spec)
        self.iteration, self.seconds, self.metrics = (
            content["iteration"],
            content["seconds"],
            content["metrics"],
        )
        self.settings.streams.restore(content["streams"])


class _StopRule:
    """Converged when the watched quantities' means over two successive blocks of steps agree.

    Each quantity is measured in its own posterior standard deviation; their root mean square must fall below ``tol``.
    Block means are compared, not single steps, so that Monte Carlo noise neither stops a run nor keeps it going.
    """

    def __init__(self, tol: float) -> None:
        self.tol = tol
        self.seen: list[Tensor] = []

    def settled(self, info: Info) -> bool:
        if info.watch is None or not info.ready:
            self.seen.clear()
            return False
        self.seen.append(info.watch)
        if len(self.seen) < 2 * _WINDOW:
            return False
        self.seen = self.seen[-2 * _WINDOW :]
        early, late = (
            torch.stack(part).mean(0) for part in (self.seen[:_WINDOW], self.seen[_WINDOW:])
        )
        change = (late - early) if info.unit is None else (late - early) / info.unit
        return bool(change.square().mean().sqrt() < self.tol)


class _Line:
    """One line of text that is rewritten; silent when not asked for or not at a terminal."""

    def __init__(self, name: str, wanted: bool | None) -> None:
        self.name = name
        self.on = sys.stderr.isatty() if wanted is None else wanted
        self.last = 0.0
        self.width = 0

    def show(
        self, iteration: int, limit: int, metrics: Mapping[str, float], seconds: float
    ) -> None:
        now = time.perf_counter()
        if not self.on or now - self.last < 0.2:
            return
        self.last = now
        shown = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in metrics.items())
        text = f"{self.name} {iteration}/{limit}: {shown}, {seconds:.1f} s"
        self.width = max(self.width, len(text))
        print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.on and self.width:
            print(file=sys.stderr)


def _bound(model: Model[Any], data: Any, prior: Any, **binding: Any) -> Bound:
    bound = model.bind(data, **binding)
    return bound if prior is None else with_prior(bound, prior)


def _check_model(model: Any) -> None:
    if not isinstance(model, Model):
        raise ModelError(
            f"infer needs a model, got {type(model).__name__}. Decorate the function with @model and pass it uncalled."
        )


def _check_supported(name: str, reasons: Sequence[Reason]) -> None:
    if reasons:
        lines = "\n    ".join(str(r) for r in reasons)
        raise UnsupportedError(f"{name} cannot fit this model:\n    {lines}")


def _check_options(name: str, extend: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse what the backend's ``extend`` has no keyword for."""
    found = inspect.signature(extend).parameters.values()
    known = [p.name for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
        return
    own = ["labels", "sizes", "along", "max_iters"]
    for option in options:
        if option not in known:
            raise ModelError(
                f"extend: {name} has no option {option!r}.{nearest(option, [*known, *own])} Options: "
                f"{', '.join([*known, *own])}."
            )


def _choose(bound: Bound, options: Mapping[str, Any]) -> tuple[str, str]:
    import importlib

    chooser = importlib.import_module("ppl.inference.auto")
    name, why = chooser.choose(bound)
    if options and name == "exact":
        return "qem", f"options {sorted(options)} are QEM's"
    return name, why


def _restarts(restarts: int) -> int:
    if not _is_whole(restarts) or restarts < 1:
        raise ModelError(f"restarts: expected a whole number of at least 1, got {restarts!r}.")
    return restarts


def _check_stop(max_iters: int | None, tol: float | None) -> None:
    if max_iters is not None and not (_is_whole(max_iters) and max_iters >= 1):
        raise ModelError(
            f"max_iters: expected a whole number of at least 1, got {max_iters!r}. Leave it out for the method's own limit."
        )
    if tol is not None and not (isinstance(tol, (int, float)) and tol >= 0):
        raise ModelError(f"tol: expected a number that is not negative, got {tol!r}.")


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _bytes(memory: int | str | None) -> int | None:
    """A budget in bytes.

    >>> _bytes("1.5GiB")
    1610612736
    """
    if not (memory is None or isinstance(memory, (int, str))):
        raise ModelError(f"memory: expected bytes or text such as '4GiB', got {memory!r}.")
    if isinstance(memory, int) and memory <= 0:
        raise ModelError(f"memory: expected a positive number of bytes, got {memory!r}.")
    if memory is None or isinstance(memory, int):
        return memory
    units = {
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    }
    text = memory.strip().lower()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(digits) :].strip() or "b"
    try:
        return int(float(digits) * units[unit])
    except (ValueError, KeyError):
        raise ModelError(
            f"memory: expected bytes or text such as '4GiB', got {memory!r}."
        ) from None


def _is_stop(answer: Any) -> bool:
    return answer is Stop or isinstance(answer, Stop)
