"""The table of ``nuts_reference.py``, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import scoring

COLUMNS = {
    "mean_err": "mean abs err",
    "max_err": "max abs err",
    "mean_lsr": "mean abs lsr",
    "max_lsr": "max abs lsr",
    "verdict": "verdict",
    "steps": "steps",
    "compile_cpu_s": "of which compiling, CPU s",
    "cpu_s": "CPU s",
    "seconds": "seconds",
}
WANTED = 0.1  # of both mean errors
HEAD = """# Hierarchical models against NUTS

`err`: difference of means in reference standard deviations; `lsr`: log ratio of standard deviations. Medians over seeds (range).
`qem` and `vi` have no options. numpyro: variational inference until its ELBO has converged by the rule in
`nuts_peer.py`, models with centred group effects as they are written or standardised ones, in double precision. The time
of `qem` and `vi` includes everything from arrays to the posterior, that of numpyro its compilation.
Remake with `python benchmarks/nuts_reference.py`."""


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each model and method, the median over seeds and their range."""
    lines = [
        "| model | method | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name, method in dict.fromkeys((r["model"], r["method"]) for r in records):
        mine = [r for r in records if (r["model"], r["method"]) == (name, method)]
        done = [r for r in mine if "error" not in r]
        cells = [_cell(done, key) for key in COLUMNS] if done else [mine[0]["error"]]
        if 0 < len(done) < len(mine):
            cells[0] += f"; {len(mine) - len(done)} failed"
        lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(done: Sequence[dict[str, Any]], key: str) -> str:
    """Worst parameters are named; a peer has no verdict but whether it ended by its rule."""
    if key == "verdict" and "verdict" not in done[0]:
        return "converged" if all(r["converged"] for r in done) else "not converged"
    if key not in done[0]:
        return ""
    text = scoring.cell([r[key] for r in done])
    where = {"max_err": "worst_mean", "max_lsr": "worst_sd"}.get(key)
    return f"{text} {max(done, key=lambda r: r[key])[where]}" if where else text


def reached(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was to be reached, by model, of medians over seeds."""
    lines = [
        "| model | mean abs err at most 0.1 | mean abs lsr at most 0.1 | less CPU than mean-field | nearer sds than mean-field |",
        "|---|---|---|---|---|",
    ]

    def middle(name: str, method: str, key: str) -> list[float]:
        groups: dict[str, list[float]] = {}
        for r in records:
            if r["model"] == name and method in r["method"] and key in r:
                groups.setdefault(r["method"], []).append(r[key])
        return [median(values) for values in groups.values()]

    for name in dict.fromkeys(r["model"] for r in records):
        ours = {k: middle(name, "qem", k) for k in ("mean_err", "mean_lsr", "cpu_s")}
        theirs = {k: middle(name, "mean-field", k) for k in ("mean_lsr", "cpu_s")}
        if not ours["mean_err"]:
            continue
        cells = [_yes(ours[k][0], [WANTED]) for k in ("mean_err", "mean_lsr")]
        cells += [_yes(ours[k][0], theirs[k]) for k in ("cpu_s", "mean_lsr")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yes(ours: float, limits: Sequence[float]) -> str:
    """Against the best form of the peer."""
    return "" if not limits else "yes" if ours <= min(limits) else "no"
