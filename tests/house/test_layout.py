"""Holds the layout: imports go down, no cycle, small folders, one name per concept, and a config stops at the door.

Every rule is a function that takes the product's syntax trees and returns what breaks it; the tests apply the rules
to the product and to a planted fault. CONTRIBUTING.md states the rules and the budgets in words.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.tree import ROOT, Module, edges, read_product

# From the bottom up. A module imports from lower floors only; rooms on the same floor do not import each other.
FLOORS: list[set[str]] = [
    {"crossmae.errors"},
    {"crossmae.files", "crossmae.models"},
    {"crossmae.data", "crossmae.checkpoints", "crossmae.reports"},
    {"crossmae.training"},
    {"crossmae.pretraining"},
    {"crossmae.classification", "det"},
    {"crossmae.doctor", "crossmae.experiments"},
    {"tools"},
]
DET_FLOORS: list[set[str]] = [
    {"det.detectron2_keys", "det.library_warnings"},
    {"det.config"},
    {"det.classes"},
    {"det.backbone", "det.data"},
    {"det.inference"},
    {"det.evaluation"},
    {"det.training"},
]
MOST_ENTRIES = 12
MOST_LINES = 550
MOST_WHOLE_CONFIGS = 25
VAGUE = {"utils", "util", "common", "misc", "support", "helpers", "base", "core", "shared"}
WHOLE_CONFIGS = {"RunConfig", "PretrainConfig", "FinetuneConfig", "ProbeRunConfig", "CfgNode"}

Modules = dict[str, Module]


def room_of(module: str, floors: list[set[str]] = FLOORS) -> str | None:
    """Find the room on a floor that a module belongs to; None for the face of a package, its `__init__.py`."""
    rooms = [room for floor in floors for room in floor]
    return next((room for room in rooms if module == room or module.startswith(f"{room}.")), None)


def floor_of(room: str, floors: list[set[str]] = FLOORS) -> int:
    """Count the floor of a room from the bottom."""
    return next(number for number, floor in enumerate(floors) if room in floor)


def upward_imports(modules: Modules, floors: list[set[str]] = FLOORS) -> list[str]:
    """Find imports of a higher floor, or of another room on the same floor."""
    found = []
    for importer, imported, line in edges(modules):
        mine, theirs = room_of(importer, floors), room_of(imported, floors)
        if mine and theirs and mine != theirs and floor_of(theirs, floors) >= floor_of(mine, floors):
            found.append(
                f"{modules[importer].file}:{line} imports {imported}: {mine} is below {theirs} or next to it. Move "
                f"what both need to a floor below {mine}, or pass it in as an argument."
            )
    return found


def det_upward_imports(modules: Modules) -> list[str]:
    """Find imports of a higher floor within det/, and modules of det/ on no floor."""
    homeless_there = [
        f"{module.file}: belongs to no floor of det/."
        for name, module in modules.items()
        if name.startswith("det.") and room_of(name, DET_FLOORS) is None
    ]
    return homeless_there + upward_imports(modules, DET_FLOORS)


def homeless(modules: Modules) -> list[str]:
    """Find modules that no room holds."""
    return [
        f"{module.file}: belongs to no room. Put it into one of {', '.join(sorted(set().union(*FLOORS)))}."
        for name, module in modules.items()
        if name != "crossmae" and room_of(name) is None
    ]


def foreign_imports_of_models(modules: Modules) -> list[str]:
    """Find imports in crossmae/models/ of anything but torch, timm and itself."""
    allowed = {"torch", "timm", "crossmae"}
    return [
        f"{module.file}:{line} imports {imported}: crossmae/models/ needs torch and timm only. Pass plain values in."
        for name, module in modules.items()
        if name.startswith("crossmae.models")
        for imported, line in module.imports
        if (top := imported.partition(".")[0]) not in allowed and not _is_standard(top)
    ]


def _is_standard(top: str) -> bool:
    import sys

    return top in sys.stdlib_module_names


def cycles(modules: Modules) -> list[str]:
    """Find modules that import each other in a loop, imports inside functions included."""
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, imported, _ in edges(modules):
        if importer != "crossmae":  # the face imports its names on first use
            graph[importer].add(imported)
    reached = {name: _reachable(name, graph) for name in modules}
    loops = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in modules
        if name in reached[name]
    }
    return [
        f"{', '.join(sorted(loop))} import each other. Move what both need into a module below them." for loop in loops
    ]


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += graph[name]
    return found


def private_imports(modules: Modules) -> list[str]:
    """Find imports of a private name from another module."""
    return [
        f"{module.file}:{line} imports {imported}: a private name. Make the name public where it lives, or leave it."
        for module in modules.values()
        for imported, line in module.imports
        if imported.partition(".")[0] in {"crossmae", "det", "tools"}
        and (last := imported.rpartition(".")[2]).startswith("_")
        and not last.startswith("__")
    ]


def crowded_folders(modules: Modules) -> list[str]:
    """Find folders with too many entries, and files with too many lines."""
    entries: dict[Path, set[str]] = defaultdict(set)
    found = []
    for module in modules.values():
        path = Path(module.file)
        for folder in path.parents[:-1]:
            entries[folder].add(path.relative_to(folder).parts[0])
        if (lines := module.source.count("\n")) > MOST_LINES:
            found.append(f"{module.file}: {lines} lines, at most {MOST_LINES}. Split the file by concern.")
    for folder, names in entries.items():
        if folder != Path("tools") and len(names) > MOST_ENTRIES:
            found.append(f"{folder}/: {len(names)} entries, at most {MOST_ENTRIES}. Merge files or name a folder.")
    return found


def vague_names(modules: Modules) -> list[str]:
    """Find modules and folders whose name says nothing."""
    return [
        f"{module.file}: {word!r} names no concept. Name the file after what is in it, in the field's words."
        for name, module in modules.items()
        for word in name.split(".")
        if word in VAGUE
    ]


def names_taken_twice(modules: Modules) -> list[str]:
    """Find public classes and constants that two modules define."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module in modules.values():
        if not module.file.startswith("tools/"):
            for name in _definitions(module.tree):
                homes[name].append(module.file)
    return [
        f"{name} is defined in {' and '.join(files)}. Import the one, or give the other its own name."
        for name, files in homes.items()
        if len(files) > 1
    ]


