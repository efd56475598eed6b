"""The contraction engine against enumeration of every combination of particle indices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from ppl.errors import DataError, NumericalError, UnsupportedError
from ppl.inference import elimination, program
from ppl.inference.contract import (
    Chain,
    Layout,
    LogFactor,
    PlateSpec,
    make_plan,
    suggest_groups,
)
from ppl.inference.logspace import log_matmul, log_sum

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Case(NamedTuple):
    layout: Layout
    scopes: list[tuple[str, ...]]
    plates_of: list[tuple[str, ...]] | None = None

    def plan(self, **options):
        return make_plan(self.scopes, self.layout, plates_of=self.plates_of, **options)

    def factors(self, *, std: float = 1.0, dtype: torch.dtype = torch.float64) -> list[LogFactor]:
        return [LogFactor(s, std * torch.randn(self.shape(s), dtype=dtype)) for s in self.scopes]

    def shape(self, scope: tuple[str, ...]) -> list[int]:
        sizes = {**self.layout.sizes, **{p: s.size for p, s in self.layout.plates.items()}}
        for chain in self.layout.chains:
            sizes[chain.previous] = sizes[chain.axis]
        shorter = {c.plate for c in self.layout.chains if c.previous in scope}
        return [sizes[a] - (a in shorter) for a in scope]


def plates(**specs) -> dict[str, PlateSpec]:
    """``house=(5, {"zip": [0, 0, 1, 1, 1]})`` or ``county=3``."""
    made = {}
    for name, spec in specs.items():
        size, parents = spec if isinstance(spec, tuple) else (spec, {})
        made[name] = PlateSpec(name, size, {p: torch.tensor(m) for p, m in parents.items()})
    return made


def case(made, sizes, owners, scopes, plates_of=None, **more) -> Case:
    split = [tuple(s.split()) for s in scopes]
    lives = {a: tuple(p.split()) for a, p in owners.items()}
    over = [tuple(p.split()) for p in plates_of] if plates_of else None
    return Case(Layout(made, sizes, lives, **more), split, over)


RAGGED = {"county": 2, "zip": (3, {"county": [0, 1, 1]}), "house": (5, {"zip": [2, 0, 0, 1, 2]})}
STEPS = (Chain("t", "x", "x'"),)
CASES = {
    "one": case({}, {"a": 3}, {"a": ""}, ["a"]),
    "no latents": case(plates(n=3), {}, {}, ["n"]),
    "chain graph": case({}, dict(a=2, b=3, c=4), dict(a="", b="", c=""), ["a", "a b", "c b"]),
    "fork": case({}, dict(a=2, b=3, c=4), dict(a="", b="", c=""), ["a", "b a", "a c", "c"]),
    "collider": case({}, dict(a=2, b=3, c=4), dict(a="", b="", c=""), ["a", "b", "c b a"]),
    "loop": case(
        {},
        dict(a=2, b=3, c=2, d=3),
        dict(a="", b="", c="", d=""),
        ["a b", "b c", "c d", "d a", "a"],
    ),
    "disconnected and unmentioned": case(
        {}, dict(a=2, b=3, c=2), dict(a="", b="", c=""), ["a", "b"]
    ),
    "nested grid": case(
        plates(p=2, q=2),
        dict(m=2, z=2, w=2),
        dict(m="", z="p", w="p q"),
        ["m", "p z m", "q p w z", "p q w", "m z w"],
        ["", "p", "p q", "p q", "p q"],
    ),
    "sibling plates": case(
        plates(p=3, q=2),
        dict(m=2, z=2, w=3, late=2),
        dict(m="", z="p", w="q", late=""),
        ["m", "p m z", "q w m", "q w", "m late"],
    ),
    "ragged two levels": case(
        plates(**RAGGED),
        dict(m=3, c=2, z=2, h=2),
        dict(m="", c="county", z="zip", h="house"),
        ["m", "county m c", "zip z c", "house h z m", "house h"],
    ),
    "ragged, far ancestors, no latent between": case(
        plates(**RAGGED),
        dict(m=3, c=2, z=2),
        dict(m="", c="county", z="zip"),
        ["m", "c m", "z c", "house z m", "house c", "house m"],
        ["", "county", "zip", "house", "house", "house"],
    ),
    "ancestor's axis meets a deeper factor": case(
        plates(**RAGGED),
        dict(c=2, h=2),
        dict(c="county", h="house"),
        ["county c", "county c h", "house h", "county h", "county h c"],
        ["county", "house", "house", "house", "house"],
    ),
    "repeated without an axis": case(
        plates(**RAGGED, p=3),
        dict(m=2, c=3, z=2),
        dict(m="", c="county", z="zip"),
        ["", "m", "m", "county m c", "c", "zip z", "z c", "", "county", "county c", "m"],
        ["", "", "p", "county", "house", "zip", "house", "house", "house", "house", "p zip"],
    ),
    "two parents of one plate": case(
        plates(user=2, film=3, rating=(5, {"user": [0, 0, 1, 1, 1], "film": [0, 1, 1, 2, 2]})),
        dict(m=2, u=2, r=3),
        dict(m="", u="user", r="rating"),
        ["m", "user u m", "rating r u", "rating film"[:6], "film m", "user film"],
    ),
    "grid over a ragged plate": case(
        plates(county=2, house=(3, {"county": [1, 0, 1]}), day=2),
        dict(c=2, d=2, h=2),
        dict(c="county", d="", h="house day"),
        ["county c", "d", "day house h c", "h d", "day county h"],
        ["county", "", "day house", "day house", "day house"],
    ),
    "empty group": case(
        plates(county=3, house=(3, {"county": [2, 0, 2]})),
        dict(c=2, h=2),
        dict(c="county", h="house"),
        ["county c", "house c h", "c"],
        ["county", "house", "house"],
    ),
    "series": case(plates(t=4), dict(x=3), dict(x="t"), ["x", "t x' x", "t x"], chains=STEPS),
    "series, homogeneous": case(
        plates(t=4), dict(x=3), dict(x="t"), ["x", "x x'", "x"], ["", "t", "t"], chains=STEPS
    ),
    "series without data": case(plates(t=3), dict(x=3), dict(x="t"), ["x", "x x' t"], chains=STEPS),
    "series of one": case(plates(t=1), dict(x=3), dict(x="t"), ["x", "t x"], chains=STEPS),
    "series of one, no data": case(
        plates(t=1), dict(x=3, a=2), dict(x="t", a=""), ["a x"], chains=STEPS
    ),
    "series of one, empty transition": case(
        plates(t=1), dict(x=3), dict(x="t"), ["x", "t x' x", "t x"], chains=STEPS
    ),
    "series, start in a block of its own": case(
        plates(t=3),
        dict(x=2, i=3, s=2),
        dict(x="t", i="", s=""),
        ["i", "i s", "i x", "t s x' x", "t x"],
        chains=STEPS,
    ),
    "series, start in a shared block": case(
        plates(t=3), dict(x=2, g=3), dict(x="t", g=""), ["g", "g x", "t g x' x"], chains=STEPS
    ),
    "series in a plate, with plates below": case(
        plates(region=2, t=3, obs=(4, {"t": [0, 2, 2, 1]})),
        dict(g=2, r=2, x=2),
        dict(g="", r="region", x="region t"),
        ["g", "region r g", "x region r", "region t x' x g", "x region obs r", "t region x"],
        chains=STEPS,
    ),
    "series, latents below and at each time": case(
        plates(t=3, obs=(4, {"t": [0, 2, 2, 1]})),
        dict(x=2, n=2, o=2, g=2),
        dict(x="t", n="t", o="obs", g=""),
        ["g", "x", "t x' x g", "t n", "t n x", "obs o x n", "obs o"],
        chains=STEPS,
    ),
    "series, switch inside the transition": case(
        plates(t=4),
        dict(x=2, s=3),
        dict(x="t", s="t"),
        ["x", "t x' s x", "t s", "t x"],
        chains=STEPS,
    ),
    "coupled series": case(
        plates(t=3),
        dict(x=2, y=3),
        dict(x="t", y="t"),
        ["x", "y", "t x' x", "t y' y x'", "t x y", "t y x y'"],
        chains=(*STEPS, Chain("t", "y", "y'")),
    ),
    "coupled series with a switch": case(
        plates(t=3),
        dict(x=2, y=2, s=2),
        dict(x="t", y="t", s="t"),
        ["x", "y", "t x' x s", "t y' y s x'", "t s"],
        chains=(*STEPS, Chain("t", "y", "y'")),
    ),
    "series, first state observed over a plate": case(
        plates(t=3, obs=2),
        dict(x=2, e=2),
        dict(x="t", e="obs"),
        ["x", "obs e x", "obs e", "t x' x"],
        chains=STEPS,
    ),
    "series over households": case(
        plates(city=2, home=(3, {"city": [1, 0, 1]}), t=2),
        dict(c=2, x=2),
        dict(c="city", x="home t"),
        ["city c", "city x", "home t x' x", "city t x c"],
        ["city", "home", "home t", "home t"],
        chains=STEPS,
    ),
}


# ---- enumeration ----


def above(layout: Layout, plate: str) -> set[str]:
    direct = set(layout.plates[plate].parents)
    return direct.union(*(above(layout, p) for p in direct))


def inner(layout: Layout, names) -> list[str]:
    """Plates of ``names`` that lie above no other of them, in the order of the layout."""
    hidden = set().union(*(above(layout, p) for p in names))
    return [p for p in layout.plates if p in set(names) - hidden]


def element(layout: Layout, at: dict[str, int], plate: str) -> int:
    if plate in at:
        return at[plate]
    for name, i in at.items():
        found = dict(climb(layout, name, i))
        if plate in found:
            return found[plate]
    raise KeyError(plate)


def climb(layout: Layout, name: str, i: int):
    for parent, member in layout.plates[name].parents.items():
        yield parent, int(member[i])
        yield from climb(layout, parent, int(member[i]))


class Enumeration:
    """The joint log-weight of all indices, one dimension for each copy of each particle axis."""

    def __init__(self, case: Case, factors: list[LogFactor]) -> None:
        self.layout = case.layout
        self.copies: list[tuple] = []
        for axis, owners in case.layout.owners.items():
            grid = [range(case.layout.plates[p].size) for p in inner(case.layout, owners)]
            self.copies += [(axis, *at) for at in itertools.product(*grid)]
        self.log = torch.zeros([case.layout.sizes[c[0]] for c in self.copies], dtype=torch.float64)
        over = case.plates_of or [()] * len(case.scopes)
        for scope, factor, names in zip(case.scopes, factors, over, strict=True):
            self._add(scope, factor.log, names)
        flat = self.log.reshape(-1)
        self.log_z = flat.logsumexp(0)

    def _add(self, scope, log, names) -> None:
        layout = self.layout
        moves = {c.plate for c in layout.chains if c.previous in scope}
        starts = {c.axis: c.plate for c in layout.chains if c.plate not in moves}
        spread = {*names, *(a for a in scope if a in layout.plates)}
        for axis in scope:
            first = starts.get(axis) is not None and not self._covers(spread, starts[axis])
            spread |= {p for p in layout.owners.get(axis, ()) if not first or p != starts[axis]}
        moving = {c.previous: c for c in layout.chains if c.previous in scope}
        shorter = {c.plate for c in moving.values()}
        outer = inner(layout, spread)
        for at in itertools.product(
            *[range(layout.plates[p].size - (p in shorter)) for p in outer]
        ):
            where = dict(zip(outer, at, strict=True))
            self._add_at(scope, log, where, moving, shorter)

    def _covers(self, spread, plate) -> bool:
        return any(p == plate or plate in above(self.layout, p) for p in spread)

    def _add_at(self, scope, log, where, moving, shorter) -> None:
        layout = self.layout
        later = {p: i + (p in shorter) for p, i in where.items()}
        index, dims = [], []
        for axis in scope:
            if axis in layout.plates:
                index.append(element(layout, where, axis))
                continue
            index.append(slice(None))
            name = moving[axis].axis if axis in moving else axis
            at = where if axis in moving else later
            known = at if all(self._covers(at, p) for p in layout.owners[name]) else None
            dims.append(self._copy(name, at, known is None))
        part = log[tuple(index)]
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        shape = [1] * len(self.copies)
        for d in dims:
            shape[d] = self.log.shape[d]
        self.log = self.log + part.permute(order).reshape(shape)

    def _copy(self, name, at, first) -> int:
        layout = self.layout
        time = {c.plate for c in layout.chains if c.axis == name} if first else set()
        place = [
            0 if p in time else element(layout, at, p) for p in inner(layout, layout.owners[name])
        ]
        return self.copies.index((name, *place))

    def joint(self, *copies) -> Tensor:
        """Posterior of some copies, in that order."""
        keep = [self.copies.index(c) for c in copies]
        rest = [d for d in range(self.log.ndim) if d not in keep]
        p = (self.log - self.log_z).exp()
        p = p.sum(rest) if rest else p
        order = sorted(keep)
        return p.permute([order.index(d) for d in keep])


# ---- against enumeration ----


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chain", ["scan", "tree"])
def test_evidence_and_marginals_equal_enumeration(name, chain):
    model = CASES[name]
    factors = model.factors()
    truth = Enumeration(model, factors)
    plan = model.plan(chain=chain)
    torch.testing.assert_close(plan.log_evidence(factors), truth.log_z, **TIGHT)
    log_z, weights = plan.marginals(factors)
    torch.testing.assert_close(log_z, truth.log_z, **TIGHT)
    assert set(weights) == set(model.layout.owners)
    for axis, w in weights.items():
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w.sum(-1)), **TIGHT)
        for copy in [c for c in truth.copies if c[0] == axis]:
            torch.testing.assert_close(w[copy[1:]], truth.joint(copy), **TIGHT)


def random_case(seed: int) -> Case:
    """Plates of random nesting, latents in random contexts, factors over random visible latents."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n):
        return int(torch.randint(n, (), generator=generator))

    made = {"a": PlateSpec("a", 2), "d": PlateSpec("d", 2)}
    made["b"] = PlateSpec("b", 3, {"a": torch.tensor([pick(2) for _ in range(3)])})
    made["c"] = PlateSpec("c", 3, {"b": torch.tensor([pick(3) for _ in range(3)])})
    homes = [(), (), ("a",), ("b",), ("c",), ("d",), ("b", "d")]
    inside = {(): {()}, ("a",): {(), ("a",)}, ("b",): {(), ("a",), ("b",)}, ("d",): {(), ("d",)}}
    inside[("c",)] = {(), ("a",), ("b",), ("c",)}
    inside[("b", "d")] = {(), ("a",), ("b",), ("b", "d")}
    owners, entries = {}, 1
    for i in range(7):
        home, size = homes[pick(len(homes))], 2 + pick(2)
        entries *= size ** math.prod(made[p].size for p in home)
        if entries > 3e5:
            break
        owners[f"k{i}"] = (home, size)
    scopes, over = [], []
    for _ in range(8):
        home = homes[pick(len(homes))]
        seen = [k for k, (h, _) in owners.items() if h in inside[home]]
        chosen = [k for k in seen if pick(2)][:3]
        carried = [p for p in home if pick(3)]
        scope = [*chosen, *carried]
        order = torch.randperm(len(scope), generator=generator).tolist()
        scopes.append(tuple(scope[j] for j in order))
        over.append(home)
    lives = {k: h for k, (h, _) in owners.items()}
    return Case(Layout(made, {k: s for k, (_, s) in owners.items()}, lives), scopes, over)


