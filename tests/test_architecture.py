"""The house: imports point one way, and a room keeps to its libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sss_jax"

# Rooms in the order in which they may import: a module imports from its own rank or a lower one.
ORDER = [
    {"errors", "options", "axes", "atomic", "process", "png"},
    {"config", "parallel", "compiling", "flops", "hlo", "topology", "roofline", "compilers"},
    {"data"},
    {"augment"},
    {"models"},
    {"conversion"},
    {"metrics", "losses"},
    {"ssl"},
    {"train"},
    {"evaluate", "predict", "report", "doctor", "sam2", "estimate", "launch"},
    {"benchmarks"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "conversion").rglob("*.py")])


def place_of(path: Path) -> str:
    """Path below the package; the folder `conversion/` is one of its rooms."""
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return path.relative_to(base).as_posix()


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "sss_jax":
                found |= {f"sss_jax.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return place_of(path).split("/")[0].removesuffix(".py")


def rank(name: str) -> int:
    """Rank of a room; files that split off one (report_svg) belong to it."""
    return RANK.get(name, RANK.get(name.split("_")[0], -1))


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert rank(here) >= 0, f"{here} has no place in the order; add it to ORDER"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sss_jax" or len(parts) < 2 or parts[1] in ("__version__", "configs"):
            continue
        assert rank(parts[1]) <= rank(here), f"{here} imports {name}, which comes after it"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("flax", ("models/", "train/state.py")),
        ("torch", ("conversion/verify.py",)),
        ("transformers", ("conversion/verify.py",)),
        ("orbax", ("train/",)),
        ("grain", ("data/",)),
        ("array_record", ("data/",)),
        ("nibabel", ("data/", "report", "evaluate")),
    ],
)
def test_libraries_stay_in_their_rooms(library: str, homes: tuple[str, ...]) -> None:
    for path in FILES:
        if any(name.split(".")[0] == library for name in imports(path)):
            assert place_of(path).startswith(homes), f"{place_of(path)} imports {library}"


def test_files_are_short() -> None:
    long = {place_of(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 420}
    assert not long


def test_functions_are_short() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
