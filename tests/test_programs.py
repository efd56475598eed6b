"""The eleven programs of the language: plates, shapes, parents and what each method says of them.

Each program gets small made-up data. What is checked is the factor graph, and :func:`ppl.explain`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Flat,
    HalfCauchy,
    HalfNormal,
    LogNormal,
    Markov,
    Normal,
    SpikeSlab,
    dot,
    explain,
    factor,
    given,
    infer,
    latent,
    model,
    nn,
    observe,
    param,
    pick,
    plate,
)
from ppl.lower import Compiler


@model
def eight_schools():
    mu = latent("mu", Normal(0.0, 5.0))
    tau = latent("tau", HalfCauchy(5.0))
    with plate("school"):
        sigma = given("sigma")
        theta = latent("theta", Normal(mu, tau))
        observe("y", Normal(theta, sigma))


@model
def radon():
    county = plate("county")
    zipcode = plate("zip", within=county)
    house = plate("house", within=zipcode)

    mu = latent("mu", Normal(0.0, 3.0))
    gamma = latent("gamma", Normal(0.0, 1.0))
    beta = latent("beta", Normal(0.0, 1.0))
    sd_county = latent("sd_county", HalfNormal(1.0))
    sd_zip = latent("sd_zip", HalfNormal(0.5))
    sd_house = latent("sd_house", HalfNormal(1.0))

    with county:
        uranium = given("log_uranium")
        alpha = latent("alpha", Normal(mu + gamma * uranium, sd_county))
    with zipcode:
        delta = latent("delta", Normal(alpha, sd_zip))  # sees its county's alpha
    with house:
        basement = given("basement")
        observe("log_radon", Normal(delta + beta * basement, sd_house))


@model
def movielens(genres: int = 4):
    user, film = plate("user"), plate("film")
    rating = plate("rating", within=(user, film))  # crossed: one row for a (user, film) pair

    mu = latent("mu", Normal(0.0, 0.5), shape=(genres,))
    level = latent("level", Categorical(torch.full((genres, 5), 0.2)))
    with user:
        taste = latent("taste", Normal(mu, torch.exp(0.5 * level - 1.0)), shape=(genres,))
    with film:
        genre = given("genre")  # 0/1 vector of each film
    with rating:
        score = (taste * genre).sum(-1)  # taste of its user, genre of its film
        observe("liked", Bernoulli(logits=score))


@model
def occupancy():
    species, site, visit = plate("species"), plate("site"), plate("visit")
    mu_a, sd_a = latent("mu_a", Normal(0.0, 1.5)), latent("sd_a", HalfNormal(1.0))
    mu_d, sd_d = latent("mu_d", Normal(0.0, 1.5)), latent("sd_d", HalfNormal(1.0))
    slope = latent("slope", Normal(0.0, 1.0))
    with species:
        a = latent("a", Normal(mu_a, sd_a))
        d = latent("d", Normal(mu_d, sd_d))
    with site:
        elevation = given("elevation")
    with species, site:
        present = latent("present", Bernoulli(logits=a + slope * elevation))
        with visit:
            observe("seen", Bernoulli(probs=present * torch.sigmoid(d)))


@model
def mixture(k: int = 3, dim: int = 2):
    component = plate("component", k)
    weight = latent("weight", Dirichlet(torch.ones(k)))
    with component:
        centre = latent("centre", Normal(0.0, 5.0), shape=(dim,))
        spread = latent("spread", HalfNormal(2.0), shape=(dim,))
    with plate("point"):
        z = latent("z", Categorical(weight, over=component))
        observe("x", Normal(centre[z], spread[z]))


@model
def local_level():
    q = latent("q", LogNormal(3.0, 1.0))
    r = latent("r", LogNormal(4.0, 1.0))
    with plate("year", ordered=True):
        level = latent(
            "level", Markov(init=Normal(1000.0, 500.0), step=lambda prev: Normal(prev, q))
        )
        observe("flow", Normal(level, r))


@model
def compressed_sensing():
    row, coef = plate("row"), plate("coef")
    rho, noise = param("rho", 0.1), param("noise", 0.01)
    with coef:
        x = latent("x", SpikeSlab(rho, slab=Normal(0.0, 1.0)))
    with row:
        with coef:
            matrix = given("A")
        observe("y", Normal(dot(matrix, x, over=coef), noise))


def between(a, b):
    """Pose b seen from pose a; poses are (x, y, heading)."""
    c, s = torch.cos(a[..., 2]), torch.sin(a[..., 2])
    d = b - a
    turn = torch.atan2(torch.sin(d[..., 2]), torch.cos(d[..., 2]))
    ahead, aside = c * d[..., 0] + s * d[..., 1], c * d[..., 1] - s * d[..., 0]
    return torch.stack([ahead, aside, turn], -1)


@model
def pose_graph():
    pose, edge = plate("pose"), plate("edge")
    with pose:
        x = latent("x", Flat(3))
    with edge:
        i, j = given("i", index=pose), given("j", index=pose)
        sd = given("sd")
        residual = between(x[i], x[j]) - given("measured")
        factor("edge", Normal(residual, sd).robust("huber", 1.345), at=0.0)
    factor("anchor", Normal(pick(x, pose=0), 1e-3), at=0.0)


@model
def mlp(inputs: int = 784, width: int = 100, classes: int = 10):
    net = nn.Sequential(
        nn.Linear(inputs, width, name="fc1"),
        nn.ReLU(),
        nn.Linear(width, width, name="fc2"),
        nn.ReLU(),
        nn.Linear(width, classes, name="out"),
    )
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


@model
def lenet(classes: int = 10):
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, name="c1", padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, name="c2"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, classes, name="out"),
    )
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


@model
def churn(features: int = 12):
    w = latent("w", Normal(0.0, 1.0), shape=(features,))
    b = latent("b", Normal(0.0, 2.0))
    with plate("customer"):
        x = given("x")
        observe("left", Bernoulli(logits=(x * w).sum(-1) + b))


SCHOOLS = {
    "y": [28, 8, -3, 7, -1, 1, 18, 12],
    "sigma": [15, 10, 16, 11, 9, 11, 10, 18],
}
HOUSES = {
    "log_radon": [0.8, 1.1, 0.3, 1.4, 0.9, 0.5],
    "basement": [0, 0, 1, 0, 1, 1],
    "zip": ["z1", "z1", "z2", "z3", "z3", "z2"],
    "county": ["c1", "c1", "c1", "c2", "c2", "c1"],
    "log_uranium": [0.2, 0.2, 0.2, -0.4, -0.4, 0.2],
}
RATINGS = [
    pd.DataFrame(
        {
            "user": ["u1", "u1", "u2", "u3"],
            "film": ["f1", "f2", "f2", "f1"],
            "liked": [1, 0, 1, 1],
        }
    ),
    {"genre": [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]},  # of f1 and f2
]
SIGHTINGS = {
    "seen": np.array([[[0, 1], [1, np.nan]], [[0, 0], [1, 1]], [[np.nan, 0], [0, 0]]]),
    "elevation": [0.1, -0.3],
}
POINTS = {"x": [[0.1, 0.2], [4.0, 4.1], [-3.9, 0.3], [4.2, 3.8]]}
FLOWS = {"flow": [1120.0, 1160.0, 963.0, 1210.0, 1160.0]}
SENSED = {"A": torch.linspace(-1.0, 1.0, 12).reshape(3, 4), "y": [0.1, -0.4, 0.9]}
POSES = {
    "i": [0, 1, 2],
    "j": [1, 2, 0],
    "measured": [[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [-1.9, 0.2, 0.0]],
    "sd": [[0.1, 0.1, 0.05]] * 3,
}
DIGITS = {"x": torch.zeros(3, 6), "label": [0, 1, 1]}
IMAGES = {"x": torch.zeros(2, 1, 28, 28), "label": [0, 7]}
CUSTOMERS = {"x": torch.zeros(5, 12), "left": [0, 1, 1, 0, 1]}

PROGRAMS = {
    "eight_schools": (eight_schools, SCHOOLS),
    "radon": (radon, HOUSES),
    "movielens": (movielens, RATINGS),
    "occupancy": (occupancy, SIGHTINGS),
    "mixture": (mixture, POINTS),
    "local_level": (local_level, FLOWS),
    "compressed_sensing": (compressed_sensing, SENSED),
    "pose_graph": (pose_graph, POSES),
    "mlp": (mlp(inputs=6, width=4, classes=2), DIGITS),
    "lenet": (lenet, IMAGES),
    "churn": (churn, CUSTOMERS),
}
SIZES = {"pose_graph": {"pose": 3}}
GRAPHS = {
    name: program.graph(data, sizes=SIZES.get(name)) for name, (program, data) in PROGRAMS.items()
}

# name of the program -> plates as (size, parents)
PLATES = {
    "eight_schools": {"school": (8, ())},
    "radon": {"county": (2, ()), "zip": (3, ("county",)), "house": (6, ("zip",))},
    "movielens": {"user": (3, ()), "film": (2, ()), "rating": (4, ("user", "film"))},
    "occupancy": {"species": (3, ()), "site": (2, ()), "visit": (2, ())},
    "mixture": {"component": (3, ()), "point": (4, ())},
    "local_level": {"year": (5, ())},
    "compressed_sensing": {"row": (3, ()), "coef": (4, ())},
    "pose_graph": {"pose": (3, ()), "edge": (3, ())},
    "mlp": {
        "image": (3, ()),
        "fc1.out": (4, ()),
        "fc1.in": (6, ()),
        "fc2.out": (4, ()),
        "fc2.in": (4, ()),
        "out.out": (2, ()),
        "out.in": (4, ()),
    },
    "lenet": {
        "image": (2, ()),
        "c1.out": (6, ()),
        "c1.in": (1, ()),
        "c2.out": (16, ()),
        "c2.in": (6, ()),
        "out.out": (10, ()),
        "out.in": (400, ()),
    },
    "churn": {"customer": (5, ())},
}

# name of the program -> variable: (role, plates, event shape)
VARIABLES = {
    "eight_schools": {
        "mu": ("latent", (), ()),
        "tau": ("latent", (), ()),
        "sigma": ("given", ("school",), ()),
        "theta": ("latent", ("school",), ()),
        "y": ("observed", ("school",), ()),
    },
    "radon": {
        "mu": ("latent", (), ()),
        "gamma": ("latent", (), ()),
        "beta": ("latent", (), ()),
        "sd_county": ("latent", (), ()),
        "sd_zip": ("latent", (), ()),
        "sd_house": ("latent", (), ()),
        "log_uranium": ("given", ("county",), ()),
        "alpha": ("latent", ("county",), ()),
        "delta": ("latent", ("zip",), ()),
        "basement": ("given", ("house",), ()),
        "log_radon": ("observed", ("house",), ()),
    },
    "movielens": {
        "mu": ("latent", (), (4,)),
        "level": ("latent", (), (4,)),
        "taste": ("latent", ("user",), (4,)),
        "genre": ("given", ("film",), (4,)),
        "liked": ("observed", ("rating",), ()),
    },
    "occupancy": {
        "mu_a": ("latent", (), ()),
        "sd_a": ("latent", (), ()),
        "mu_d": ("latent", (), ()),
        "sd_d": ("latent", (), ()),
        "slope": ("latent", (), ()),
        "a": ("latent", ("species",), ()),
        "d": ("latent", ("species",), ()),
        "elevation": ("given", ("site",), ()),
        "present": ("latent", ("species", "site"), ()),
        "seen": ("observed", ("species", "site", "visit"), ()),
    },
    "mixture": {
        "weight": ("latent", (), (3,)),
        "centre": ("latent", ("component",), (2,)),
        "spread": ("latent", ("component",), (2,)),
        "z": ("latent", ("point",), ()),
        "x": ("observed", ("point",), (2,)),
    },
    "local_level": {
        "q": ("latent", (), ()),
        "r": ("latent", (), ()),
        "level": ("latent", ("year",), ()),
        "flow": ("observed", ("year",), ()),
    },
    "compressed_sensing": {
        "rho": ("param", (), ()),
        "noise": ("param", (), ()),
        "x": ("latent", ("coef",), ()),
        "A": ("given", ("row", "coef"), ()),
        "y": ("observed", ("row",), ()),
    },
    "pose_graph": {
        "x": ("latent", ("pose",), (3,)),
        "i": ("given", ("edge",), ()),
        "j": ("given", ("edge",), ()),
        "sd": ("given", ("edge",), (3,)),
        "measured": ("given", ("edge",), (3,)),
    },
    "mlp": {
        "x": ("given", ("image",), (6,)),
        "fc1.weight": ("latent", ("fc1.out", "fc1.in"), ()),
        "fc1.bias": ("latent", ("fc1.out",), ()),
        "fc2.weight": ("latent", ("fc2.out", "fc2.in"), ()),
        "fc2.bias": ("latent", ("fc2.out",), ()),
        "out.weight": ("latent", ("out.out", "out.in"), ()),
        "out.bias": ("latent", ("out.out",), ()),
        "label": ("observed", ("image",), ()),
    },
    "lenet": {
        "x": ("given", ("image",), (1, 28, 28)),
        "c1.weight": ("latent", ("c1.out", "c1.in"), (5, 5)),
        "c1.bias": ("latent", ("c1.out",), ()),
        "c2.weight": ("latent", ("c2.out", "c2.in"), (5, 5)),
        "c2.bias": ("latent", ("c2.out",), ()),
        "out.weight": ("latent", ("out.out", "out.in"), ()),
        "out.bias": ("latent", ("out.out",), ()),
        "label": ("observed", ("image",), ()),
    },
    "churn": {
        "w": ("latent", (), (12,)),
        "b": ("latent", (), ()),
        "x": ("given", ("customer",), (12,)),
        "left": ("observed", ("customer",), ()),
    },
}

NETWORK = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "out.weight", "out.bias"}

# name of the program -> factor: for each variable that it reads, how
ACCESS = {
    "eight_schools": {
        "theta": {"mu": "broadcast", "tau": "broadcast"},
        "y": {"theta": "same", "sigma": "same"},
    },
    "radon": {
        "alpha": {
            "mu": "broadcast",
            "gamma": "broadcast",
            "log_uranium": "same",
            "sd_county": "broadcast",
        },
        "delta": {"alpha": "gather", "sd_zip": "broadcast"},
        "log_radon": {
            "delta": "gather",
            "beta": "broadcast",
            "basement": "same",
            "sd_house": "broadcast",
        },
    },
    "movielens": {
        "level": {},
        "taste": {"mu": "broadcast", "level": "broadcast"},
        "liked": {"taste": "gather", "genre": "gather"},
    },
    "occupancy": {
        "a": {"mu_a": "broadcast", "sd_a": "broadcast"},
        "present": {"a": "broadcast", "slope": "broadcast", "elevation": "broadcast"},
        "seen": {"present": "broadcast", "d": "broadcast"},
    },
    "mixture": {
        "z": {"weight": "broadcast"},
        "x": {"centre": "gather", "spread": "gather", "z": "same"},
    },
    "local_level": {
        "level": {"q": "broadcast"},
        "flow": {"level": "same", "r": "broadcast"},
    },
    "compressed_sensing": {
        "x": {"rho": "broadcast"},
        "y": {"A": "all", "x": "all", "noise": "broadcast"},
    },
    "pose_graph": {
        "edge": {"x": "gather", "i": "same", "j": "same", "measured": "same", "sd": "same"},
        "anchor": {"x": "gather"},
    },
    "mlp": {"fc1.weight": {}, "label": {"x": "same", **dict.fromkeys(NETWORK, "all")}},
    "lenet": {
        "label": {
            "x": "same",
            "c1.weight": "all",
            "c1.bias": "all",
            "c2.weight": "all",
            "c2.bias": "all",
            "out.weight": "all",
            "out.bias": "all",
        }
    },
    "churn": {"left": {"w": "broadcast", "b": "broadcast", "x": "same"}},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_plates_with_sizes_and_parents(name):
    found = {p.name: (p.size, p.parents) for p in GRAPHS[name].plates.values()}
    assert found == PLATES[name]


@pytest.mark.parametrize("name", GRAPHS)
def test_roles_plates_and_event_shapes(name):
    variables = GRAPHS[name].variables.values()
    assert {v.name: (v.role, v.plates, v.event_shape) for v in variables} == VARIABLES[name]


@pytest.mark.parametrize("name", GRAPHS)
def test_parents_and_how_they_are_read(name):
    graph = GRAPHS[name]
    for site, reads in ACCESS[name].items():
        assert set(graph.parents(site)) == set(reads)
        assert {v: set(graph.access(site, v)) for v in reads} == {
            v: {kind} for v, kind in reads.items()
        }


def test_discrete_variables_and_their_number_of_values():
    found = {
        (name, v.name): v.cardinality
        for name, graph in GRAPHS.items()
        for v in graph.variables.values()
        if v.is_discrete
    }
    assert found == {
        ("movielens", "level"): 5,
        ("movielens", "liked"): 2,
        ("occupancy", "present"): 2,
        ("occupancy", "seen"): 2,
        ("mixture", "z"): 3,
        ("mlp", "label"): 2,
        ("lenet", "label"): 10,
        ("churn", "left"): 2,
    }


def test_indices_name_the_plate_they_point_into():
    found = {
        (name, v.name): v.index_of
        for name, graph in GRAPHS.items()
        for v in graph.variables.values()
        if v.index_of
    }
    expected = {
        ("mixture", "z"): "component",
        ("pose_graph", "i"): "pose",
        ("pose_graph", "j"): "pose",
    }
    assert found == expected


def test_ordered_plates_and_chains():
    graph = GRAPHS["local_level"]
    assert graph.plates["year"].ordered
    assert graph.factors["level"].chain[0] == "year"
    assert "lag" in graph.access("level", "level")


def test_free_factors():
    graph = GRAPHS["pose_graph"]
    kinds = {f.name: (f.kind, f.plates) for f in graph.factors.values()}
    assert kinds["edge"] == ("potential", ("edge",))
    assert kinds["anchor"] == ("potential", ())


def test_an_inner_product_is_one_node():
    nodes = GRAPHS["compressed_sensing"].nodes
    assert [(n.op, n.name, n.plates) for n in nodes if n.op != "variable"] == [
        ("dot", "coef", ("row",))
    ]


def test_calls_of_a_convolutional_network():
    calls = [(n.name, n.event_shape) for n in GRAPHS["lenet"].nodes if n.op == "call"]
    assert calls == [
        ("conv2d", (6, 28, 28)),
        ("relu", (6, 28, 28)),
        ("max_pool2d", (6, 14, 14)),
        ("conv2d", (16, 10, 10)),
        ("relu", (16, 10, 10)),
        ("max_pool2d", (16, 5, 5)),
        ("flatten", (400,)),
        ("linear", (10,)),
    ]


def test_parameters_of_a_model_change_its_structure():
    assert mixture(k=4).graph(POINTS).variables["z"].cardinality == 4
    assert mlp(6, width=7, classes=2).graph(DIGITS).plates["fc2.in"].size == 7


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_draws_itself(name):
    text = str(GRAPHS[name])
    assert all(v in text for v in VARIABLES[name])
    assert GRAPHS[name].to_mermaid().startswith("flowchart")
    assert GRAPHS[name].to_dot().endswith("}")


# name of the program -> what `exact` says of it: how it would run, or why it cannot
EXACT = {
    "eight_schools": "a joint Gaussian of 9 scalars over mu, theta; quadrature in 1 dimensions over tau",
    "radon": "quadrature in 3 dimensions over sd_county, sd_zip, sd_house",
    "movielens": "'taste': 12 scalars are neither discrete nor Gaussian given the rest",
    "occupancy": "'slope': 1 scalars are neither discrete nor Gaussian given the rest",
    "mixture": "'spread': 6 scalars are neither discrete nor Gaussian given the rest",
    "local_level": "a joint Gaussian of 5 scalars over level; quadrature in 2 dimensions over q, r",
    "compressed_sensing": "'rho': is a param, and exact learns no constants",
    "pose_graph": "'x': 9 scalars are neither discrete nor Gaussian given the rest",
    "mlp": "'fc1.weight': 24 scalars are neither discrete nor Gaussian given the rest",
    "lenet": "'c2.weight': 2400 scalars are neither discrete nor Gaussian given the rest",
    "churn": "'w': 12 scalars are neither discrete nor Gaussian given the rest",
}

FEW = {"particles": 8, "final_particles": 8, "replicates": 2}

# name of the program -> a block that `qem` would use
BLOCKS = {
    "eight_schools": "mu+tau",
    "radon": "mu+gamma+beta+sd_county+sd_zip+sd_house",
    "movielens": "mu+level",
    "occupancy": "present (all)",
    "mixture": "z (all)",
    "local_level": "level",
    "compressed_sensing": "x",
    "pose_graph": "x",
    "mlp": "fc1.weight",
    "lenet": "c2.weight",
    "churn": "w",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_explain_says_what_each_method_would_do(name):
    program, data = PROGRAMS[name]
    explanation = explain(program, data, sizes=SIZES.get(name))
    rows = {row.method: row for row in explanation.rows}
    assert rows["qem"].usable
    assert BLOCKS[name] in rows["qem"].note
    gaussian = name in ("eight_schools", "radon", "local_level")
    assert rows["exact"].usable == gaussian
    assert EXACT[name] in str(explanation)


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n != "lenet"])
@pytest.mark.filterwarnings("ignore:qem")  # two steps are never enough
def test_two_steps_of_qem_leave_finite_posteriors(name):
    program, data = PROGRAMS[name]
    posterior = infer(
        program, data, method="qem", sizes=SIZES.get(name), seed=0, max_iters=2, **FEW
    )
    graph = GRAPHS[name]
    for v in graph.latents:
        sizes = [graph.plates[p].size for p in v.plates]
        mean = posterior.mean(v.name)
        assert list(mean.shape) == [*sizes, *v.event_shape]
        assert mean.isfinite().all()


def test_density_of_a_robust_loop_closure_is_summed_over_the_pose():
    graph = GRAPHS["pose_graph"]
    bound = pose_graph.bind(POSES, sizes={"pose": 3})
    x = torch.randn(2, 3, 3, dtype=torch.float64)  # two particles of three poses
    axes = {v.name: v.plates for v in graph.variables.values()} | {"x": ("k", "pose")}
    compiler = Compiler(graph, axes, ["k", *graph.plates])
    out = [compiler.density(graph.factors[name]) for name in ("edge", "anchor")]
    edge, anchor = compiler.finish(out)({**bound.values, "x": x})
    i, j, measured, sd = (bound.values[n] for n in ("i", "j", "measured", "sd"))
    residual = between(x[:, i], x[:, j]) - measured
    law = Normal(residual, sd).robust("huber", 1.345)
    torch.testing.assert_close(edge, law.log_prob(torch.zeros_like(residual)).sum(-1))
    expected = torch.distributions.Normal(x[:, 0], 1e-3).log_prob(torch.tensor(0.0)).sum(-1)
    torch.testing.assert_close(anchor, expected)
