"""Lowering against a loop over elements: random programs, every family of operations, densities."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ppl
from ppl import (
    Bernoulli,
    Beta,
    Categorical,
    DataError,
    Dirichlet,
    Markov,
    Mixture,
    MultivariateNormal,
    Normal,
    deterministic,
    dot,
    factor,
    given,
    latent,
    logsumexp,
    mean,
    model,
    observe,
    operations,
    pick,
    plate,
    shift,
)
from ppl.binding import Bound
from ppl.lower import Compiler, map_name
from tests.builders import Loop

SAMPLES = {"k0": 2, "k1": 3}
M = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.2, 0.7]], dtype=torch.float64)


# ---- set-up ---------------------------------------------------------------------------------------


class Setting:
    """A model with arrays for every variable; ``samples`` gives some variables axes of particles."""

    def __init__(self, bound: Bound, samples: dict[str, tuple[str, ...]], seed: int = 0) -> None:
        self.bound, self.graph = bound, bound.graph
        self.order = (*SAMPLES, *self.graph.plates)
        self.sizes = {**SAMPLES, **{p: bound.size(p) for p in self.graph.plates}}
        self.arrays: dict[str, Tensor] = {map_name(*k): m for k, m in bound.maps.items()}
        self.axes: dict[str, tuple[str, ...]] = {}
        generator = torch.Generator().manual_seed(seed)
        for v in self.graph.variables.values():
            self.axes[v.name] = (*samples.get(v.name, ()), *v.plates)
            shape = (*(self.sizes[a] for a in self.axes[v.name]), *v.event_shape)
            known = bound.values.get(v.name)
            if known is not None:
                self.arrays[v.name] = known
            elif v.cardinality:
                draw = torch.randint(v.cardinality, shape, generator=generator)
                self.arrays[v.name] = draw.double()
            else:
                self.arrays[v.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.loop = Loop(self.graph, self.arrays, self.axes, self.sizes)

    def compiler(self, rules: str = "all", **options: object) -> Compiler:
        return Compiler(self.graph, self.axes, self.order, rules=rules, **options)

    def full(self, compiler: Compiler, out: object, axes: tuple[str, ...], cut: str = "") -> Tensor:
        aligned = compiler.align(out, axes)
        lowered = compiler.finish([aligned])
        value = lowered({k: self.arrays[k] for k in lowered.inputs})[0]
        event = value.shape[value.ndim - aligned.event_ndim :]
        sizes = {a + prime: n for a, n in self.sizes.items() for prime in ("", "'")}
        return value.expand((*(sizes[a] - (a == cut) for a in axes), *event))

    def axes_of(self, out: object, plates: tuple[str, ...]) -> tuple[str, ...]:
        return (
            *(a for a in out.axes if a in SAMPLES),
            *(p for p in self.graph.plates if p in plates),
        )

    def check_expressions(self, rules: str = "all") -> None:
        for name in self.graph.deterministics:
            compiler, f = self.compiler(rules), self.graph.factors[name]
            out = compiler.operand(f.value)
            axes = self.axes_of(out, f.plates)
            got, expected = self.full(compiler, out, axes), self.loop.table(f.value, axes)
            inside = ~expected.isnan()
            assert got.shape == expected.shape, name
            torch.testing.assert_close(
                got.double()[inside],
                expected[inside],
                rtol=1e-12,
                atol=1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )

    def check_density(self, name: str, rules: str = "all", tolerance: float = 1e-12) -> None:
        compiler, f = self.compiler(rules), self.graph.factors[name]
        out = compiler.density(f)
        axes = self.axes_of(out, f.plates)
        expected = self.loop.density(f.law, f.value, axes)
        torch.testing.assert_close(
            self.full(compiler, out, axes), expected, rtol=tolerance, atol=tolerance
        )


def setting(
    function: Callable[[], None],
    data: dict | None = None,
    samples: dict | None = None,
    **options: object,
) -> Setting:
    bound = model(function).bind(data, need_observed=False, **options)
    return Setting(bound, samples or {})


# ---- random programs ------------------------------------------------------------------------------

DATA = {
    "a": [0, 2, 1, 0, 2],
    "user": [0, 1, 2, 2, 0, 1],
    "film": [1, 0, 1, 0, 0, 1],
    "covariate": [0.3, -1.0, 0.7, 0.2, 1.1],
    "stars": [0.3, -1.0, 0.7, 0.2, 1.1, -0.4],
    "other": [2, 0, 1, 1, 0],
}

SCALARS: dict[str, Callable] = {
    "exp": lambda x, y: torch.exp(0.3 * x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "left constant": lambda x, y: 2.0 - x,
    "right constant": lambda x, y: x / 3.0,
    "tensor constant": lambda x, y: torch.tensor(1.5, dtype=torch.float64) * x,
    "quotient": lambda x, y: 1.0 / (1.0 + x * x) - y,
    "power": lambda x, y: x**2 + y,
    "add alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "where": lambda x, y: torch.where(x > 0, x, 0.5),
    "where two": lambda x, y: torch.where(x > y, 0.1 * x, y),
    "clamp": lambda x, y: x.clamp(min=-0.5, max=0.4),
    "clamp min": lambda x, y: torch.clamp(x, -0.2) + y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "difference": lambda x, y: x - y,
    "softplus": lambda x, y: functional.softplus(x) * y,
    "augmented": lambda x, y: torch.logaddexp(x, y),
}
VECTORS: dict[str, Callable] = {
    "matrix": lambda v, w, x: M @ v,
    "row": lambda v, w, x: v @ M,
    "softmax": lambda v, w, x: torch.softmax(v, -1),
    "functional softmax": lambda v, w, x: functional.softmax(v, dim=0),
    "log_softmax": lambda v, w, x: v.log_softmax(0) * 0.3,
    "cumsum": lambda v, w, x: v.cumsum(0),
    "flip": lambda v, w, x: v.flip(0),
    "broadcast": lambda v, w, x: v * x + w,
    "constant": lambda v, w, x: x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    "cat": lambda v, w, x: torch.cat([v[:1], w[1:]]),
    "stack": lambda v, w, x: torch.stack([x, v[0], w[..., -1]]),
    "stack rows": lambda v, w, x: torch.stack((v, w))[1] - x,
    "stack columns": lambda v, w, x: torch.stack((v, w), -1)[:, 0],
    "einsum": lambda v, w, x: torch.einsum("i,j->j", v, w),
    "einsum matrix": lambda v, w, x: torch.einsum("ij,j->i", M, v),
    "linear": lambda v, w, x: functional.linear(v, M, w),
    "linear rows": lambda v, w, x: functional.linear(v, torch.outer(w, w), w),
    "unsqueeze": lambda v, w, x: v.unsqueeze(0).transpose(0, 1).squeeze(1),
    "outer": lambda v, w, x: torch.outer(v, w)[0],
    "matrices": lambda v, w, x: (torch.outer(v, w) @ M)[:, 1],
    "diag": lambda v, w, x: torch.diag(v) @ w,
    "reversed": lambda v, w, x: v[[2, 0, 1]],
    "roll": lambda v, w, x: v.roll(1),
    "sort": lambda v, w, x: torch.sort(v)[0],
    "unbind": lambda v, w, x: torch.stack(torch.outer(v, w).unbind(0), 0)[2],
    "keepdim": lambda v, w, x: v - v.mean(0, keepdim=True),
    "new axis": lambda v, w, x: (v[:, None] * w[None, :]).sum(1),
}
TO_SCALAR: dict[str, Callable] = {
    "sum": lambda v, w: v.sum(),
    "sum last": lambda v, w: torch.sum(v, -1),
    "sum first": lambda v, w: torch.outer(v, w).sum(0)[1],
    "sum both": lambda v, w: torch.outer(v, w).sum((0, 1)),
    "mean": lambda v, w: v.mean(),
    "logsumexp": lambda v, w: torch.logsumexp(v, dim=0),
    "first": lambda v, w: v[0],
    "last": lambda v, w: v[-1] + w[..., 0],
    "slice": lambda v, w: v[1:].sum(-1),
    "inner": lambda v, w: v @ w,
    "dot": lambda v, w: torch.dot(v, w),
    "std": lambda v, w: v.std(),
    "variance": lambda v, w: torch.var(v, 0, correction=0),
    "amax": lambda v, w: v.amax(-1),
    "prod": lambda v, w: v.prod(),
    "norm": lambda v, w: torch.linalg.norm(v - w),
    "max": lambda v, w: v.max(0).values,
}


class Program:
    """A random model: the same seed writes the same program."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.layout = ("single", "grid", "within", "crossed")[seed % 4]
        self.used: list[str] = []

    def __call__(self) -> None:
        getattr(self, f"_{self.layout}")()

    def _sites(self, tag: str) -> tuple[list, list]:
        return [latent(f"x{tag}", Normal(0.0, 1.0))], [latent(f"v{tag}", Normal(0.0, 1.0), shape=3)]

    def _grow(self, scalars: list, vectors: list, tag: str, steps: int = 5) -> None:
        pick_one = self.random.choice
        for step in range(steps):
            kind = pick_one(["scalar", "vector", "reduce"])
            if kind == "scalar":
                name = pick_one(list(SCALARS))
                made = SCALARS[name](pick_one(scalars), pick_one(scalars))
            elif kind == "vector":
                name = pick_one(list(VECTORS))
                made = VECTORS[name](pick_one(vectors), pick_one(vectors), pick_one(scalars))
            else:
                name = pick_one(list(TO_SCALAR))
                made = TO_SCALAR[name](pick_one(vectors), pick_one(vectors))
            (vectors if kind == "vector" else scalars).append(made)
            deterministic(f"{tag}{step} {name}", made)

    def _picked(self, vectors: list, tag: str) -> list:
        z = latent(f"z{tag}", Categorical(logits=torch.zeros(3)))
        return [vectors[0][z]]

    def _single(self) -> None:
        scalars, vectors = self._sites("")
        self._grow(scalars, vectors, "top", 2)
        with plate("a", 3):
            more = self._sites("a")
            scalars, vectors = scalars + more[0], vectors + more[1]
            scalars += self._picked(vectors, "a")
            self._grow(scalars, vectors, "a")

    def _grid(self) -> None:
        scalars, vectors = self._sites("")
        a, b = plate("a", 3), plate("b", 2)
        with a:
            in_a = self._sites("a")
        with b:
            in_b = self._sites("b")
            at_a = latent("za", Categorical(logits=torch.zeros(3), over=a))
            in_b[0].append(in_a[0][0][at_a])
            in_b[1].append(in_a[1][0][at_a])
            self._grow(scalars + in_b[0], vectors + in_b[1], "b", 3)
        with a, b:
            here = self._sites("ab")
            scalars, vectors = (
                scalars + in_a[0] + in_b[0] + here[0],
                vectors + in_a[1] + in_b[1] + here[1],
            )
            self._grow(scalars, vectors, "ab")
        with b:
            inside = [mean(scalars[-1], over=a)] if "a" in scalars[-1].node.plates else []
            self._grow(in_b[0] + inside + [dot(in_a[0][0], here[0][0], over=a)], in_b[1], "in b", 3)

    def _within(self) -> None:
        scalars, vectors = self._sites("")
        a = plate("a", 3)
        n = plate("n", 5, within=a)
        with a:
            in_a = self._sites("a")
        with n:
            here = self._sites("n")
            other = given("other", index=a)
            product = here[0][0] * in_a[0][0]
            here[0].append(given("covariate"))
            here[0].append(in_a[0][0][other])
            here[1].append(in_a[1][0][other])
            all_scalars, all_vectors = scalars + in_a[0] + here[0], vectors + in_a[1] + here[1]
            all_scalars += self._picked(all_vectors, "n")
            self._grow(all_scalars, all_vectors, "n")
        with a:
            groups = [
                ppl.sum(here[0][0], over=n),
                mean(here[0][2], over=n),
                logsumexp(product, over=n),
            ]
            groups.append(dot(here[0][0], here[0][1], over=n))
            self._grow(in_a[0] + groups, in_a[1] + [mean(here[1][0], over=n)], "groups", 4)
        totals = [
            ppl.sum(here[0][0], over=n),
            logsumexp(in_a[0][0], over=a),
            dot(here[0][0], here[0][1], over=n),
        ]
        self._grow(
            scalars + totals + [pick(in_a[0][0], a=2)],
            vectors + [mean(in_a[1][0], over=a)],
            "totals",
            4,
        )

    def _crossed(self) -> None:
        scalars, vectors = self._sites("")
        user, film = plate("user", 3), plate("film", 2)
        rating = plate("rating", 6, within=(user, film))
        with user:
            in_user = self._sites("u")
        with film:
            in_film = self._sites("f")
        with rating:
            here = self._sites("r")
            here[0].append(given("stars"))
            scalars = scalars + in_user[0] + in_film[0] + here[0]
            vectors = vectors + in_user[1] + in_film[1] + here[1]
            scalars.append(in_user[1][0] @ in_film[1][0])
            scalars += self._picked([in_user[1][0]], "r")
            self._grow(scalars, vectors, "r", 6)
        with film:
            self._grow(in_film[0] + [mean(scalars[5], over=rating)], in_film[1], "film", 3)


