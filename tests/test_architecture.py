"""Who imports whom: the arrows of CONTRIBUTING.md, read off the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ppl": "ppl", "inference": "ppl.inference", "models": "ppl.models"}
SHARED = {
    "ppl.inference.numerics",
    "ppl.inference.groups",
    "ppl.inference.networks",
    "ppl.inference.particles",
}  # packages that several backends use
CORE = {"torch", "numpy", "scipy", "opt_einsum", "typing_extensions"}


def module_name(file: Path) -> str:
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGES[folder], *(part for part in rest if part != "__init__")))


FILES = {
    module_name(file): file for folder in PACKAGES for file in sorted((ROOT / folder).rglob("*.py"))
}


class _OnlyForCheckers(ast.NodeTransformer):
    """Drops ``if TYPE_CHECKING:`` blocks: what stands there is never imported."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else node


TREES = {
    name: _OnlyForCheckers().visit(ast.parse(file.read_text(encoding="utf-8"), str(file)))
    for name, file in FILES.items()
}


def imports(name: str, tree: ast.AST | None = None) -> Iterator[str]:
    """Full names of everything a module imports anywhere, inside functions too."""
    is_package = FILES[name].name == "__init__.py"
    for node in ast.walk(tree or TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join(filter(None, [*parents, base]))
            # `from ppl import inference` names a module; `from ppl import latent` does not.
            modules = [f"{base}.{a.name}" for a in node.names if f"{base}.{a.name}" in FILES]
            yield from modules or [base]


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def wrong(importers: list[str], allowed) -> list[str]:
    return [f"{a} imports {b}" for a in importers for b in imports(a) if not allowed(a, b)]


def backend_of(name: str) -> str | None:
    """The backend a module belongs to: a sub-package, or a module that has `supports`."""
    if not within(name, "ppl.inference") or name.count(".") < 2:
        return None
    top = ".".join(name.split(".")[:3])
    if top in SHARED:
        return None
    is_package = FILES[top].name == "__init__.py"
    return top if is_package or "supports" in _top_level_functions(top) else None


def _top_level_functions(name: str) -> set[str]:
    return {node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef)}


def test_the_language_imports_no_backend_and_no_model():
    language = [name for name in FILES if not within(name, "ppl.inference", "ppl.models")]
    assert not wrong(language, lambda a, b: not within(b, "ppl.inference", "ppl.models"))


def test_a_backend_imports_no_other_backend():
    inside = [name for name in FILES if within(name, "ppl.inference")]

    def allowed(importer: str, imported: str) -> bool:
        target = backend_of(imported) if imported in FILES else None
        return target is None or target == backend_of(importer)

    assert not wrong(inside, allowed)


def test_what_backends_share_imports_no_backend():
    shared = [name for name in FILES if within(name, *SHARED)]
    assert not wrong(shared, lambda a, b: b not in FILES or backend_of(b) is None)


def test_numerics_import_nothing_of_ours():
    numerics = [name for name in FILES if within(name, "ppl.inference.numerics")]
    own = "ppl.inference.numerics"
    assert not wrong(numerics, lambda a, b: not within(b, "ppl") or within(b, own))


def test_models_and_backends_do_not_know_each_other():
    models = [name for name in FILES if within(name, "ppl.models")]
    backends = [name for name in FILES if within(name, "ppl.inference")]
    assert not wrong(models, lambda a, b: not within(b, "ppl.inference"))
    assert not wrong(backends, lambda a, b: not within(b, "ppl.models"))


@pytest.mark.parametrize("name", FILES)
def test_optional_libraries_are_imported_on_first_use(name):
    later = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    at_import_time = ast.Module([n for n in TREES[name].body if not isinstance(n, later)], [])
    roots = {imported.split(".")[0] for imported in imports(name, at_import_time)}
    assert roots <= CORE | {"ppl"} | sys.stdlib_module_names


def test_every_source_that_is_named_stands_in_references():
    known = set(re.findall(r"^- \*\*\[(\w+)\]\*\*", (ROOT / "REFERENCES.md").read_text(), re.M))
    named = {
        (key, str(file.relative_to(ROOT)))
        for folder in (*PACKAGES, "tests", "tutorials", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        for key in re.findall(r"\[([A-Z][A-Za-z]+\d{4}[a-z]?)\]", file.read_text(encoding="utf-8"))
    }
    assert not {(key, file) for key, file in named if key not in known}
