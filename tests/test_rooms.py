"""The order of the house: rooms import downwards only, files make no circle, files and functions fit on few screens."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flux_attention

PACKAGE = Path(flux_attention.__path__[0])
#: Rooms, from the lowest level to the highest. Those of a level may know each other, unless a bar keeps them apart.
LEVELS = [
    "errors files validation progress config router",
    "kernels",
    "patterns",
    "notebook",
    "decision routes adapters names sizes results",
    "hf | serving",
    "tasks calibration checkpoints",
    "training | evaluation",
    "shipped playground",
    "cli",
]
PLACES = {
    room: (level, side)
    for level, rooms in enumerate(LEVELS)
    for side, some in enumerate(rooms.split("|"))
    for room in some.split()
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that code imports, late or not, except for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"imports are absolute: line {child.lineno}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported(child)


def home(name: str) -> str | None:
    """The module of the package that an imported name comes from, if any: a module itself, or what is in one."""
    if name in MODULES:
        return name
    parent, _, attribute = name.rpartition(".")
    if parent == "flux_attention":  # which hands on names of others
        return getattr(getattr(flux_attention, attribute), "__module__", parent)
    return parent if parent in MODULES else None


#: What is to be short: the package, and the code beside it.
FILES = {str(path.relative_to(PACKAGE.parent)): path for path in MODULES.values()} | {
    str(path.relative_to(ROOT)): path
    for folder in ("benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
#: Those that may be longer.
GRAPH = {
    module: {home(name) for name in imported(ast.parse(path.read_text(encoding="utf-8")))} - {None, module}
    for module, path in MODULES.items()
}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES if module != "flux_attention"} <= set(PLACES)


def test_rooms_import_downwards_only():
    wrong = []
    for module, targets in GRAPH.items():
        for target in targets - {"flux_attention"}:
            if module == "flux_attention" or room(module) == room(target):
                continue
            (level, side), (other_level, other_side) = (PLACES.get(room(name), (-1, 0)) for name in (module, target))
            if level < other_level or (level == other_level and side != other_side):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_files_make_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file):
    """A function may be longer if a comment ``# long: reason`` stands above it or in its first lines."""
    source = FILES[file].read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if not body or body[-1].end_lineno - body[0].lineno < MAX_FUNCTION_LINES:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        beside = lines[max(0, first - 2) : body[0].lineno]
        assert any("# long: " in line for line in beside), f"{node.name} is too long, and no comment says why"
