"""Loaders of the data that the plated models of [Heap2025] are made for, to fit and to predict."""

from __future__ import annotations

import numpy as np

from ppl.errors import DataError
from ppl.models.files import Split, absent, arrays_of, find

_ALAN = (
    "https://github.com/alan-ppl/alan, examples/models/{}, written as a NumPy archive with the arrays "
    "{}, each with _train and _test at the end"
)
_STATES_SOURCE = _ALAN.format("radon", "obs, basement and log_uranium")
_BUS_SOURCE = _ALAN.format("bus_breakdown", "obs, company and run_type")
_FILMS_SOURCE = _ALAN.format("movielens", "obs and x")
_BIRDS_SOURCE = _ALAN.format("occupancy", "obs, weather and quality")
_COVID_SOURCE = (
    "https://github.com/alan-ppl/alan, examples/models/covid, written as a NumPy archive with the "
    "arrays obs, npis, wearing and mobility of all times, and n_train, the number of those to fit"
)
_CHIMPANZEES_SOURCE = (
    "https://github.com/rmcelreath/rethinking, data/chimpanzees.csv (semicolons between columns)"
)


def radon_states() -> Split:
    """Radon in four states, 150 zip codes each, for :func:`ppl.models.radon_states`.

    Returns:
        Train and test, each with ``obs`` (log pCi/L), ``basement`` (0 or 1) and ``log_uranium``
        (log ppm), all ``[State, Zip]`` = ``[4, 150]``. The split is by sorted zip code, not at
        random, so that covariates shift: scores on test are lower than on train.

    Raises:
        DataError: the file is not on this machine.

    Source: [Heap2025], from the state residential radon survey of the EPA.
    """
    return _split("radon/radon_states.npz", _STATES_SOURCE)


def radon_counties() -> Split:
    """Radon in seven states of five counties of five zip codes each, as :func:`radon_states`.

    Returns:
        Train and test, each array ``[State, County, Zip]`` = ``[7, 5, 5]``. Counties of test are
        not those of train.

    Raises:
        DataError: the file is not on this machine.
    """
    return _split("radon/radon_counties.npz", _STATES_SOURCE)


def bus_breakdown(draw: int = 0) -> Split:
    """Delays of school buses in New York, for :func:`ppl.models.bus_breakdown`.

    Args:
        draw: which of five random draws of reports, 0 to 4; published results are of 0. Numbers of
            companies and of run types differ: 59, 39, 36, 50, 53 and 8, 8, 6, 7, 8.

    Returns:
        Train and test, each with ``obs`` (1: more than half an hour late) ``[year, borough,
        report]`` = ``[2, 3, 150]``, and ``company`` and ``run_type`` with one 1 in each row. Reports
        were put into cells in the order of the file: take years and boroughs as names of groups.

    Raises:
        DataError: there is no such draw, or the file is not on this machine.

    Source: [Heap2025], from NYC Open Data, Bus Breakdown and Delays.
    """
    return _split(f"bus_breakdown/split_{_one_of('draw', draw, range(5))}.npz", _BUS_SOURCE)


def movielens(simulated: bool = True) -> Split:
    """What 300 users said of films, five to fit and five to predict, for :func:`ppl.models.movielens`.

    Args:
        simulated: whether ratings are drawn from the model, with genre flags like those of a
            catalogue. The other file is the published one: every rating in it is 0 and nearly all
            its flags are 0 or 1 together, so that it is of use only to repeat published curves.

    Returns:
        Train and test, each with ``obs`` (1: liked) ``[user, film]`` = ``[300, 5]`` and ``x`` genre
        flags ``[user, film, 18]``. Users of test are those of train.

    Raises:
        DataError: the file is not on this machine.

    Source: [Heap2025]; :func:`ppl.models.simulation.genre_flags` makes more like the simulated ones.
    """
    name = "simulated" if simulated else "as_shipped"
    return _split(f"movielens/movielens_{name}.npz", _FILMS_SOURCE)


