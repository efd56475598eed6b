"""Draw a factor graph: as text, Mermaid, Graphviz' DOT, or a picture."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Plate, Variable
from ppl.passes import implied_gathers


def as_text(graph: Graph) -> str:
    """Plates, variables and factors, a line each."""
    lines = [f"factor graph of {graph.name}"]
    lines += ["plates"] + ([_plate_line(p) for p in graph.plates.values()] or ["  none"])
    width = max((len(v) for v in graph.variables), default=0)
    lines += ["variables"] + [_variable_line(v, width) for v in graph.variables.values()]
    lines += ["factors"] + [_factor_line(graph, f) for f in graph.factors.values()]
    return "\n".join(lines)


def as_mermaid(graph: Graph) -> str:
    """A Mermaid flow chart: rounded latents, boxed observations, small squares for factors, plates as subgraphs."""
    ids = {name: f"v{i}" for i, name in enumerate(graph.variables)}
    lines = ["flowchart TD", *_mermaid_box(graph, _boxes(graph), ids, "  ")]
    for i, f in enumerate(graph.factors.values()):
        lines.append(f'  f{i}["{_label(f)}"]')
        for name in f.scope:
            arrow = f"  f{i} --> {ids[name]}" if name == f.name else f"  {ids[name]} --- f{i}"
            lines.append(arrow)
    lines.append("  classDef observed fill:#ddd")
    observed = [ids[v.name] for v in graph.role("observed")]
    if observed:
        lines.append(f"  class {','.join(observed)} observed")
    return "\n".join(lines)


def as_dot(graph: Graph) -> str:
    """A directed graph in DOT: circles for variables (grey when observed), boxes for factors, clusters for plates."""
    lines = [f'digraph "{graph.name}" {{', "  rankdir=TB; node [fontname=Helvetica, fontsize=11];"]
    lines += _dot_box(graph, _boxes(graph), "  ")
    for f in graph.factors.values():
        lines.append(
            f'  "f:{f.name}" [shape=box, height=0.2, width=0.2, fontsize=9, label="{_label(f)}"];'
        )
        for name in f.scope:
            edge = (
                f'"f:{f.name}" -> "{name}"'
                if name == f.name
                else f'"{name}" -> "f:{f.name}" [dir=none]'
            )
            lines.append(f"  {edge};")
    return "\n".join([*lines, "}"])


def render(graph: Graph, file: str | None = None) -> Any:
    """A ``graphviz.Source``, or the picture in ``file``.

    Raises:
        UnsupportedError: the Python package or the program ``dot`` is not installed.
    """
    try:
        import graphviz
    except ImportError:
        raise UnsupportedError(
            "drawing needs the extra 'graph': pip install factorppl[graph]. graph.to_mermaid() and graph.to_dot() "
            "give text without it."
        ) from None
    source = graphviz.Source(as_dot(graph))
    if file is None:
        return source
    path = Path(file)
    try:
        source.render(outfile=str(path), format=path.suffix.lstrip(".") or "pdf", cleanup=True)
    except graphviz.ExecutableNotFound:
        raise UnsupportedError(
            "the program 'dot' of Graphviz is not installed. Install it with the system's package manager, or paste "
            "graph.to_mermaid() into a viewer."
        ) from None
    return source


def _plate_line(plate: Plate) -> str:
    inside = f" within {', '.join(plate.parents)}" if plate.parents else ""
    by = [c for c, p in zip(plate.columns, plate.parents, strict=True) if c != p]
    size = "size from data" if plate.size is None else str(plate.size)
    return f"  {plate.name}: {size}{inside}{f' by {by}' if by else ''}{', ordered' if plate.ordered else ''}"


def _variable_line(v: Variable, width: int) -> str:
    plates = f"[{', '.join(v.plates)}]" if v.plates else ""
    event = f" event {list(v.event_shape)}" if v.event_shape else ""
    values = f" {v.cardinality} values" if v.cardinality else " discrete" if v.is_discrete else ""
    index = f" index of {v.index_of}" if v.index_of else ""
    return f"  {v.name:<{width}}  {v.role:<8} {plates}{event}{values}{index}".rstrip()


def _factor_line(graph: Graph, f: Factor) -> str:
    text = f"  {_label(f)}"
    others = [n for n in f.scope if n != f.name]
    body = (
        f"{f.name} | {', '.join(others)}"
        if f.kind == "conditional" and others
        else ", ".join(f.scope)
    )
    text += f"({body})"
    if f.plates:
        text += f" for each {', '.join(f.plates)}"
    gathers = implied_gathers(graph).get(f.name, ())
    if gathers:
        text += f"; looks up {', '.join(gathers)}"
    whole = [n for n in f.scope if "all" in graph.access(f.name, n) and n != f.name]
    return text + (f"; over the whole plate of {', '.join(whole)}" if whole else "")


def _label(f: Factor) -> str:
    if f.kind == "deterministic":
        return f"{f.name} ="
    law = str(f.law) if f.law else "factor"
    return f"Markov {law}" if f.chain else law if f.kind == "conditional" else f"{f.name}: {law}"


def _dot_style(v: Variable) -> str:
    fill = {"observed": 'style=filled, fillcolor="#d8d8d8"', "given": "shape=plaintext"}.get(
        v.role, ""
    )
    return fill or ("shape=diamond" if v.role == "param" else "shape=ellipse")


@dataclass
class _Box:
    """A plate inside the plates around it: one box a path, whichever variables lie there."""

    plate: str
    id: int
    names: list[str] = field(default_factory=list)
    inner: dict[str, _Box] = field(default_factory=dict)


def _boxes(graph: Graph) -> _Box:
    root, numbers = _Box("", 0), itertools.count(1)
    for v in graph.variables.values():
        outer = [a for p in v.plates for a in reversed(graph.ancestors(p))]
        box = root
        for plate in dict.fromkeys((*outer, *v.plates)):
            if plate not in box.inner:
                box.inner[plate] = _Box(plate, next(numbers))
            box = box.inner[plate]
        box.names.append(v.name)
    return root


def _mermaid_box(graph: Graph, box: _Box, ids: dict[str, str], indent: str) -> list[str]:
    lines = []
    for name in box.names:
        left, right = {"latent": ("((", "))"), "observed": ("[", "]")}.get(
            graph.variables[name].role, ("([", "])")
        )
        lines.append(f'{indent}{ids[name]}{left}"{name}"{right}')
    for inner in box.inner.values():
        size = graph.plates[inner.plate].size
        title = f"{inner.plate} ({size})" if size else inner.plate
        lines.append(f'{indent}subgraph p{inner.id}["{title}"]')
        lines += [*_mermaid_box(graph, inner, ids, indent + "  "), f"{indent}end"]
    return lines


def _dot_box(graph: Graph, box: _Box, indent: str) -> list[str]:
    lines = [f'{indent}"{name}" [{_dot_style(graph.variables[name])}];' for name in box.names]
    for inner in box.inner.values():
        size = graph.plates[inner.plate].size
        title = f"{inner.plate} ({size})" if size else inner.plate
        lines.append(f'{indent}subgraph cluster_{inner.id} {{ label="{title}"; style=rounded;')
        lines += [*_dot_box(graph, inner, indent + "  "), f"{indent}}}"]
    return lines