def _definitions(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name) and len(target.id) > 1}
    return {name for name in found if not name.startswith("_") and name != "log"}


def whole_configs(modules: Modules) -> list[str]:
    """Find functions outside config modules and tool entries that take a whole config."""
    return [
        f"{module.file}: {name}({argument}): takes a whole config. Read the config at the door, pass plain values."
        for module in modules.values()
        if not module.file.endswith("config.py")
        for name, function in module.functions
        if not (module.file.startswith("tools/") and name == "main")
        and (argument := _config_argument(function)) is not None
    ]


def _config_argument(function: ast.FunctionDef) -> str | None:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    for argument in arguments:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        if argument.arg in {"config", "cfg"} or WHOLE_CONFIGS & set(re.findall(r"\w+", annotation)):
            return argument.arg
    return None


PRODUCT = read_product()


@pytest.mark.parametrize(
    "rule",
    [
        upward_imports,
        det_upward_imports,
        homeless,
        foreign_imports_of_models,
        private_imports,
        crowded_folders,
        vague_names,
        cycles,
        names_taken_twice,
    ],
    ids=lambda rule: rule.__name__,
)
def test_the_product_keeps_the_rule(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(PRODUCT) == []


def test_a_config_stops_at_the_door() -> None:
    found = whole_configs(PRODUCT)
    assert len(found) <= MOST_WHOLE_CONFIGS, "\n".join(found)
    constructors = [line.partition(":")[0] for line in found if "__init__(" in line]
    assert constructors == ["det/inference/predict.py"]  # `det.Predictor(config, weights)` is itself a published door


def planted(name: str, source: str) -> Modules:
    """Return the product with one more module."""
    file = f"{name.replace('.', '/')}.py"
    return PRODUCT | {name: Module(name, file, source)}


@pytest.mark.parametrize(
    "rule, name, source",
    [
        (upward_imports, "crossmae.data.fault", "from crossmae.training.loop import train"),
        (upward_imports, "det.data.fault", "def f():\n    from crossmae.classification.vit import build_vit"),
        (det_upward_imports, "det.backbone.fault", "from det.evaluation.run_files import TASKS"),
        (det_upward_imports, "det.inference.fault", "def f():\n    import det.training.train"),
        (det_upward_imports, "det.fault", ""),
        (homeless, "crossmae.fault", ""),
        (foreign_imports_of_models, "crossmae.models.fault", "import numpy"),
        (foreign_imports_of_models, "crossmae.models.fault", "from PIL import Image"),
        (private_imports, "crossmae.data.fault", "from crossmae.files import _write"),
        (crowded_folders, "crossmae.data.fault", "x = 1\n" * 551),
        (vague_names, "crossmae.data.utils", ""),
        (names_taken_twice, "det.fault", "class CrossMAE:\n    pass"),
        (whole_configs, "det.data.fault", "def f(cfg): ..."),
        (whole_configs, "crossmae.data.fault", "class A:\n    def __init__(self, settings: 'PretrainConfig'): ..."),
    ],
)
def test_a_planted_fault_is_found(rule: Callable[[Modules], list[str]], name: str, source: str) -> None:
    file = f"{name.replace('.', '/')}.py"
    new = Counter(rule(planted(name, source))) - Counter(rule(PRODUCT))
    assert any(file in line for line in new), new


def test_a_planted_cycle_and_a_planted_crowd_are_found() -> None:
    a = Module("crossmae.data.one", "crossmae/data/one.py", "def f():\n    import crossmae.data.two")
    b = Module("crossmae.data.two", "crossmae/data/two.py", "from crossmae.data.one import f")
    assert any("crossmae.data.one, crossmae.data.two" in line for line in cycles(PRODUCT | {a.name: a, b.name: b}))
    crowd = {f"det.room.m{i}": Module(f"det.room.m{i}", f"det/room/m{i}.py", "") for i in range(MOST_ENTRIES + 1)}
    assert any(line.startswith("det/room/:") for line in crowded_folders(PRODUCT | crowd))


def test_contributing_states_the_budgets() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for budget in (f"{MOST_ENTRIES} entries", f"{MOST_LINES} lines", f"{MOST_WHOLE_CONFIGS} functions"):
        assert budget in text