def occupancy(draw: int = 0) -> Split:
    """Counts of twelve birds over six years, for :func:`ppl.models.occupancy`.

    Args:
        draw: which of three random draws, 0 to 2; published results are of 0.

    Returns:
        Train and test, each with ``obs`` (1: detected) ``[bird, year, visit, replicate]`` =
        ``[12, 6, 200, 5]`` (100 visits in test), ``weather`` (degrees Fahrenheit) and ``quality``
        (0 or 1) ``[bird, year, visit]``. Every visit has a detection, so that every bird is
        certainly there; visits were shuffled and their covariates were not.

    Raises:
        DataError: there is no such draw, or the file is not on this machine.

    Source: [Heap2025], from the North American Breeding Bird Survey.
    """
    name = f"occupancy/split_{_one_of('draw', draw, range(3))}.npz"
    parts = _split(name, _BIRDS_SOURCE)  # years outermost in the file
    return Split(*({k: a.swapaxes(0, 1).copy() for k, a in part.items()} for part in parts))


def covid(weekly: bool = False) -> Split:
    """New cases of covid in 92 regions, with what was done about it, for :func:`ppl.models.covid`.

    Args:
        weekly: sums over weeks (16 to fit and 5 to predict) in the place of days (109 and 28).

    Returns:
        Train and test: ``obs`` (cases), ``wearing`` (share of people with masks), ``mobility`` (its
        reduction) ``[region, time]`` and ``npis`` ``[region, time, 9]``; the times of test follow
        those of train.

    Raises:
        DataError: the file is not on this machine.

    Source: [Heap2025], from the study of masks by Leech et al., PNAS 119(23), 2022.
    """
    arrays = arrays_of(f"covid/covid_{'weekly' if weekly else 'daily'}.npz", _COVID_SOURCE)
    times = int(arrays.pop("n_train"))
    arrays = {name: array.astype(float) for name, array in arrays.items()}
    return Split(*({k: a[:, part] for k, a in arrays.items()} for part in _before_and_after(times)))


def chimpanzees() -> Split:
    """Which lever seven chimpanzees pulled, for :func:`ppl.models.chimpanzees`.

    Returns:
        Train and test, each with ``obs`` (1: the left one), ``condition`` (1: with a partner) and
        ``prosoc_left`` (1: the left one feeds the partner, too), ``[actor, block, repeat]`` =
        ``[7, 6, 10]`` (2 repeats in test). A block is a run of twelve rows of the table, as
        in [Heap2025], and not what the table calls a block.

    Raises:
        DataError: the file is not on this machine.

    Source: J. B. Silk et al. *Chimpanzees are indifferent to the welfare of unrelated group members.*
    Nature 437, 2005.
    """
    path = find("chimpanzees.csv")
    if path is None:
        raise absent("chimpanzees.csv", _CHIMPANZEES_SOURCE)
    table = np.genfromtxt(path, delimiter=";", names=True)
    columns = {"obs": "pulled_left", "condition": "condition", "prosoc_left": "prosoc_left"}
    arrays = {name: table[column].reshape(7, 6, 12) for name, column in columns.items()}
    return Split(*({k: a[:, :, part] for k, a in arrays.items()} for part in _before_and_after(10)))


def _split(name: str, source: str) -> Split:
    arrays = {key: array.astype(float) for key, array in arrays_of(name, source).items()}
    train, test = (
        {key.removesuffix(part): array for key, array in arrays.items() if key.endswith(part)}
        for part in ("_train", "_test")
    )
    return Split(train, test)


def _before_and_after(n: int) -> tuple[slice, slice]:
    return slice(0, n), slice(n, None)


def _one_of(name: str, value: int, known: range) -> int:
    if value not in known:
        raise DataError(f"{name}={value!r}: there are {len(known)}, {known[0]} to {known[-1]}.")
    return value
