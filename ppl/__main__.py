"""The command line: ``python -m ppl demo | explain | fit | summary``."""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import ppl
from ppl.errors import DataError, PPLError, nearest
from ppl.model import Model
from ppl.posterior import Posterior
from ppl.prediction import Prediction


class _Series(NamedTuple):
    """A column as data frames give it."""

    values: np.ndarray  # [rows]

    def to_numpy(self) -> np.ndarray:
        return self.values


class Table:
    """The columns of a CSV file: one entry a row, as in a data frame."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name: str) -> _Series:
        return _Series(self._columns[name])


def read_csv(file: str | Path) -> Table:
    """Read a CSV file with a header; a column is numbers when all of its entries are.

    Empty entries are missing: NaN in a column of numbers.

    Raises:
        DataError: no such file, no header, or rows of different lengths.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"there is no data file '{path}'. Give a CSV file with a header.")
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if row]
    if len(rows) < 2:
        raise DataError(f"'{path}': expected a header and rows, got {len(rows)} lines.")
    header, *body = rows
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise DataError(
                f"'{path}', line {number}: expected {len(header)} entries, got {len(row)}. "
                "Quote entries that hold a comma."
            )
    return Table(
        {name.strip(): _column([row[i].strip() for row in body]) for i, name in enumerate(header)}
    )


def _column(entries: list[str]) -> np.ndarray:
    try:
        numbers = np.array([float(entry) if entry else np.nan for entry in entries])
    except ValueError:
        return np.array([entry or None for entry in entries], dtype=object)
    whole = bool(np.isfinite(numbers).all()) and bool((numbers == np.round(numbers)).all())
    return numbers.astype(np.int64) if whole else numbers


def load_model(spec: str) -> Model[Any]:
    """The model that ``path.py:name`` or ``package.module:name`` speaks of.

    Raises:
        PPLError: there is none, or its file does not run.

    >>> load_model("ppl.models:eight_schools")
    model eight_schools()
    """
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise PPLError(
            f"model '{spec}': expected path.py:name or package.module:name, such as "
            "ppl.models:eight_schools."
        )
    module = _module(place)
    found = getattr(module, name, None)
    if isinstance(found, Model):
        return found
    models = [key for key, value in vars(module).items() if isinstance(value, Model)]
    problem = "has no" if found is None else "has something that is not a model called"
    known = f"{nearest(name, models)} Models: {', '.join(models) or 'none'}."
    raise PPLError(f"'{place}' {problem} '{name}'.{known}")


