from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ppl.shapes import broadcast_shapes


@pytest.mark.parametrize(
    "shapes",
    [(), ((),), ((3, 1), (2,), ()), ((0,), (1,)), ((5, 1, 4), (1, 3, 1), (4,)), ((1,), (1, 1))],
)
def test_shapes_broadcast_as_torch_does(shapes):
    assert broadcast_shapes(*shapes) == torch.broadcast_shapes(*shapes)


def test_shapes_that_do_not_broadcast_are_refused():
    with pytest.raises(RuntimeError, match=r"\(3,\), \(2,\) do not broadcast"):
        broadcast_shapes((3,), (2,))


def test_a_first_fit_does_not_import_a_computer_algebra_system():
    code = (
        "import sys, ppl\n"
        "@ppl.model\n"
        "def pair():\n"
        "    x = ppl.latent('x', ppl.Normal(0.0, 1.0))\n"
        "    ppl.observe('y', ppl.Normal(x, 1.0))\n"
        "ppl.infer(pair, {'y': 1.0}, method='qem', seed=0, max_iters=2)\n"
        "assert 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
