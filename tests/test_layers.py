"""Imports point downward only: the block in docs/design.md is read and held."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for top in ("lm", "experiments", "launch") for p in (ROOT / top).rglob("*.py"))


@cache
def ranks() -> dict[str, int]:
    """Module or package -> height, from the design's block; the bottom line is 0."""
    text = (ROOT / "docs" / "design.md").read_text()
    block = re.search(r"## Import direction.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "docs/design.md has lost its block of layers"
    lines = [re.sub(r"\(.*", "", line).split() for line in block.group(1).splitlines()]
    return {name: -number for number, line in enumerate(lines) for name in line}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def rank(module: str) -> int | None:
    """The height of the longest listed prefix."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((ranks()[prefix] for prefix in prefixes if prefix in ranks()), None)


def package(module: str) -> str:
    """`lm.train` for `lm.train.step`, `experiments` for `experiments.study`."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "lm" else parts[:1])


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and module of every import of a file, wherever it stands in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if is_module(inner) else base))
    return found


def ours(name: str) -> bool:
    return name.split(".")[0] in ("lm", "experiments", "launch")


def test_the_rules_are_read_from_the_design():
    assert rank("lm.config") < rank("lm.rundir") < rank("lm.emergence.table") < rank("lm.attention")
    assert rank("lm.models.layers") < rank("lm.objectives") < rank("lm.train.loop")
    assert rank("lm.emergence.report") > rank("lm.emergence.plots")
    assert rank("lm.unheard_of") is None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downward(path):
    module = module_of(path)
    wanted = [(line, name) for line, name in imports(path) if ours(name)]
    if not wanted:
        return
    own = rank(module)
    assert own is not None, f"{module} has no place in the layers of docs/design.md"
    for line, name in wanted:
        other = rank(name)
        assert other is not None, f"{path}:{line} imports {name}, which has no place in the layers"
        # On one line of the block stand neighbours, which know nothing of each other.
        family = package(module) == package(name)
        allowed = other < own or (other == own and family) or name.startswith("launch")
        assert allowed, f"{path}:{line} imports {name}, which is not below it"


def test_no_import_cycles():
    """Files of one layer may import each other, but not in a circle."""
    graph = {module_of(p): {n for _, n in imports(p) if ours(n) and is_module(n)} for p in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle of imports: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in sorted(graph.get(module, set()) - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# What each part must not import: the first rule that fits a file.
FORBIDDEN = {
    "lm.emergence": {"jax", "jaxlib", "flax", "optax", "orbax", "ml_collections", "absl"},
    "lm": {"ml_collections", "absl", "launch", "experiments", "tensorflow"},
    "launch": {"jax", "flax", "ml_collections", "absl", "experiments"},
    "experiments": {"tensorflow"},
}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_part_imports_what_is_not_for_it(path):
    module = module_of(path)
    roots = {name.split(".")[0] for _, name in imports(path)}
    forbidden = next(
        names for part, names in FORBIDDEN.items() if f"{module}.".startswith(f"{part}.")
    )
    assert not roots & forbidden
    if module in ("lm.config", "lm.rundir", "lm.cli"):
        assert roots <= sys.stdlib_module_names | {"lm"}
    if module.startswith("launch"):
        used = {name for _, name in imports(path) if name.startswith("lm")}
        assert used <= {"lm.config", "lm.rundir"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_short(path):
    limit = 450 if module_of(path) == "lm.models.transformer" else 400
    assert len(path.read_text().splitlines()) <= limit