def random_setting(seed: int) -> Setting:
    program = Program(seed)
    program.__name__ = f"program{seed}"  # type: ignore[attr-defined]
    bound = model(program).bind(DATA, need_observed=False)
    choice = random.Random(1000 + seed)
    options = [(), (), ("k0",), ("k1",), ("k0", "k1")]
    samples = {v.name: choice.choice(options) for v in bound.graph.latents}
    return Setting(bound, samples, seed)


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_equal_a_loop_over_elements(seed: int) -> None:
    made = random_setting(seed)
    made.check_expressions("all")
    made.check_expressions("vmap")


@pytest.mark.parametrize("name", [*SCALARS, *VECTORS, *TO_SCALAR])
def test_every_operation_equals_a_loop_over_elements(name: str) -> None:
    def one() -> None:
        x, v = latent("x", Normal(0.0, 1.0)), latent("v", Normal(0.0, 1.0), shape=3)
        with plate("a", 2):
            y, w = latent("y", Normal(0.0, 1.0)), latent("w", Normal(0.0, 1.0), shape=3)
            if name in SCALARS:
                deterministic("out", SCALARS[name](x, y))
            elif name in VECTORS:
                deterministic("out", VECTORS[name](v, w, y))
            else:
                deterministic("out", TO_SCALAR[name](w, v))

    made = setting(one, samples={"x": ("k0",), "v": ("k1",), "w": ("k0",)})
    made.check_expressions("all")
    made.check_expressions("vmap")