@pytest.mark.parametrize("seed", range(40))
def test_random_models_equal_enumeration(seed):
    model = random_case(seed)
    factors = model.factors()
    truth = Enumeration(model, factors)
    try:
        log_z, weights = model.plan().marginals(factors)
    except UnsupportedError as error:
        assert "crossing" in str(error)
        pytest.skip("a random model that crosses")
    torch.testing.assert_close(log_z, truth.log_z, **TIGHT)
    for copy in truth.copies:
        torch.testing.assert_close(weights[copy[0]][copy[1:]], truth.joint(copy), **TIGHT)


@pytest.mark.parametrize("particles_first", [False, True])
@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_some_weights_are_those_of_all(seed, particles_first):
    model = random_case(seed)
    factors = model.factors()
    layout = dataclasses.replace(model.layout, particles_first=particles_first)
    plan = make_plan(model.scopes, layout, plates_of=model.plates_of)
    try:
        log_z, everything = plan.marginals(factors)
    except UnsupportedError:
        pytest.skip("a random model that crosses")
    one = next(iter(everything))
    again, some = plan.marginals(factors, only=frozenset([one]))
    assert list(some) == [one]
    torch.testing.assert_close(again, log_z, **TIGHT)
    torch.testing.assert_close(some[one], everything[one], **TIGHT)
    torch.testing.assert_close(log_z, model.plan().log_evidence(factors), **TIGHT)


