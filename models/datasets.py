"""Data for the models: classic tables typed in, and loaders for files too large for that.

Files are looked for as :mod:`ppl.models.files` says; nothing is downloaded.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ppl.errors import DataError, nearest
from ppl.models.files import Split, absent, arrays_of, find
from ppl.models.learning_sets import cifar10, diabetes, digits, fashion_mnist, mnist, uci
from ppl.models.plated import (
    bus_breakdown,
    chimpanzees,
    covid,
    movielens,
    occupancy,
    radon_counties,
    radon_states,
)
from ppl.models.pose_graphs import PoseGraph, full_information

__all__ = [
    "MINNESOTA_FILES",
    "Split",
    "bear",
    "bus_breakdown",
    "chimpanzees",
    "cifar10",
    "covid",
    "desk",
    "diabetes",
    "digits",
    "eight_schools",
    "fashion_mnist",
    "find",
    "mnist",
    "movielens",
    "occupancy",
    "pose_graph",
    "radon_counties",
    "radon_minnesota",
    "radon_states",
    "rats",
    "uci",
]

MINNESOTA_FILES = (
    "radon_mn.json",  # the name in posteriordb
    "posteriordb/radon_mn-radon_hierarchical_intercept_centered/data.json",
)
_MINNESOTA_SOURCE = (
    "posterior_database/data/data/radon_mn.json.zip of https://github.com/stan-dev/posteriordb, "
    "unpacked there as radon_mn.json"
)
_POSE_GRAPHS = {
    "manhattan3500": "the g2o files that SE-Sync distributes, https://github.com/david-m-rosen/SE-Sync",
    "intel": "the g2o files that SE-Sync distributes, https://github.com/david-m-rosen/SE-Sync",
    "synthetic_manhattan3500": "a simulator; ppl.models.worlds.manhattan_world makes another",
}
_DESK_SOURCE = (
    "data/fr1desk_vsmall.txt of https://github.com/joeaortiz/gbp, written as a NumPy archive"
)
_BEAR_SOURCE = "the sequence bear of the DAVIS videos, https://davischallenge.org, resized and written as a NumPy archive"

# Gelfand, Hills, Racine-Poon and Smith (1990): 30 young rats, a row of five weights each (grams).
_AGES = [8.0, 15.0, 22.0, 29.0, 36.0]  # days
_WEIGHTS = """
    151 199 246 283 320   145 199 249 293 354   147 214 263 312 328   155 200 237 272 297
    135 188 230 280 323   159 210 252 298 331   141 189 231 275 305   159 201 248 297 338
    177 236 285 350 376   134 182 220 260 296   160 208 261 313 352   143 188 220 273 314
    154 200 244 289 325   171 221 270 326 358   163 216 242 281 312   160 207 248 288 324
    142 187 234 280 316   156 203 243 283 317   157 212 259 307 336   152 203 246 286 321
    154 205 253 298 334   139 190 225 267 302   146 191 229 272 302   157 211 250 285 323
    132 185 237 286 331   160 207 257 303 345   169 216 261 295 333   157 205 248 289 316
    137 180 219 258 291   153 200 244 286 324