EVENTS: dict[str, Callable] = {
    "flip two": lambda m, z: m.flip(0, 1),
    "flip dims": lambda m, z: torch.flip(m, dims=(1,)),
    "permute": lambda m, z: m.permute(1, 0),
    "T": lambda m, z: m.T @ m,
    "advanced apart": lambda m, z: torch.stack([m, m + 1])[[0, 1], :, [1, 0]],
    "advanced together": lambda m, z: m[[0, 1], [1, 0]],
    "int and list": lambda m, z: torch.stack([m, m + 1])[0, :, [1, 0]],
    "mask": lambda m, z: m[torch.tensor([True, False, True])],
    "none": lambda m, z: m[:, None, 0],
    "ellipsis": lambda m, z: m[..., 1],
    "negative step": lambda m, z: m[::2, -1],
    "traced row": lambda m, z: m[z],
    "traced before": lambda m, z: m[z - 1],
    "traced both": lambda m, z: m[z, z],
    "std axes": lambda m, z: m.std((0, 1)),
    "var keep": lambda m, z: torch.var(m, dim=1, keepdim=True),
    "prod": lambda m, z: m.prod(),
    "any": lambda m, z: (m > 0).any(1).double(),
    "all": lambda m, z: (m > -1).all().double(),
    "argmax": lambda m, z: m.argmax().double(),
    "argmax row": lambda m, z: m.argmax(1).double(),
    "softmin": lambda m, z: functional.softmin(m, 1),
    "inverse": lambda m, z: torch.linalg.inv(m @ m.T + torch.eye(3, dtype=m.dtype)),
    "cholesky": lambda m, z: torch.linalg.cholesky(m @ m.T + torch.eye(3, dtype=m.dtype)),
    "trace": lambda m, z: torch.trace(m),
    "einsum trace": lambda m, z: torch.einsum("ii", m),
    "einsum implicit": lambda m, z: torch.einsum("ij,kj", m, m),
    "chunk": lambda m, z: m.chunk(3, 1)[2],
    "topk": lambda m, z: m.topk(2, 0)[0],
    "masked fill": lambda m, z: m.masked_fill(m > 0, 0.25),
    "tile": lambda m, z: m.repeat(2, 1),
    "expand": lambda m, z: m[0].expand(4, 3),
    "reshape": lambda m, z: m.reshape(-1)[4:],
    "matmul keyword": lambda m, z: torch.matmul(m, other=m),
    "stack keyword": lambda m, z: torch.stack(tensors=[m[0], m[1]], dim=1),
    "cat of ranks": lambda m, z: torch.cat([m, m[:1]], dim=-2),
    "float": lambda m, z: m.float().double() * 0 + m,
    "tensordot": lambda m, z: torch.tensordot(m, m, dims=2),
    "inner": lambda m, z: torch.inner(m, m),
    "bmm": lambda m, z: torch.bmm(m[None], m[None])[0],
    "linear matrix": lambda m, z: functional.linear(m, M, m[0]),
}