def test_joint_marginals_equal_enumeration():
    model = CASES["ragged two levels"]
    factors = model.factors()
    truth = Enumeration(model, factors)
    pairs = [("m", "c"), ("h", "z"), ("c", "h"), ("m", "h")]
    _, weights = model.plan().marginals(factors, joint=pairs)
    house_in_county = model.layout.plates["zip"].parents["county"][
        model.layout.plates["house"].parents["zip"]
    ]
    for h, z in enumerate(model.layout.plates["house"].parents["zip"].tolist()):
        c = int(house_in_county[h])
        torch.testing.assert_close(weights["h", "z"][h], truth.joint(("h", h), ("z", z)), **TIGHT)
        torch.testing.assert_close(weights["c", "h"][h], truth.joint(("c", c), ("h", h)), **TIGHT)
        torch.testing.assert_close(weights["m", "h"][h], truth.joint(("m",), ("h", h)), **TIGHT)
    torch.testing.assert_close(weights["m", "c"].sum(-1), weights["m"].expand(2, 3), **TIGHT)


@pytest.mark.parametrize("chain", ["scan", "tree"])
def test_joint_marginals_of_neighbouring_states(chain):
    model = CASES["series, start in a shared block"]
    factors = model.factors()
    truth = Enumeration(model, factors)
    _, weights = model.plan(chain=chain).marginals(factors, joint=[("x'", "x"), ("x", "g")])
    for t in range(3):
        torch.testing.assert_close(weights["x", "g"][t], truth.joint(("x", t), ("g",)), **TIGHT)
        if t:
            pair = truth.joint(("x", t - 1), ("x", t))
            torch.testing.assert_close(weights["x'", "x"][t - 1], pair, **TIGHT)