def _module(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _module_of_file(Path(place))
        return importlib.import_module(place)
    except PPLError:
        raise
    except Exception as error:  # whatever a user's file may raise
        what = f"{type(error).__name__}: {error}"
        raise PPLError(f"'{place}' cannot be imported: {what}") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PPLError(f"there is no file '{path}'. Give the Python file that has the model.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as for a script: its neighbours can be imported
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def explain(model: str, data: str | None) -> None:
    """Print the factor graph and the table of methods."""
    loaded, table = load_model(model), None if data is None else read_csv(data)
    print(loaded.graph(table))
    print()
    if table is None:
        print("Give a CSV file, too, to see which methods can fit it.")
    else:
        print(ppl.explain(loaded, table))


def fit(model: str, data: str, method: str, seed: int | None, out: str | None) -> None:
    """Fit, print the result, and write it to a file if asked to."""
    posterior = ppl.infer(load_model(model), read_csv(data), method=method, seed=seed)
    print(posterior)
    if out is not None:
        posterior.save(out)
        print(f"\nwritten to {out}; read it with: python -m ppl summary {out} {model}")


def summary(file: str, model: str) -> None:
    """Print the summary of a saved posterior."""
    if not Path(file).is_file():
        raise DataError(f"there is no file '{file}'. Write one: python -m ppl fit ... --out {file}")
    posterior = ppl.load(file, load_model(model))
    print(posterior.summary())
    print("\n" + posterior.diagnostics.verdict)


def demo() -> None:
    """Fit real hierarchical data: schools, rats, and radon where its file is found."""
    start = time.perf_counter()
    # By name: the language imports no model.
    models = importlib.import_module("ppl.models")
    _demo_schools(models)
    _demo_rats(models)
    if any(models.datasets.find(name) for name in models.datasets.MINNESOTA_FILES):
        _demo_radon(models)
    print(f"\nAll of this took {time.perf_counter() - start:.0f} s.")


def _demo_schools(models: ModuleType) -> None:
    data = models.datasets.eight_schools()
    _title("Eight schools: does coaching help, and is a school that looks best really better?")
    print(models.eight_schools.graph(data), "\n")
    posterior = _fitted(models.eight_schools, data)
    exact = ppl.infer(models.eight_schools, data, method="exact")
    off = ((posterior.mean("theta") - exact.mean("theta")) / exact.sd("theta")).abs().max()
    print(f"Largest distance of theta from its exact mean: {off:.3f} standard deviations")
    new = posterior.predict({"school": ["a ninth school"], "sigma": [15.0]})
    _tell("True effect of a ninth school, in points", new, "theta")


def _demo_rats(models: ModuleType) -> None:
    data = models.datasets.rats()
    _title("Rats: 30 animals, weighed five times; each grows along a line of its own")
    posterior = _fitted(models.rats, data)
    new = posterior.predict({"rat": ["a new rat"], "age": data["age"]})
    _tell("Weight of a rat not seen yet at 8, 15, 22, 29, 36 days, in grams", new, "weight")


def _demo_radon(models: ModuleType) -> None:
    houses = models.datasets.radon_minnesota()
    _title("Radon: 919 houses, as many in each of 85 counties as there happen to be")
    posterior = _fitted(models.radon, houses)
    new = posterior.predict({"county": ["a new county"], "floor": [0.0], "uranium": [0.0]})
    _tell("Log radon in a basement of a county without data", new, "log_radon")


def _fitted(model: Model[Any], data: Any) -> Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say is printed with the posterior
        posterior = ppl.infer(model, data, method="qem", seed=0)
    print(posterior, "\n")
    return posterior


def _tell(what: str, prediction: Prediction, site: str) -> None:
    low, high = prediction.interval(site).reshape(2, -1)
    print(f"{what} (mean, 90 % interval):")
    for mean, a, b in zip(prediction.mean(site).reshape(-1), low, high, strict=True):
        print(f"  {mean:8.2f}   {a:8.2f} to {b:.2f}")


def _title(text: str) -> None:
    print(f"\n{'=' * len(text)}\n{text}\n{'=' * len(text)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m ppl", description="Fit probabilistic models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    one = commands.add_parser("demo", help="fit real hierarchical data and print what comes out")
    one.set_defaults(run=demo)
    one = commands.add_parser("explain", help="print the factor graph, and which methods can fit")
    one.add_argument("model", help="path.py:name or package.module:name")
    one.add_argument("data", nargs="?", help="CSV file with a header")
    one.set_defaults(run=explain)
    one = commands.add_parser("fit", help="fit a model to a CSV file")
    one.add_argument("model", help="path.py:name or package.module:name")
    one.add_argument("data", help="CSV file with a header, one row an observation")
    one.add_argument("--method", default="auto", help="backend (default: %(default)s)")
    one.add_argument("--seed", type=int, help="of every random number of the run")
    one.add_argument("--out", help="file to write the posterior to")
    one.set_defaults(run=fit)
    one = commands.add_parser("summary", help="print the summary of a saved posterior")
    one.add_argument("file", help="what fit --out wrote")
    one.add_argument("model", help="the model that was fitted")
    one.set_defaults(run=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user are printed in words, with exit code 2."""
    given = vars(_parser().parse_args(arguments))
    run = given.pop("run")
    try:
        run(**given)
    except (PPLError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