@pytest.mark.parametrize("name", EVENTS)
def test_matrix_events_equal_a_loop_over_elements(name: str) -> None:
    def one() -> None:
        z = latent("z", Categorical(logits=torch.zeros(3)))
        with plate("a", 2):
            m = latent("m", Normal(torch.zeros(3, 3), 1.0))
            deterministic("out", EVENTS[name](m, z))

    made = setting(one, samples={"z": ("k0",), "m": ("k1",)})
    made.check_expressions("all")
    made.check_expressions("vmap")


def test_three_levels_of_plates() -> None:
    def nested() -> None:
        region = plate("region", 2)
        county = plate("county", 3, within=region)
        house = plate("house", 5, within=county)
        with region:
            x = latent("x", Normal(0.0, 1.0))
        with county:
            y = latent("y", Normal(0.0, 1.0))
        with house:
            z = latent("z", Normal(0.0, 1.0))
            deterministic("all", x * y + z)
            deterministic("two", x + y)
            product = z * x
        with county:
            deterministic("of houses", mean(product, over=house))
        with region:
            deterministic("of counties", logsumexp(y, over=county))
            deterministic("of all houses", mean(product, over=house))

    made = setting(
        nested, {"region": [1, 0, 1], "county": [0, 1, 2, 2, 1]}, {"x": ("k0",), "z": ("k1",)}
    )
    made.check_expressions()


@pytest.mark.parametrize("few", [0, 4096])  # as a matrix product, and as they are
def test_sums_of_products_of_vectors_equal_a_loop_over_elements(few: int, monkeypatch) -> None:
    monkeypatch.setattr(operations, "_FEW", few)
    size = 5

    @model
    def products() -> None:
        house, room = plate("house", size), plate("room", 4)
        w = latent("w", Normal(0.0, 1.0), shape=3)
        with house:
            v = latent("v", Normal(0.0, 1.0), shape=3)
        with room:
            u = latent("u", Normal(0.0, 1.0), shape=3)
            deterministic("apart", (w * u).sum(-1))
            with house:
                deterministic("both", (u * v).sum())
                deterministic("third", 2.0 * (v * w).sum(dim=0) + (w * u * v).sum(-1))
                deterministic("own", (v * v).sum(-1))

    made = setting(products, None, {"w": ("k0",), "v": ("k1",)})
    made.check_expressions()