"""


def eight_schools() -> dict[str, Any]:
    """Effects of coaching on SAT-V scores in eight schools, for :func:`ppl.models.eight_schools`.

    Returns:
        ``y`` and ``sigma`` ``[school]`` (points; estimated effect and its standard error), and the
        schools' labels A to H.

    Source: [Rubin1981], rounded to whole points as in [Gelman2013] table 5.2.

    >>> eight_schools()["y"][:3]
    [28.0, 8.0, -3.0]
    """
    return {
        "school": list("ABCDEFGH"),
        "y": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
        "sigma": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
    }


def rats() -> dict[str, np.ndarray]:
    """Weights of 30 young rats at five ages, for :func:`ppl.models.rats`.

    Returns:
        ``weight`` ``[rat, time]`` in grams and ``age`` ``[time]`` in days.

    Source: A. E. Gelfand, S. E. Hills, A. Racine-Poon, A. F. M. Smith. *Illustration of Bayesian
    Inference in Normal Data Models Using Gibbs Sampling.* JASA 85(412), 1990.

    >>> rats()["weight"].shape
    (30, 5)
    """
    weights = np.array(_WEIGHTS.split(), dtype=float).reshape(30, len(_AGES))
    return {"weight": weights, "age": np.array(_AGES)}


def radon_minnesota() -> dict[str, np.ndarray]:
    """Radon in 919 houses of 85 counties of Minnesota, for :func:`ppl.models.radon`.

    Returns:
        One row a house: ``log_radon`` (log pCi/L), ``floor`` (0: measured in the basement, 1: on
        the first floor), ``county`` (a label), ``uranium`` (log ppm, one value a county).

    Raises:
        DataError: the file is not on this machine.

    Source: [GelmanHill2006] chapter 12; the table of posteriordb, whose counties are numbers.
    """
    found = (find(name) for name in MINNESOTA_FILES)
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise absent(MINNESOTA_FILES[0], _MINNESOTA_SOURCE)
    table = json.loads(path.read_text(encoding="utf-8"))
    return {
        "log_radon": np.array(table["log_radon"], dtype=float),
        "floor": np.array(table["floor_measure"], dtype=float),
        "county": np.array([f"county {number:02d}" for number in table["county_idx"]]),
        "uranium": np.array(table["log_uppm"], dtype=float),
    }


def pose_graph(name: str = "manhattan3500") -> PoseGraph:
    """A pose graph in the plane, for :func:`ppl.models.pose_graph_2d`, with odometry to start from.

    Args:
        name: "manhattan3500" (Olson's simulated streets, 3500 poses and 5453 edges), "intel" (the
            Intel research lab, 1728 and 2512), or "synthetic_manhattan3500" (3500 and 5427, with
            the true poses).

    Raises:
        DataError: there is no graph of that name, or its file is not on this machine.
    """
    if name not in _POSE_GRAPHS:
        raise DataError(
            f"there is no pose graph '{name}'.{nearest(name, _POSE_GRAPHS)} Known: {', '.join(_POSE_GRAPHS)}."
        )
    arrays = arrays_of(f"gbp/{name}.npz", _POSE_GRAPHS[name])
    data = {key: arrays[key] for key in ("i", "j", "z", "anchor", "anchor_precision")}
    data["info"] = full_information(arrays["info_upper"])
    return PoseGraph(data, arrays["init"], arrays.get("truth"))


def desk() -> dict[str, np.ndarray]:
    """Ten key frames of the sequence fr1/desk, 640 landmarks, 1801 pixels.

    Returns:
        Data for :func:`ppl.models.bundle_adjustment`; the prior means are the start.

    Raises:
        DataError: the file is not on this machine.
    """
    arrays = arrays_of("gbp/ba_fr1desk_vsmall.npz", _DESK_SOURCE)
    return {
        "pixel": arrays["meas"],
        "seen_by": arrays["cam_idx"],
        "shows": arrays["lm_idx"],
        "intrinsics": arrays["K"],
        "sigma": arrays["sigma_px"],
        "pose_mean": arrays["cams0"],
        "pose_sd": arrays["prior_prec_cam"] ** -0.5,
        "point_mean": arrays["lms0"],
        "point_sd": arrays["prior_prec_lm"] ** -0.5,
    }


def bear(frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A frame of a video of a bear, clean and with a tenth of its pixels replaced by noise.

    Args:
        frame: 0 to 9.

    Returns:
        Both ``[258, 454, 3]`` (row, column, colour), scaled to [0, 1] over the whole video.

    Raises:
        DataError: the file is not on this machine.
    """
    arrays = arrays_of("gbp/bear_video.npz", _BEAR_SOURCE)
    low, high = (arrays[f"{end}_258x454"].astype(float) for end in ("vmin", "vmax"))
    shape = arrays["noise_mask_shape"]
    mask = np.unpackbits(arrays["noise_mask_packed"])[: np.prod(shape)].reshape(shape).astype(bool)
    noisy = (arrays["frames_258x454"].astype(float) - low) / (high - low)
    clean = noisy[frame].copy()
    noisy[mask] = arrays["noise_values"]
    return clean, noisy[frame]
