"""The rules of the layout: what is a package, who may import whom, where each large library may appear."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from arrows import arrows, rooms

import distilbeam

ROOT = Path(__file__).resolve().parent.parent
PARTS = distilbeam.PARTS

# what a part may import of the others; "teacher.softlabels" stands for that sub-package alone
ALLOWED = {
    "pipelines": {"teacher", "selection", "student"},
    "student": {"kernels", "teacher.softlabels", "teacher.programs", "selection"},
    "teacher": set(),
    "selection": set(),
    "kernels": set(),
}

# what all parts stand on: the modules and packages of distilbeam/ itself, which use none of the parts
SHARED = {path.stem for path in (ROOT / "distilbeam").glob("[a-z]*")} - {"py"}

# the rooms of each part, lowest floor first: a room imports those of lower floors alone
FLOORS = {
    "kernels": (
        ("compiling", "devices", "labels", "resolve", "sizes"),
        ("quantize", "tpu_operations"),
        ("distillation", "laurel", "low_precision"),
        ("conversion", "linear_distillation"),
    ),
    "pipelines": (
        ("engine", "sections"),
        ("token_config",),
        ("config",),
        ("examples", "needs", "pool"),
        ("acquisition",),
        ("labelling",),
        ("jobs",),
        ("ingest", "report"),
        ("corpus", "language", "prediction"),
        ("conversion", "experiments", "steps", "transforms"),
        ("streaming",),
        ("forecast",),
        ("cli",),
    ),
    "selection": (
        ("checks", "compiled"),
        ("gains", "margins", "rounding", "sketch"),
        ("games", "trust"),
        ("strategies",),
    ),
    "student": (
        ("data", "networks", "other_folders", "own_files"),
        ("model_card", "predictions", "trust"),
        ("checkpoint",),
        ("export",),
        ("evaluation",),
        ("training",),
        ("language", "search"),
    ),
    "teacher": (
        ("class_order", "oom_backoff", "programs", "protobuf_fields", "protocol", "sources"),
        ("answers", "fingerprint"),
        ("kind_config",),
        ("token_config",),
        ("config", "predict"),
        ("backends", "load", "softlabels"),
        ("tfserving",),
        ("tokens",),
    ),
}


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the part that is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_import_time(path: Path) -> set[str]:
    """The top-level packages that are imported when the module is: those not inside a function, nor for types alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        found.update(name.split(".")[0] for name in imports(node) if isinstance(node, ast.Import | ast.ImportFrom))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}


def test_parts_have_stubs_and_no_init() -> None:
    for part in PARTS:
        assert not (ROOT / part / "__init__.py").exists(), (
            f"{part}/__init__.py would shadow other packages of that name"
        )
        assert (ROOT / part / "__init__.pyi").is_file()


def test_package_list_is_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    subpackages = [path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("__init__.py")]
    subpackages += [
        path.parent.relative_to(ROOT / "distilbeam") for path in (ROOT / "distilbeam").rglob("*/__init__.py")
    ]
    found = ["distilbeam", *(f"distilbeam.{part}" for part in PARTS)]
    found += [".".join(("distilbeam", *path.parts)) for path in subpackages]
    assert sorted(listed) == sorted(found)


def test_every_folder_with_code_is_a_package() -> None:
    for part in PARTS:
        for path in modules(part):
            assert path.parent == ROOT / part or (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part: str) -> None:
    for path in modules(part):
        for name in imports(ast.parse(path.read_text())):
            if name.startswith("distilbeam."):
                target = name.removeprefix("distilbeam.")
                allowed = {part, *ALLOWED[part], *SHARED}
                assert any(target == a or target.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("part", PARTS)
def test_rooms_import_lower_floors_alone(part: str) -> None:
    floor = {room: level for level, floor_rooms in enumerate(FLOORS[part]) for room in floor_rooms}
    assert set(rooms(part).values()) == set(floor)
    assert [arrow for arrow in arrows(part) if floor[arrow[1]] >= floor[arrow[0]]] == []


def test_beam_only_in_pipelines_and_the_handler_adapter() -> None:
    for part in ("kernels", "selection", "student", "teacher"):
        for path in modules(part):
            if path.relative_to(ROOT) != Path("teacher/backends/beam.py"):
                assert "apache_beam" not in imported(path), path


def test_large_libraries_load_only_where_they_are_asked_for() -> None:
    for part in PARTS:
        for path in modules(part):
            assert not imports_at_import_time(path) & {"tensorflow", "transformers", "onnxruntime"}, path
            if not path.stem.startswith(("triton", "pallas")):
                assert not imports_at_import_time(path) & {"triton", "jax"}, path


def test_selection_has_neither_beam_nor_torch() -> None:
    for path in modules("selection"):
        assert not imported(path) & {"apache_beam", "torch", "tensorflow", "jax"}, path


@pytest.mark.parametrize("part", PARTS)
def test_public_names_resolve(part: str) -> None:
    module = importlib.import_module(f"distilbeam.{part}")
    names = distilbeam.public_names(ROOT / part / "__init__.pyi")
    assert module.__all__ == sorted(names)
    for name, source in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(source, f"distilbeam.{part}"), name)
        assert not (ROOT / part / f"{name}.py").exists(), f"a module named {name} would replace the public name {name}"
        assert not (ROOT / part / name).exists(), f"a sub-package named {name} would replace the public name {name}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    module = importlib.import_module("distilbeam.teacher")
    with pytest.raises(AttributeError, match=r"module 'distilbeam.teacher' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_importing_the_parts_loads_no_large_library() -> None:
    code = (
        "import sys, distilbeam, distilbeam.pipelines, distilbeam.kernels, distilbeam.pipelines.cli.main;"
        "print(sorted({'torch', 'apache_beam', 'tensorflow', 'pyarrow', 'sklearn'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("part", ["kernels", "student", "selection"])
def test_parts_work_without_beam_and_tensorflow(part: str) -> None:
    names = [f"distilbeam.{part}." + ".".join(p.relative_to(ROOT / part).with_suffix("").parts) for p in modules(part)]
    names = [n.removesuffix(".__init__") for n in names if not n.rsplit(".", 1)[-1].startswith(("triton", "pallas"))]
    code = (
        "import sys, importlib\n"
        "sys.modules['apache_beam'] = sys.modules['tensorflow'] = None\n"  # an import of either now raises
        f"for name in {names}: importlib.import_module(name)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
