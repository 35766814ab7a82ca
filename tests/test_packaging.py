"""The project's shape: every package is shipped, and dependencies point one way."""

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
FOLDERS = {"textcond": "textcond", "pipelines": "textcond.pipelines", "apps": "textcond.apps"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_every_package_of_the_tree_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join([package, *file.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed) == there


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("textcond", ("diffusers", "gradio", "textcond.pipelines", "textcond.apps")),
        ("pipelines", ("gradio", "textcond.apps")),
    ],
)
def test_dependencies_point_one_way(folder, forbidden):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        (file.name, name)
        for file in files
        for name in imports(file)
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]
    assert wrong == []
