"""The product's syntax trees, for the tests of its architecture and of its prose."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("crossmae", "det", "tools")


@dataclass(frozen=True)
class Module:
    """A Python file of the product; `name` is dotted, `file` is relative to the repository."""

    name: str
    file: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree of the file."""
        return ast.parse(self.source)

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """List (imported dotted name, line), imports inside functions included.

        `from a.b import c` yields `a.b.c`; `longest_module` finds out whether that is a module or a name in one.
        """
        found: list[tuple[str, int]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(alias.name, node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        return found

    @cached_property
    def functions(self) -> list[tuple[str, ast.FunctionDef]]:
        """List (qualified name, node) of every function and method."""
        return list(_functions(self.tree, ""))


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        inner = f"{prefix}{child.name}." if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else prefix
        yield from _functions(child, inner)


def read_product(root: Path = ROOT) -> dict[str, Module]:
    """Read every Python file of the product, by dotted name."""
    modules = {}
    for top in PRODUCT:
        for path in sorted((root / top).rglob("*.py")):
            file = path.relative_to(root)
            name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            modules[name] = Module(name, str(file), path.read_text(encoding="utf-8"))
    return modules


def longest_module(name: str, modules: dict[str, Module]) -> str | None:
    """Find the module that a dotted name is, or is in; None outside the product."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def edges(modules: dict[str, Module]) -> Iterator[tuple[str, str, int]]:
    """Yield (importer, imported module, line) within the product."""
    for module in modules.values():
        for name, line in module.imports:
            target = longest_module(name, modules)
            if target and target != module.name:
                yield module.name, target, line