def test_gathers_through_an_index_with_an_event_and_from_a_grid() -> None:
    def looked_up() -> None:
        a, b = plate("a", 3), plate("b", 2)
        with a:
            x = latent("x", Normal(0.0, 1.0))
            pair = latent("pair", Normal(0.0, 1.0), shape=2)
        with b:
            y = latent("y", Normal(0.0, 1.0))
        with a, b:
            g = latent("g", Normal(0.0, 1.0))
        with plate("row", 4):
            i, j = given("i", index=a), given("j", index=b)
            deterministic("chained", x[i] * y[j])
            deterministic("of a pair", pair[i] * x[i])
            ends = given("ends", index=a)
            deterministic("of ends", x[ends].sum())
            deterministic("pairs", pair[ends])
        with b:
            z = latent("z", Categorical(logits=torch.zeros(3), over=a))
            deterministic("mixed", g[z])

    data = {"i": [0, 2, 1, 2], "j": [1, 0, 1, 1], "ends": [[0, 1], [2, 2], [1, 0], [0, 2]]}
    for samples in (
        {},
        {"x": ("k0",), "g": ("k1",)},
        {"g": ("k0",), "z": ("k0",), "pair": ("k1",)},
        {"z": ("k1",)},
    ):
        setting(looked_up, data, samples).check_expressions()


# ---- shifts ---------------------------------------------------------------------------------------


def _shifted() -> None:
    time = plate("time", 5, ordered=True)
    site = plate("site", 2)
    with time, site:
        x = latent("x", Normal(0.0, 1.0))
        factor("smooth", Normal(x, 0.3), at=shift(x, time, 1))
        factor("back", Normal(shift(x, time, -2), 0.3), at=x)
        factor("twice", Normal(shift(shift(x, time, 1), time, 1), 0.3), at=x)
        factor("there", Normal(shift(shift(x, time, 1), time, -1), 0.3), at=x)
        factor("curvature", Normal(shift(x, time, 1) - 2 * x + shift(x, time, -1), 0.5), at=0.0)
        ahead = shift(x, time, 1)
    with time:
        factor("level", Normal(mean(ahead, over=site), 0.5), at=0.2)
        factor("corner", Normal(pick(ahead, site=1), 0.5), at=0.2)


def _corners() -> None:
    scale = latent("scale", Normal(0.0, 1.0))
    with plate("site", 4):
        level = latent("level", Normal(0.0, 1.0))
        with plate("visit", 3):
            x = latent("x", Normal(0.0, 1.0), shape=2)
            grown = torch.exp(scale * x) + level / 2 - 1.0
        bent = torch.tanh(scale * level) + 3.0
        deterministic("visit", pick(grown, visit=-1))
    deterministic("site", pick(bent, site=2))


@pytest.mark.parametrize("rules", ["all", "vmap"])
def test_an_element_of_a_pointwise_value(rules: str) -> None:
    samples = {"scale": ("k0",), "level": ("k1",), "x": ("k1",)}
    setting(_corners, samples=samples).check_expressions(rules)


def test_one_element_alone_is_evaluated() -> None:
    """Combinations of all elements' particles would be made for nobody."""
    made = setting(_corners, samples={"scale": ("k0",), "level": ("k1",)})
    compiler = made.compiler()
    out = compiler.operand(made.graph.factors["site"].value)
    lowered, slots = compiler.finish([out]), {}
    for name, slot in lowered.inputs.items():
        slots[slot] = made.arrays[name]
    for step in lowered.steps:
        constants = dict(enumerate(lowered.base))
        slots[step.out] = step.run(*[slots.get(i, constants[i]) for i in step.inputs])
    assert max(t.numel() for t in slots.values()) == 4 * 3  # level itself, not 2 x 3 x 4


@pytest.mark.parametrize(
    "name", ["smooth", "back", "twice", "there", "curvature", "level", "corner"]
)
def test_elements_without_a_neighbour_drop_out(name: str) -> None:
    setting(_shifted, samples={"x": ("k0",)}).check_density(name)


def test_a_shifted_log_density_drops_its_edges() -> None:
    def potential() -> None:
        time = plate("time", 4, ordered=True)
        with time:
            x = latent("x", Normal(0.0, 1.0))
            factor("energy", -((shift(x, time) - x) ** 2))

    made = setting(potential, samples={"x": ("k0",)})
    compiler = made.compiler()
    got = made.full(compiler, compiler.density(made.graph.factors["energy"]), ("k0", "time"))
    x = made.arrays["x"]
    expected = functional.pad(-((x[:, 1:] - x[:, :-1]) ** 2), (0, 1))
    torch.testing.assert_close(got, expected)


def test_shifts_reach_plates_within_the_ordered_one() -> None:
    def within() -> None:
        time = plate("time", 3, ordered=True)
        with time:
            x = latent("x", Normal(0.0, 1.0))
            ahead = shift(x, time, 1)
        with plate("reading", 5, within=time):
            factor("near", Normal(ahead, 1.0), at=given("y"))

    made = setting(
        within, {"time": [0, 2, 1, 0, 2], "y": [0.1, 0.2, 0.3, 0.4, 0.5]}, {"x": ("k0",)}
    )
    made.check_density("near")


