"""Every model of the collection by its name in posteriordb, and where the data is found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppl import Model

from . import hierarchies as h
from . import regressions as r
from . import series as s


class Entry(NamedTuple):
    """A model, and what turns the data of posteriordb into the arrays that it reads."""

    model: Model[Any]
    arrays: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]


def data_folder() -> Path | None:
    """Where the references lie: in ``$PPL_DATA`` or ``../shared/data``; None if in neither."""
    root = Path(__file__).resolve().parents[2]
    asked = os.environ.get("PPL_DATA")
    for base in ([Path(asked)] if asked else []) + [root.parent / "shared" / "data"]:
        if (base / "posteriordb").is_dir():
            return base / "posteriordb"
    return None


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays that the model of this name reads."""
    raw = json.loads((folder / name / "data.json").read_text())
    return dict(MODELS[name].arrays({k: np.asarray(v, dtype=float) for k, v in raw.items()}))


MODELS: dict[str, Entry] = {
    "earnings-earn_height": Entry(r.flat_regression(2), r.earn_height),
    "earnings-logearn_height": Entry(r.flat_regression(2), r.logearn_height),
    "earnings-logearn_interaction": Entry(r.flat_regression(4), r.logearn_interaction),
    "earnings-logearn_interaction_z": Entry(r.flat_regression(4), r.logearn_interaction_z),
    "kidiq-kidscore_momhs": Entry(r.half_cauchy_regression(2), r.kidscore_momhs),
    "kidiq-kidscore_momhsiq": Entry(r.half_cauchy_regression(3), r.kidscore_momhsiq),
    "kidiq-kidscore_momiq": Entry(r.half_cauchy_regression(2), r.kidscore_momiq),
    "kidiq_with_mom_work-kidscore_interaction_c": Entry(
        r.flat_regression(4), r.kidscore_interaction_c
    ),
    "kidiq_with_mom_work-kidscore_interaction_z": Entry(
        r.flat_regression(4), r.kidscore_interaction_z
    ),
    "mesquite-mesquite": Entry(r.flat_regression(7), r.mesquite),
    "mesquite-logmesquite": Entry(r.flat_regression(7), r.logmesquite),
    "mesquite-logmesquite_logvash": Entry(r.flat_regression(6), r.logmesquite_logvash),
    "mesquite-logmesquite_logvolume": Entry(r.flat_regression(2), r.logmesquite_logvolume),
    "nes1972-nes": Entry(r.flat_regression(9), r.nes),
    "nes1980-nes": Entry(r.flat_regression(9), r.nes),
    "nes1984-nes": Entry(r.flat_regression(9), r.nes),
    "nes1992-nes": Entry(r.flat_regression(9), r.nes),
    "nes2000-nes": Entry(r.flat_regression(9), r.nes),
    "sblrc-blr": Entry(r.normal_regression(5), r.blr),
    "arK-arK": Entry(s.autoregression(5), s.autoregression_data),
    "arma-arma11": Entry(s.arma11, s.arma_data),
    "hmm_example-hmm_example": Entry(s.normal_hmm, s.series_data),
    "bball_drive_event_0-hmm_drive_0": Entry(s.drive_hmm, s.drive_data),
    "eight_schools-eight_schools_noncentered": Entry(h.schools_noncentered, h.schools_data),
    "eight_schools-eight_schools_centered": Entry(h.schools_centered, h.schools_data),
    "gp_pois_regr-gp_regr": Entry(s.gaussian_process, s.process_data),
    "low_dim_gauss_mix-low_dim_gauss_mix": Entry(s.normal_mixture, s.series_data),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": Entry(s.one_compartment, s.compartment_data),
    "radon_mn-radon_hierarchical_intercept_centered": Entry(h.radon, h.radon_data),
    "seeds_data-seeds_stanified_model": Entry(h.seeds, h.seeds_data),
    "rats_data-rats_model": Entry(h.rats, h.rats_data),
    "dogs-dogs": Entry(r.dogs, r.dog_trials),
    "GLMM_Poisson_data-GLMM_Poisson_model": Entry(h.poisson_trend, h.counts_data),
    "GLM_Binomial_data-GLM_Binomial_model": Entry(r.binomial_trend, r.yearly_counts),
    "wells_data-wells_dae_inter_model": Entry(r.logistic_regression(6), r.wells),
    "nes_logit_data-nes_logit_model": Entry(r.logistic_regression(1), r.nes_logit),
    "irt_2pl-irt_2pl": Entry(h.item_response, h.answers_data),
}
