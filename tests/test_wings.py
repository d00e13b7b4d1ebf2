"""The house keeps its plan: which wing may import which, how big a wing is, and what says so."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "compression")
MOST_FILES = 15

# From the top floor down: a file imports what is on the floors below it, and what is in its own
# wing. Wings on one floor do not know each other. Where a file has a floor of its own, its wing
# stands on it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("flows.cli",),
    ("flows.nightly", "flows.on_demand"),
    ("flows.sweep",),
    ("flows.comparison", "flows.planning"),
    ("flows.running",),
    ("flows.config",),
    ("flows.prefect_defaults",),
    ("tasks",),
    ("tasks.models",),
    ("tasks.running",),
    ("tasks.stage",),
    ("tasks.tracking",),
    ("tasks.store",),
    ("tasks.environment",),
    ("compression.methods",),
    ("compression.methods.search",),
    (
        "compression.methods.factoring",
        "compression.methods.narrowing",
        "compression.methods.removal",
        "compression.methods.replacement",
        "compression.methods.sharing",
    ),
    ("compression.methods.in_order",),
    ("compression.methods.refit", "compression.methods.method"),
    ("compression.methods.arithmetic",),
    ("compression.evaluation", "compression.export"),
    ("compression.training",),
    ("compression.statistics",),
    ("compression.checkpoints",),
    ("compression.structure",),
    ("compression.closed_forms",),
    ("compression.text",),
    ("compression.storage",),
    ("compression.reference",),
    ("compression.hardware", "compression.out_of_memory", "compression.standby"),
    ("compression.errors",),
)
NAMED = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def _modules() -> dict[str, Path]:
    """Every file of the three rooms by its name below foldstack."""
    files = (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))
    parts = ((file, file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return {
        ".".join(names[:-1] if names[-1] == "__init__" else names): file for file, names in parts
    }


MODULES = _modules()


def imports_of(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == "foldstack":
                yield module if module in MODULES else module.rpartition(".")[0]


def place(module: str) -> str:
    """The wing, or the file with a floor of its own, to which a module belongs."""
    while module not in NAMED:
        above = module.rpartition(".")[0]
        assert above, f"{module} is on no floor: give it one in FLOORS"
        module = above
    return module


IMPORTS = {module: sorted(set(imports_of(file))) for module, file in MODULES.items()}


def test_every_import_goes_down() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, imports in IMPORTS.items()
        for imported in imports
        if place(module) != place(imported) and NAMED[place(imported)] <= NAMED[place(module)]
    ]
    assert upwards == []


def test_every_floor_is_there() -> None:
    """A name that nothing has any more would let the next one of that name go unseen."""
    assert set(NAMED) == {place(module) for module in MODULES}


def test_no_files_import_each_other() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_no_wing_is_too_big() -> None:
    sizes = Counter(file.parent for file in MODULES.values() if file.name != "__init__.py")
    assert {str(wing): size for wing, size in sizes.items() if size > MOST_FILES} == {}


def docstring_of(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file} says nothing of itself"
    return docstring


def first_sentence(file: Path) -> str:
    return re.split(r"(?<=[.?]) ", " ".join(docstring_of(file).split()))[0]


def inside(folder: Path) -> list[tuple[str, Path]]:
    """Files, then wings, directly in a folder, each with the file that tells of it."""
    files = [(file.stem, file) for file in sorted(folder.glob("*.py"))]
    wings = [(f"{file.parent.name}/", file) for file in sorted(folder.glob("*/__init__.py"))]
    return [(name, file) for name, file in files + wings if name != "__init__"]


WINGS = sorted({file.parent for file in MODULES.values()} - {ROOT / room for room in ROOMS})


@pytest.mark.parametrize("wing", WINGS, ids=lambda wing: wing.relative_to(ROOT).as_posix())
def test_a_wing_says_what_each_of_its_files_is_for(wing: Path) -> None:
    """In its own docstring, by the first sentence of each file's."""
    listed = docstring_of(wing / "__init__.py").split("\n- ")[1:]
    found = [" ".join(entry.split()) for entry in listed]
    assert found == [f"`{name}`: {first_sentence(file)}" for name, file in inside(wing)]


@pytest.mark.parametrize("room", [*ROOMS, "benchmarks"])
def test_the_readme_says_what_each_wing_is_for(room: str) -> None:
    """And each file that stands outside the wings."""
    rows = []
    for name, file in inside(ROOT / room):
        rows.append(f"| `{name if name.endswith('/') else file.name}` | {first_sentence(file)} |")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, table = text.partition(f"**{room}/**")
    found = table.partition("|---|---|\n")[2].partition("\n\n")[0]
    assert found.splitlines() == rows


def test_tests_lie_as_the_code_does() -> None:
    """The tests of a wing are in the folder of its name."""
    rooms = {
        "benchmarks",
        "deploy",
        "plugins",
        *(file.parent.relative_to(ROOT) for file in MODULES.values()),
    }
    folders = {file.parent.relative_to(ROOT / "tests") for file in ROOT.glob("tests/*/**/*.py")}
    assert {str(folder) for folder in folders} <= {str(room) for room in rooms}
