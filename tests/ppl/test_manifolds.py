"""Groups of rotations and motions against scipy's rotations and matrix exponential."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.spatial.transform import Rotation
from torch.autograd import gradcheck, gradgradcheck

import ppl
from ppl.distributions import ConcentratedNormal, Flat
from ppl.errors import DataError, ModelError
from ppl.manifolds import MANIFOLDS, SE2, SE3, SO2, SO3, by_name, manifold_of

# Torch's own import of forward mode warns once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

ALL = list(MANIFOLDS.values())


def tangents(manifold, count=40, scale=1.0):
    v = scale * torch.randn(count, manifold.dims, dtype=torch.float64)
    # rotations of less than pi, so that log undoes exp
    turn = v[:, -1:] if manifold.space == 2 else v[:, -3:]
    size = turn.norm(dim=-1, keepdim=True)
    shorter = torch.where(size > 3.0, 3.0 / size, 1.0)
    return torch.cat([v[:, : manifold.dims - turn.shape[1]], turn * shorter], -1)


def algebra(manifold, v):
    """The matrix of a tangent vector in the Lie algebra."""
    v = v.numpy()
    if manifold.space == 2:
        turn = np.array([[0, -v[-1]], [v[-1], 0]])
    else:
        x, y, z = v[-3:]
        turn = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    if manifold in (SO2, SO3):
        return turn
    n = manifold.space
    full = np.zeros((n + 1, n + 1))
    full[:n, :n], full[:n, n] = turn, v[:n]
    return full


@pytest.mark.parametrize("manifold", ALL)
def test_exp_is_the_matrix_exponential(manifold):
    v = tangents(manifold)
    expected = np.stack([expm(algebra(manifold, row)) for row in v])
    found = manifold.matrix(manifold.exp(v)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("manifold", ALL)
def test_operations_are_those_of_matrices(manifold):
    a, b = manifold.exp(tangents(manifold)), manifold.exp(tangents(manifold))
    left, right = manifold.matrix(a), manifold.matrix(b)
    close = torch.testing.assert_close
    close(manifold.matrix(manifold.compose(a, b)), left @ right)
    close(manifold.matrix(manifold.inverse(a)), torch.linalg.inv(left))
    close(manifold.matrix(manifold.between(a, b)), torch.linalg.inv(left) @ right)
    n, point = manifold.space, torch.randn(40, manifold.space, dtype=torch.float64)
    moved = (left[:, :n, :n] @ point.unsqueeze(-1)).squeeze(-1)
    moved = moved + (left[:, :n, n] if left.shape[-1] > n else 0.0)
    close(manifold.act(a, point), moved)
    v = tangents(manifold)
    turned = (manifold.adjoint(a) @ v.unsqueeze(-1)).squeeze(-1)
    other = manifold.compose(manifold.exp(turned), a)
    close(manifold.matrix(manifold.retract(a, v)), manifold.matrix(other))


@pytest.mark.parametrize("manifold", ALL)
def test_log_undoes_exp_and_local_undoes_retract(manifold):
    for scale in (1.0, 1e-3, 1e-9, 0.0):
        v, a = tangents(manifold, scale=scale), manifold.exp(tangents(manifold))
        torch.testing.assert_close(manifold.log(manifold.exp(v)), v, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(manifold.local(a, manifold.retract(a, v)), v, atol=1e-12, rtol=0)


@pytest.mark.parametrize("manifold", ALL)
def test_identity_broadcasts_against_any_leading_axes(manifold):
    a = manifold.exp(tangents(manifold, 6)).reshape(2, 3, *manifold.event_shape)
    one = manifold.identity()
    torch.testing.assert_close(manifold.compose(one, a), a)
    torch.testing.assert_close(manifold.between(one, a), a)
    assert manifold.local(a, one).shape == (2, 3, manifold.dims)
    assert manifold.retract(one, torch.zeros(4, manifold.dims)).shape == (4, *manifold.event_shape)


def test_quaternions_are_those_of_scipy():
    v = torch.cat([tangents(SO3), 1e-8 * tangents(SO3), torch.zeros(1, 3, dtype=torch.float64)])
    q = SO3.exp(v)
    reference = Rotation.from_rotvec(v.numpy())
    canonical = q * torch.where(q[:, 3:] < 0, -1.0, 1.0)
    np.testing.assert_allclose(canonical, reference.as_quat(canonical=True), atol=1e-14)
    np.testing.assert_allclose(SO3.matrix(q), reference.as_matrix(), atol=1e-14)
    random = Rotation.random(50, random_state=0)
    logs = SO3.log(torch.as_tensor(random.as_quat()))
    np.testing.assert_allclose(logs, random.as_rotvec(), atol=1e-12)


def test_a_quaternion_and_its_negative_are_one_rotation():
    q = SO3.exp(tangents(SO3))
    torch.testing.assert_close(SO3.log(-q), SO3.log(q))
    pose = torch.cat([torch.ones(40, 3, dtype=torch.float64), -q], -1)
    torch.testing.assert_close(SE3.local(pose, SE3.project(pose)), torch.zeros(40, 6).double())


def test_angles_near_pi_take_the_short_way():
    near = math.pi - 0.01
    assert float(SO2.local(near, -near)[0]) == pytest.approx(0.02)
    a, b = (torch.tensor([0.0, 0.0, s * near], dtype=torch.float64) for s in (1, -1))
    assert float(SE2.between(a, b)[2]) == pytest.approx(0.02)
    assert float(SE2.local(b, a)[2]) == pytest.approx(-0.02)
    q, p = SO3.exp([0.0, 0.0, near]), SO3.exp([0.0, 0.0, -near])
    torch.testing.assert_close(SO3.local(q, p), torch.tensor([0, 0, 0.02], dtype=q.dtype))
    far = SO2.project(torch.tensor([0.5 + 20 * math.pi, -7.0], dtype=torch.float64))
    torch.testing.assert_close(far, torch.tensor([0.5, 2 * math.pi - 7.0], dtype=torch.float64))


@pytest.mark.parametrize("manifold", ALL)
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3, 0.4999, 0.5001, 2.0, math.pi - 1e-3])
def test_derivatives_of_exp_and_log(manifold, size):
    direction = torch.randn(3, manifold.dims, dtype=torch.float64)
    turn = slice(-1, None) if manifold.space == 2 else slice(-3, None)
    direction[:, turn] *= size / direction[:, turn].norm(dim=-1, keepdim=True)
    v = direction.requires_grad_()
    assert gradcheck(manifold.exp, v)
    assert gradcheck(lambda x: manifold.log(manifold.exp(x)), v)
    assert gradgradcheck(lambda x: manifold.log(manifold.exp(x)), v, atol=1e-4)
    base = manifold.exp(tangents(manifold, 3))
    assert gradcheck(lambda x: manifold.local(base, manifold.retract(base, x)), v)


# The first use of forward mode makes torch compile by its old compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("manifold", ALL)
def test_forward_mode_at_zero_is_exact(manifold):
    a = manifold.exp(tangents(manifold, 5))
    b = manifold.exp(tangents(manifold, 5))
    eye, zero = torch.eye(manifold.dims, dtype=a.dtype), torch.zeros(manifold.dims, dtype=a.dtype)
    slope = torch.func.vmap(
        lambda x, y: torch.func.jacfwd(lambda d: manifold.local(x, manifold.retract(y, d)))(zero)
    )(a, b)
    step = 1e-6
    central = [
        (
            manifold.local(a, manifold.retract(b, step * e))
            - manifold.local(a, manifold.retract(b, -step * e))
        )
        / (2 * step)
        for e in eye
    ]
    torch.testing.assert_close(slope, torch.stack(central, -1), atol=1e-7, rtol=1e-6)
    own = torch.func.jacfwd(lambda d: manifold.log(manifold.exp(d)))(zero)
    torch.testing.assert_close(own, eye, atol=1e-15, rtol=0)


@pytest.mark.parametrize("manifold", ALL)
def test_float32_stays_float32(manifold):
    a = manifold.exp(tangents(manifold).float())
    wide = manifold.exp(manifold.log(a.double()))
    for found in (a, manifold.log(a), manifold.local(a, a), manifold.adjoint(a)):
        assert found.dtype == torch.float32
    torch.testing.assert_close(
        manifold.matrix(a).double(), manifold.matrix(wide), atol=2e-6, rtol=0
    )


def test_a_chain_of_many_products_stays_of_unit_length():
    q, step = SO3.identity(torch.float32), SO3.exp(torch.tensor([0.1, 0.2, -0.3]))
    for _ in range(2000):
        q = SO3.compose(q, step)
    assert float(q.norm()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("manifold", ALL)
def test_support_checks_elements(manifold):
    a = manifold.exp(tangents(manifold, 4))
    assert manifold.support.check(a).tolist() == [True] * 4
    assert manifold.support.manifold is manifold
    if manifold.space == 3:
        assert not manifold.support.check(2 * a).any()
    assert not manifold.support.check(a * torch.nan).any()
    if manifold.event_shape:
        assert not manifold.support.check(a[..., :2]).any()


def test_groups_are_found_by_name():
    assert by_name("SE3") is SE3
    with pytest.raises(ModelError, match="no manifold 'SE4'"):
        by_name("SE4")


# ---- inside models ----------------------------------------------------------------------------


@ppl.model
def graph_of_poses(manifold=SE2):
    pose, edge = ppl.plate("pose"), ppl.plate("edge")
    with pose:
        x = ppl.latent("x", Flat(manifold))
    with edge:
        i, j = ppl.given("i", index=pose), ppl.given("j", index=pose)
        ppl.observe("z", ConcentratedNormal(manifold, manifold.between(x[i], x[j]), 0.1))


@pytest.mark.parametrize("manifold", ALL)
def test_operations_are_nodes_of_the_graph(manifold):
    data = {"i": [0, 1], "j": [1, 2], "z": manifold.exp(tangents(manifold, 2))}
    graph = graph_of_poses(manifold=manifold).graph(data, sizes={"pose": 3})
    names = [n.name for n in graph.nodes if n.op == "call"]
    assert names == [f"{manifold.name}.between"]
    assert manifold_of(graph.variables["x"]) is manifold
    assert manifold_of(graph.variables["z"]) is manifold
    assert graph.variables["x"].event_shape == manifold.event_shape


def test_data_off_the_group_is_refused():
    data = {"i": [0, 1], "j": [1, 2], "z": 2 * torch.ones(2, 7)}
    with pytest.raises(DataError, match="the elements of SE3"):
        graph_of_poses(manifold=SE3).graph(data, sizes={"pose": 3})


def test_wrong_shapes_are_an_error_of_the_model():
    @ppl.model
    def broken():
        x = ppl.latent("x", Flat(SE2))
        ppl.deterministic("there", SE2.compose(x, torch.zeros(2)))

    with pytest.raises(
        ModelError, match=r"SE2.compose: expected an argument \[..., 3\], got \[2\]"
    ):
        broken.graph()
