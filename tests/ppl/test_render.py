"""Drawings of a factor graph: text, Mermaid, DOT."""

from __future__ import annotations

import re
import shutil

import pytest

from ppl import (
    Bernoulli,
    Markov,
    Normal,
    UnsupportedError,
    deterministic,
    factor,
    given,
    latent,
    mean,
    model,
    observe,
    plate,
)


@model
def houses():
    county = plate("county")
    house = plate("house", within=county, by="fips")
    base = latent("base", Normal(0.0, 1.0), shape=2)
    with county:
        level = latent("level", Normal(base[0], 1.0))
        flag = latent("flag", Bernoulli(0.3))
    with house:
        observe("radon", Normal(level + base[1] * given("floor") + flag, 1.0))
    deterministic("average", mean(level, over=county))
    with plate("year", 3, ordered=True):
        latent("trend", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))
    factor("soft", Normal(base, 1.0), at=0.0)


GRAPH = houses.graph({"radon": [1.0, 2.0, 3.0], "floor": [0, 1, 0], "fips": [0, 1, 1]})


def test_text_shows_plates_variables_factors_and_gathers():
    text = str(GRAPH)
    for line in (
        r"factor graph of houses",
        r"  house: 3 within county by \['fips'\]",
        r"  year: 3, ordered",
        r"  base +latent +event \[2\]",
        r"  flag +latent +\[county\] 2 values",
        r"  radon +observed \[house\]",
        r"  Normal\(radon \| base, level, flag, floor\) for each house; looks up level, flag",
        r"  average =\(level\); over the whole plate of level",
        r"  Markov Normal\(trend\) for each year",
        r"  soft: Normal\(base\)",
    ):
        assert re.search(f"^{line}$", text, re.M), f"{line!r} is not in\n{text}"


def test_mermaid_balances_its_subgraphs_and_names_every_variable():
    text = GRAPH.to_mermaid()
    lines = text.split("\n")
    assert lines[0] == "flowchart TD"
    assert sum("subgraph" in x for x in lines) == sum(x.strip() == "end" for x in lines)
    ids = re.findall(r"subgraph (\S+)\[", text)
    assert len(ids) == len(set(ids)), "a subgraph is drawn twice"
    for name in GRAPH.variables:
        assert f'"{name}"' in text
    edges = re.findall(r"^  (\w+) (?:-->|---) (\w+)$", text, re.M)
    drawn = set(re.findall(r"^\s*(\w+)[\(\[]", text, re.M))
    assert {end for edge in edges for end in edge} <= drawn


def test_dot_has_balanced_braces_and_an_edge_for_every_member_of_a_scope():
    text = GRAPH.to_dot()
    assert text.count("{") == text.count("}")
    assert text.count("->") == sum(len(f.scope) for f in GRAPH.factors.values())


def test_render_needs_graphviz_and_says_so(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "graphviz":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"pip install factorppl\[graph\]"):
        GRAPH.render()


@pytest.mark.skipif(shutil.which("dot") is None, reason="the program dot is not installed")
def test_render_writes_a_picture(tmp_path):
    pytest.importorskip("graphviz")
    file = tmp_path / "graph.svg"
    GRAPH.render(str(file))
    assert "<svg" in file.read_text()


@pytest.mark.skipif(shutil.which("dot") is not None, reason="the program dot is installed")
def test_render_without_the_program_says_what_to_install(tmp_path):
    pytest.importorskip("graphviz")
    with pytest.raises(UnsupportedError, match="'dot' of Graphviz is not installed.*to_mermaid"):
        GRAPH.render(str(tmp_path / "graph.png"))


@model
def radon():
    county = plate("county", 2)
    house = plate("house", within=county)
    base = latent("base", Normal(0.0, 1.0))
    with county:
        level = latent("level", Normal(base, 1.0))
    with house:
        observe("y", Normal(level, 1.0))


MERMAID = """\
flowchart TD
  v0(("base"))
  subgraph p1["county (2)"]
    v1(("level"))
    subgraph p2["house"]
      v2["y"]
    end
  end
  f0["Normal"]
  f0 --> v0
  f1["Normal"]
  f1 --> v1
  v0 --- f1
  f2["Normal"]
  f2 --> v2
  v1 --- f2
  classDef observed fill:#ddd
  class v2 observed"""


def test_mermaid_of_a_nested_model_letter_by_letter():
    assert radon.graph().to_mermaid() == MERMAID


@model
def siblings():
    parent = plate("parent", 2)
    for name in ("left", "right"):
        with plate(name, within=parent):
            latent(name + "_x", Normal(0.0, 1.0))
    with parent:
        latent("top", Normal(0.0, 1.0))
    with plate("a", 2), plate("b", 3):
        latent("grid", Normal(0.0, 1.0))
    with plate("b"):
        latent("alone", Normal(0.0, 1.0))
    with plate("a_b", 2):
        latent("other", Normal(0.0, 1.0))


def test_every_path_of_plates_is_one_box():
    text = siblings.graph().to_mermaid()
    boxes = re.findall(r"subgraph (\w+)\[\"(.*)\"\]", text)
    titles = ["parent (2)", "left", "right", "a (2)", "b (3)", "b (3)", "a_b (2)"]
    assert [title for _, title in boxes] == titles
    assert len({box for box, _ in boxes}) == 7
    clusters = re.findall(r"subgraph \"?([^\"{ ]+)", siblings.graph().to_dot())
    assert len(clusters) == len(set(clusters)) == 7