# ---- densities ------------------------------------------------------------------------------------


class Tent(torch.distributions.Distribution):
    """A user's own law: triangular around ``peak``."""

    arg_constraints = {"peak": torch.distributions.constraints.real}
    support = torch.distributions.constraints.real
    has_rsample = False

    def __init__(self, peak: Tensor, validate_args: bool | None = None) -> None:
        self.peak = torch.as_tensor(peak)
        super().__init__(self.peak.shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Tent:
        return Tent(self.peak.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return -torch.abs(value - self.peak)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.peak.expand((*sample_shape, *self.peak.shape)).clone()


def _spd(v: Tensor) -> Tensor:
    return torch.outer(v, v) + torch.eye(3, dtype=torch.float64)


LAWS: dict[str, Callable] = {
    "normal": lambda x, v: Normal(x, 0.5),
    "normal spread": lambda x, v: Normal(x, torch.exp(v[0])),
    "normal vector": lambda x, v: Normal(v, 0.7),
    "normal vector spreads": lambda x, v: Normal(v, torch.exp(v)),
    "normal vector of scalars": lambda x, v: Normal(x, torch.ones(3, dtype=torch.float64)),
    "covariance": lambda x, v: MultivariateNormal(v, covariance_matrix=_spd(v)),
    "precision": lambda x, v: MultivariateNormal(v, precision_matrix=_spd(v)),
    "scale_tril": lambda x, v: MultivariateNormal(v, scale_tril=torch.linalg.cholesky(_spd(v))),
    "constant tril": lambda x, v: MultivariateNormal(
        v, scale_tril=torch.eye(3, dtype=torch.float64)
    ),
    "categorical": lambda x, v: Categorical(logits=v * x),
    "dirichlet": lambda x, v: Dirichlet(torch.exp(v)),
    "beta": lambda x, v: Beta(torch.exp(x), 2.0),
    "mixture": lambda x, v: Mixture(torch.softmax(v[:2], -1), [Normal(x, 1.0), Normal(v[2], 0.3)]),
    "bernoulli": lambda x, v: Bernoulli(torch.sigmoid(x)),
    "bernoulli logits": lambda x, v: Bernoulli(logits=v),
    "foreign": lambda x, v: Tent(x),
    "foreign vector": lambda x, v: Tent(v),
    "masked": lambda x, v: Normal(x, 1.0).masked(x > 0),
    "masked vector": lambda x, v: Normal(v, 1.0).masked(torch.tensor([True, False, True])),
    "robust": lambda x, v: Normal(x, 0.2).robust("huber", 1.3),
}


def _law_setting(name: str, samples: dict, seed: int = 0) -> Setting:
    def one() -> None:
        a = plate("a", 3)
        v = latent("v", Normal(0.0, 1.0), shape=3)
        with a:
            x = latent("x", Normal(0.0, 1.0))
        with plate("n", 5, within=a):
            latent("y", LAWS[name](x, v))

    made = setting(one, {"a": [0, 2, 1, 0, 2]}, samples)
    y = made.arrays["y"]
    if name == "dirichlet":
        made.arrays["y"] = y.softmax(-1)
    elif name == "beta":
        made.arrays["y"] = y.sigmoid()
    return made


@pytest.mark.parametrize(
    "samples",
    [{}, {"x": ("k0",), "v": ("k1",)}, {"y": ("k1",), "v": ("k0",)}, {"y": ("k0",), "x": ("k0",)}],
)
@pytest.mark.parametrize("name", LAWS)
def test_densities_equal_a_loop_over_elements(name: str, samples: dict) -> None:
    _law_setting(name, samples).check_density("y", tolerance=1e-10)


@pytest.mark.parametrize("rules", ["all", "vmap"])
@pytest.mark.parametrize("scalar", ["none", "loc", "scale"])
def test_the_inner_product_of_normals_keeps_its_digits_under_a_large_offset(
    rules: str, scalar: str
) -> None:
    def far() -> None:
        loc = latent("loc", Normal(1e3, 0.1), **({} if scalar == "loc" else {"shape": 4}))
        with plate("a", 2):
            scale = latent("scale", Normal(0.0, 1.0), **({} if scalar == "scale" else {"shape": 4}))
            latent("y", Normal(loc, scale), shape=4)

    made = setting(far, samples={"loc": ("k0",), "y": ("k1",)})
    made.arrays["loc"] = 1e3 + 0.1 * made.arrays["loc"]
    made.arrays["y"] = 1e3 + 0.1 * made.arrays["y"]
    made.arrays["scale"] = 0.1 * made.arrays["scale"].exp()
    made.check_density("y", rules, tolerance=1e-10)


def test_free_factors() -> None:
    def free() -> None:
        a = plate("a", 3)
        v = latent("v", Normal(0.0, 1.0), shape=3)
        with a:
            x = latent("x", Normal(0.0, 1.0))
            factor("energy", -((v - x) ** 2))
            factor("law", Normal(v, 0.5), at=x * v)
        factor("total", Normal(ppl.sum(x, over=a), 0.1), at=1.0)

    made = setting(free, samples={"x": ("k0",), "v": ("k1",)})
    made.check_density("law", tolerance=1e-10)
    made.check_density("total", tolerance=1e-10)
    compiler, f = made.compiler(), made.graph.factors["energy"]
    axes = ("k0", "k1", "a")
    expected = made.loop.table(f.value, axes).sum(-1)
    torch.testing.assert_close(made.full(compiler, compiler.density(f), axes), expected)


# ---- missing entries ------------------------------------------------------------------------------


def _masked(law: Callable, y: Tensor, samples: dict) -> tuple[Setting, Tensor]:
    def seen() -> None:
        v = latent("v", Normal(0.0, 1.0), shape=3)
        with plate("a"):
            observe("y", law(v))

    made = setting(seen, {"y": y}, samples)
    made.arrays["y@mask"] = made.bound.masks["y"]
    compiler = made.compiler(masks=["y"])
    out = compiler.density(made.graph.factors["y"])
    return made, made.full(compiler, out, made.axes_of(out, ("a",)))


NAN = float("nan")
ROWS = torch.tensor(
    [[0.5, NAN, -1.0], [NAN, NAN, NAN], [0.1, 0.2, 0.3], [NAN, 0.4, NAN]], dtype=torch.float64
)


def test_missing_scalars_count_nothing() -> None:
    y = torch.tensor([0.5, NAN, -1.0], dtype=torch.float64)
    made, got = _masked(lambda v: Normal(v[0], 0.5), y, {"v": ("k0",)})
    plain = torch.distributions.Normal(made.arrays["v"][:, :1], 0.5).log_prob(torch.nan_to_num(y))
    torch.testing.assert_close(got, torch.where(y.isnan(), 0.0, plain))


@pytest.mark.parametrize(
    "law", [lambda v: Normal(v, 0.5), lambda v: Tent(v)], ids=["normal", "foreign"]
)
def test_missing_entries_of_a_vector_leave_the_others(law: Callable) -> None:
    made, got = _masked(law, ROWS, {"v": ("k0",)})
    for k in range(SAMPLES["k0"]):
        for row in range(len(ROWS)):
            terms = law(made.arrays["v"][k]).log_prob(torch.nan_to_num(ROWS[row]))
            assert abs(got[k, row] - terms[~ROWS[row].isnan()].sum()) < 1e-12


@pytest.mark.parametrize("name", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_missing_entries_of_a_correlated_vector_leave_the_exact_marginal(name: str) -> None:
    spread = M @ M.mT + torch.eye(3, dtype=torch.float64)
    matrix = {
        "covariance_matrix": spread,
        "precision_matrix": spread.inverse(),
        "scale_tril": torch.linalg.cholesky(spread),
    }[name]
    made, got = _masked(lambda v: MultivariateNormal(v, **{name: matrix}), ROWS, {"v": ("k0",)})
    for k in range(SAMPLES["k0"]):
        for row in range(len(ROWS)):
            there = ~ROWS[row].isnan()
            if not there.any():
                assert got[k, row] == 0.0
                continue
            block = torch.distributions.MultivariateNormal(
                made.arrays["v"][k][there], spread[there][:, there]
            )
            assert abs(got[k, row] - block.log_prob(ROWS[row][there])) < 1e-10


def test_partly_missing_joint_events_without_a_marginal_are_refused() -> None:
    @model
    def shares():
        with plate("a"):
            observe("y", Dirichlet(torch.ones(2)))

    with pytest.raises(DataError, match="'y'"):
        shares.bind({"y": [[0.5, 0.5], [NAN, 0.3]]})


# ---- chains ---------------------------------------------------------------------------------------


def _walk() -> None:
    rate = latent("rate", Normal(0.0, 1.0))
    time = plate("time", 4, ordered=True)
    with time:
        push = given("push")
        average = mean(push, over=time)
        behind = shift(push, time, -1)
    first = pick(push, time=0)
    with plate("site", 2):
        base = latent("base", Normal(0.0, 1.0))
        with time:
            latent(
                "plain", Markov(Normal(base, 1.0), lambda before: Normal(rate * before + push, 0.5))
            )
            latent(
                "pooled",
                Markov(Normal(base, 1.0), lambda before: Normal(before + average + first, 0.5)),
            )
            latent("lagged", Markov(Normal(0.0, 1.0), lambda before: Normal(before + behind, 0.5)))
            latent(
                "pair", Markov(Normal(torch.zeros(3), 1.0), lambda before: Normal(M @ before, 0.5))
            )


@pytest.mark.parametrize("name", ["plain", "pooled", "lagged", "pair"])
@pytest.mark.parametrize("rules", ["all", "vmap"])
def test_chains_equal_a_loop_over_time(name: str, rules: str) -> None:
    made = setting(_walk, {"push": [0.1, 0.5, -0.3, 0.2]}, {"rate": ("k0",)})
    f = made.graph.factors[name]
    compiler = made.compiler(rules)
    out = compiler.transition(f)
    samples = tuple(a for a in out.axes if a in SAMPLES)
    axes = (*samples, *(p for p in made.graph.plates if p in f.plates))
    got = made.full(compiler, out, axes, cut="time")
    torch.testing.assert_close(got, made.loop.transition(f, axes), rtol=1e-12, atol=1e-12)
    compiler = made.compiler(rules)
    first = compiler.density(f)
    at = made.arrays[name].select(made.axes[name].index("time"), 0)
    loc = made.arrays["base"] if name in ("plain", "pooled") else torch.zeros(())
    expected = torch.distributions.Normal(loc, 1.0).log_prob(at)
    expected = expected.sum(-1) if name == "pair" else expected
    torch.testing.assert_close(made.full(compiler, first, ("site",)), expected.expand(2))


def test_particles_of_a_chain_meet_the_particles_before_them() -> None:
    def walk() -> None:
        with plate("time", 4, ordered=True):
            latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(0.9 * before, 0.5)))

    made = setting(walk, samples={"x": ("k0",)})
    made.order = ("k0", "k0'", "time")
    compiler = made.compiler()
    out = compiler.transition(made.graph.factors["x"])
    got = made.full(compiler, out, ("k0", "k0'", "time"), cut="time")
    x = made.arrays["x"]
    expected = torch.distributions.Normal(0.9 * x[None, :, :-1], 0.5).log_prob(x[:, None, 1:])
    torch.testing.assert_close(got, expected)


def test_an_enumerated_chain_has_the_same_values_everywhere() -> None:
    table = torch.tensor([[0.1, 0.7], [0.4, -0.2]], dtype=torch.float64)

    def hidden() -> None:
        rates = latent("rates", Normal(0.0, 1.0), shape=2)
        with plate("time", 4, ordered=True):
            moves = Markov(
                Categorical(logits=table[0]), lambda before: Categorical(logits=table[before])
            )
            state = latent("state", moves)
            observe("y", Normal(rates[state], 0.5))

    made = setting(hidden, {"y": [0.1, 0.2, 0.3, 0.4]}, {"rates": ("k1",)})
    made.axes["state"], made.arrays["state"] = ("s",), torch.arange(2.0, dtype=torch.float64)
    made.order, made.sizes = ("k1", "s", "s'", "time"), {**made.sizes, "s": 2}
    compiler = made.compiler()
    out = compiler.transition(made.graph.factors["state"])
    got = made.full(compiler, out, ("s", "s'"))
    torch.testing.assert_close(got, table.log_softmax(-1).mT)
    compiler = made.compiler()
    got = made.full(compiler, compiler.density(made.graph.factors["y"]), ("k1", "s", "time"))
    y, rates = made.arrays["y"], made.arrays["rates"]
    torch.testing.assert_close(got, torch.distributions.Normal(rates[:, :, None], 0.5).log_prob(y))


# ---- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_fixing_inputs_first_gives_the_same(seed: int) -> None:
    made = random_setting(seed)
    compiler = made.compiler()
    outs = [compiler.operand(made.graph.factors[n].value) for n in made.graph.deterministics]
    outs += [compiler.density(f) for f in made.graph.densities]
    lowered = compiler.finish(outs)
    inputs = {k: made.arrays[k] for k in lowered.inputs}
    static = {k: v for i, (k, v) in enumerate(inputs.items()) if i % 2 == 0}
    rest = {k: v for k, v in inputs.items() if k not in static}
    fixed = lowered.given(static)
    assert set(fixed.inputs) == set(rest)
    for _ in range(2):  # the fixed function keeps no result of a call
        for a, b in zip(fixed(rest), lowered(inputs), strict=True):
            assert torch.equal(a, b)
    everything = lowered.given(inputs)
    assert not everything.steps and not everything.inputs


def test_single_precision_stays_single() -> None:
    def one() -> None:
        with plate("a", 3):
            x = latent("x", Normal(0.0, 1.0))
            v = latent("v", Normal(0.1, 1.0), shape=3)
            deterministic("out", (M @ v + 0.3).float().logsumexp(-1) + torch.tensor(0.5) * x)
            latent("y", Normal(v, torch.exp(x)))
            latent("m", MultivariateNormal(v, scale_tril=torch.eye(3)))

    made = setting(one, samples={"x": ("k0",)})
    exact = {
        n: made.loop.density(made.graph.factors[n].law, made.graph.factors[n].value, ("k0", "a"))
        for n in "ym"
    }
    made.arrays = {k: v.float() for k, v in made.arrays.items()}
    for name in ("y", "m"):
        compiler = made.compiler(dtype=torch.float32)
        got = made.full(compiler, compiler.density(made.graph.factors[name]), ("k0", "a"))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact[name], rtol=1e-5, atol=1e-5)
    compiler = made.compiler(dtype=torch.float32)
    out = compiler.operand(made.graph.factors["out"].value)
    assert made.full(compiler, out, ("k0", "a")).dtype == torch.float32