# ---- draws ----


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("memory", [None, "split"])
def test_draws_follow_the_enumerated_joint(name, memory):
    """Pearson's statistic of every pair of copies, over time and over plates; fails once in 1e7."""
    model, n = CASES[name], 4000
    factors = model.factors()
    truth = Enumeration(model, factors)
    plan = split_plan(model) if memory else model.plan()
    if plan is None or not model.layout.owners:
        pytest.skip("nothing to split")
    drawn = plan.draw(factors, n, torch.Generator().manual_seed(7))
    assert set(drawn) == set(model.layout.owners)
    for pair in itertools.combinations(truth.copies, min(2, len(truth.copies))):
        expected = n * truth.joint(*pair)
        flat = torch.zeros(n, dtype=torch.long)
        for copy in pair:
            index = drawn[copy[0]][(slice(None), *copy[1:])]
            flat = flat * model.layout.sizes[copy[0]] + index
        count = torch.bincount(flat, minlength=expected.numel()).reshape(expected.shape)
        keep = expected > 5
        statistic = ((count - expected)[keep] ** 2 / expected[keep]).sum()
        assert statistic < chi2.isf(1e-7, max(int(keep.sum()), 1)), (pair, count, expected)


def test_draws_whole_joint_of_a_series():
    model, n = CASES["series, start in a shared block"], 20000
    factors = model.factors()
    truth = Enumeration(model, factors)
    drawn = model.plan().draw(factors, n, torch.Generator().manual_seed(3))
    flat = torch.zeros(n, dtype=torch.long)
    for name, *at in truth.copies:
        flat = flat * model.layout.sizes[name] + drawn[name][(slice(None), *at)]
    expected = n * truth.joint(*truth.copies).reshape(-1)
    count = torch.bincount(flat, minlength=len(expected))
    assert ((count - expected) ** 2 / expected).sum() < chi2.isf(1e-7, len(expected) - 1)


def test_draws_never_hit_probability_zero():
    model = CASES["chain graph"]
    factors = model.factors()
    factors[1].log[0, 1:] = -torch.inf
    factors[0].log[1] = -torch.inf
    before = torch.get_rng_state()
    drawn = model.plan().draw(factors, 500, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not drawn["a"].any()
    assert not drawn["b"].any()


def test_draws_in_small_portions_follow_the_same_joint(monkeypatch):
    monkeypatch.setattr(program, "_DRAW_ELEMENTS", 300)
    model, n = CASES["series, latents below and at each time"], 2000
    factors = model.factors()
    truth = Enumeration(model, factors)
    drawn = model.plan().draw(factors, n, torch.Generator().manual_seed(5))
    expected = n * truth.joint(("x", 0), ("x", 1), ("n", 1))
    flat = 4 * drawn["x"][:, 0] + 2 * drawn["x"][:, 1] + drawn["n"][:, 1]
    count = torch.bincount(flat, minlength=8).reshape(2, 2, 2)
    assert ((count - expected) ** 2 / expected).sum() < chi2.isf(1e-7, 7)


def test_draws_refuse_batch_axes():
    model = case({}, dict(a=2, r=3), dict(a=""), ["r a"], batch=("r",))
    with pytest.raises(UnsupportedError, match="select one element"):
        model.plan().draw(model.factors(), 3)


# ---- numerics ----


def test_zero_probabilities_have_zero_gradient():
    model = CASES["ragged two levels"]
    factors = [LogFactor(f.axes, f.log.clone()) for f in model.factors()]
    factors[1].log[0, 1, :] = -torch.inf  # a whole slice of the first county is impossible
    factors[3].log[2, 0] = -torch.inf
    leaves = [LogFactor(f.axes, f.log.requires_grad_()) for f in factors]
    log_z = model.plan().log_evidence(leaves)
    log_z.backward()
    torch.testing.assert_close(log_z.detach(), Enumeration(model, leaves).log_z.detach(), **TIGHT)
    for leaf in leaves:
        assert leaf.log.grad.isfinite().all()
        assert (leaf.log.grad[leaf.log == -torch.inf] == 0).all()


def test_gradient_of_a_series_with_zeros():
    model = CASES["series"]
    factors = model.factors()
    factors[1].log[1, :, 0] = -torch.inf
    factors[2].log[3, 2] = -torch.inf
    truth = Enumeration(model, factors)
    for chain in ("scan", "tree"):
        _, weights = model.plan(chain=chain).marginals(factors)
        for copy in truth.copies:
            torch.testing.assert_close(weights["x"][copy[1:]], truth.joint(copy), **TIGHT)


def test_impossible_evidence_is_minus_infinity_and_has_no_marginals():
    model = case(plates(county=3), dict(m=2, c=2), dict(m="", c="county"), ["m", "county m c"])
    factors = model.factors()
    factors[1].log[1] = -torch.inf
    assert model.plan().log_evidence(factors) == -torch.inf
    with pytest.raises(NumericalError, match=r"weights over c, m are zero at county 1"):
        model.plan().marginals(factors)
    with pytest.raises(NumericalError, match="county 1"):
        model.plan().draw(factors, 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinite_factors_are_named(value):
    model = CASES["sibling plates"]
    factors = model.factors()
    factors[2].log[1, 0, 1] = value
    with pytest.raises(NumericalError, match=r"log-factor 2 over \['q', 'w', 'm'\].*q 1, w 0, m 1"):
        model.plan().log_evidence(factors)


@pytest.mark.parametrize("std", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrix_product_equals_plain_sum(std, dtype):
    a = std * torch.randn(3, 40, 20, dtype=dtype)
    b = std * torch.randn(3, 20, 30, dtype=dtype)
    a[0, 3], b[1, :, 2], a[2, 1, :10] = -torch.inf, -torch.inf, -torch.inf
    plain_inputs = [x.double().clone().requires_grad_() for x in (a, b)]
    inputs = [x.clone().requires_grad_() for x in (a, b)]
    plain = log_sum(plain_inputs[0].unsqueeze(-1) + plain_inputs[1].unsqueeze(-3), (-2,))
    product = log_matmul(*inputs)
    tight = 1e-10 if dtype == torch.float64 else 2e-5
    scale = max(1.0, std)
    torch.testing.assert_close(product.double(), plain, rtol=tight, atol=tight * scale)
    finite = plain.isfinite()
    plain[finite].sum().backward()
    product[finite].sum().backward()
    for x, y in zip(inputs, plain_inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=tight, atol=10 * tight * scale)


@pytest.mark.parametrize("std", [1.0, 100.0])
@pytest.mark.parametrize("name", ["loop", "nested grid", "ragged two levels"])
def test_matrix_product_steps_equal_enumeration(name, std, monkeypatch):
    monkeypatch.setattr(elimination, "_PRODUCT_ELEMENTS", 0)
    model = CASES[name]
    factors = model.factors(std=std)
    truth = Enumeration(model, factors)
    plan = model.plan()
    assert "matrix product" in str(plan)
    log_z, weights = plan.marginals(factors)
    torch.testing.assert_close(log_z, truth.log_z, **TIGHT)
    for copy in truth.copies:
        torch.testing.assert_close(weights[copy[0]][copy[1:]], truth.joint(copy), **TIGHT)
    drawn = plan.draw(factors, 200, torch.Generator().manual_seed(1))
    for copy in truth.copies:
        probability = truth.joint(copy)[drawn[copy[0]][(slice(None), *copy[1:])]]
        assert (probability > 0).all()


@pytest.mark.parametrize("names", [("n",), ()])
def test_long_plates_add_up_in_double_precision(names):
    model = Case(
        Layout({"n": PlateSpec("n", 72_000)}, {"a": 2}, {"a": ()}), [(*names, "a")], [("n",)]
    )
    log = torch.full((*([72_000] if names else []), 2), -0.7)
    plan = model.plan(itemsize=4)
    exact = 72_000 * log.flatten()[0].double() + math.log(2.0)
    assert plan.log_evidence([LogFactor((*names, "a"), log)]).double() == pytest.approx(
        float(exact), rel=1e-7
    )


# ---- memory ----


def split_plan(model: Case):
    """The plan of the smallest budget that still fits by a split, or None."""
    whole = model.plan().largest[2]
    for share in (0.3, 0.5, 0.7, 0.99):
        try:
            return model.plan(memory=int(share * whole))
        except UnsupportedError:
            continue
    return None


SPLITS = ["nested grid", "ragged two levels", "grid over a ragged plate", "series over households"]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("lazy", [False, True])
def test_split_equals_unsplit_in_value_and_gradient(name, lazy):
    model = CASES[name]
    plan, split = model.plan(), split_plan(model)
    assert "parts" in str(split)
    assert split.largest[2] < plan.largest[2]
    leaves = [LogFactor(f.axes, f.log.requires_grad_()) for f in model.factors()]

    def evaluate(i, rows):
        log = leaves[i].log
        for dim, axis in enumerate(leaves[i].axes):
            log = log.index_select(dim, rows[axis]) if rows and axis in rows else log
        return LogFactor(leaves[i].axes, log)

    one, two = plan.log_evidence(leaves), split.log_evidence(evaluate if lazy else leaves)
    torch.testing.assert_close(one, two, **TIGHT)
    logs = [f.log for f in leaves]
    for x, y in zip(torch.autograd.grad(one, logs), torch.autograd.grad(two, logs), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)
    (_, a), (_, b) = plan.marginals(leaves), split.marginals(evaluate if lazy else leaves)
    for axis in a:
        torch.testing.assert_close(a[axis], b[axis], **TIGHT)


def test_a_budget_too_small_names_the_array_and_the_remedies():
    model = CASES["collider"]
    message = r"over c, b, a, has 24 entries.*budget.*fewer particles.*groups=.*memory="
    with pytest.raises(UnsupportedError, match=message):
        model.plan(memory=100)


def test_groups_are_merged_until_the_budget_holds():
    layout = Layout({}, dict(a=10, b=10, c=10, d=10), {x: () for x in "abcd"})
    scopes = [("a", "b", "c"), ("c", "d"), ("a",)]
    assert suggest_groups(scopes, layout, 8 * 1000) == ()
    groups = suggest_groups(scopes, layout, 8 * 100)
    assert len(groups) == 1 and set(groups[0]) < set("abc")
    assert suggest_groups(scopes, layout, 8 * 10) == (("a", "b", "c", "d"),)
    with pytest.raises(UnsupportedError, match="fewer particles"):
        suggest_groups(scopes, layout, 8 * 10, apart=("a", "b"))


# ---- invariances ----


@pytest.mark.parametrize("name", ["ragged two levels", "series, latents below and at each time"])
def test_order_of_factors_and_plates_does_not_matter(name):
    model = CASES[name]
    factors = model.factors()
    lay = model.layout
    turned = Layout(
        dict(reversed(lay.plates.items())),
        dict(reversed(lay.sizes.items())),
        dict(reversed(lay.owners.items())),
        lay.chains,
    )
    plan, other = model.plan(), make_plan(model.scopes[::-1], turned)
    (one, a), (two, b) = plan.marginals(factors), other.marginals(factors[::-1])
    torch.testing.assert_close(one, two, **TIGHT)
    for axis in a:
        torch.testing.assert_close(a[axis], b[axis], **TIGHT)


@pytest.mark.parametrize("name", ["ragged two levels", "series in a plate, with plates below"])
@pytest.mark.parametrize("chain", ["scan", "tree"])
def test_a_batch_axis_equals_a_loop(name, chain):
    single = CASES[name]
    lay = single.layout
    layout = Layout(lay.plates, {**lay.sizes, "run": 3}, lay.owners, lay.chains, ("run",))
    scopes = [(*s[:1], "run", *s[1:]) if i % 3 else s for i, s in enumerate(single.scopes)]
    model = Case(layout, scopes, single.plates_of)
    factors = model.factors()
    log_z, weights = model.plan(chain=chain).marginals(factors)
    assert log_z.shape == (3,)
    for r in range(3):
        one = [
            LogFactor(s, f.log.select(f.axes.index("run"), r) if "run" in f.axes else f.log)
            for s, f in zip(single.scopes, factors, strict=True)
        ]
        value, w = single.plan().marginals(one)
        torch.testing.assert_close(log_z[r], value, **TIGHT)
        for axis in w:
            torch.testing.assert_close(weights[axis][r], w[axis], **TIGHT)


# ---- refusals and shape of the plan ----


def test_crossing_plates_are_refused_in_words():
    model = case(
        plates(user=3, film=4),
        dict(u=2, f=2),
        dict(u="user", f="film"),
        ["user u", "film f", "user film u f"],
    )
    message = r"'f' \(plates film\), 'u' \(plates user\) meet .* user, film.*another method"
    with pytest.raises(UnsupportedError, match=message):
        model.plan()


def test_a_latent_beside_a_series_is_refused():
    model = case(
        plates(region=2, t=3),
        dict(x=2, e=2),
        dict(x="region t", e="t"),
        ["region x", "region t x' x", "region t x e", "t e"],
        chains=STEPS,
    )
    with pytest.raises(UnsupportedError, match="crossing"):
        model.plan()


def test_ambiguous_ancestors_are_refused():
    model = case(
        plates(g=2, a=(2, {"g": [0, 1]}), b=(2, {"g": [1, 0]})),
        dict(k=2),
        dict(k="g"),
        ["a b k"],
    )
    with pytest.raises(UnsupportedError, match="'g' is reached through 'a' and 'b'"):
        model.plan()


def test_wrong_shapes_are_refused():
    model = CASES["fork"]
    factors = model.factors()
    with pytest.raises(DataError, match="log-factor 1: expected axes"):
        model.plan().log_evidence([factors[0], factors[0], *factors[2:]])
    with pytest.raises(DataError, match="expected 4 log-factors, got 3"):
        model.plan().log_evidence(factors[:3])


def test_the_plan_says_what_it_costs():
    plan = CASES["collider"].plan()
    axes, elements, size = plan.largest
    assert set(axes) == {"a", "b", "c"} and elements == 24 and size == 192
    assert plan.flops > 0
    assert "largest array" in str(plan)
    assert "sum" in str(plan)


def test_the_first_state_does_not_ride_along():
    sizes = {"x": 5, "i": 7, "s": 3}
    layout = Layout(plates(t=9), sizes, {"x": ("t",), "i": (), "s": ()}, STEPS)
    plan = make_plan([("i",), ("i", "x"), ("t", "x'", "x", "s"), ("s",)], layout)
    assert plan.largest[1] == 8 * 5 * 5 * 3
