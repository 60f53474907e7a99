"""Arrows point one way: examples -> {ar, distill} -> flow. No package imports a sibling that it does not declare."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "packages/farmer-flow": set(),
    "packages/farmer-ar": {"farmer_flow"},
    "packages/farmer-guidance": set(),
    "packages/farmer-distill": {"farmer_flow"},
    "examples": {"farmer_flow", "farmer_ar", "farmer_distill", "farmer_guidance"},
}


def imports(folder):
    """Yield (module, imported name) of every import below a folder."""
    for path in sorted((ROOT / folder / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                yield from ((node.module, alias.name) for alias in node.names)


def test_every_distribution_is_known():
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("packages/*/pyproject.toml")}
    assert found | {"examples"} == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_no_sibling_is_imported_but_the_allowed(folder):
    own = {path.name for path in (ROOT / folder / "src").iterdir()}
    siblings = {module.split(".")[0] for module, _ in imports(folder) if module.startswith("farmer_")} - own
    assert siblings <= ALLOWED[folder]


def test_the_prior_takes_only_the_transformer_from_the_flow():
    taken = {(module, name) for module, name in imports("packages/farmer-ar") if module.startswith("farmer_flow")}
    assert taken <= {("farmer_flow", "Transformer"), ("farmer_flow", "KVCache")}


def test_the_student_takes_what_stands_at_the_flows_front_door():
    modules = {module for module, _ in imports("packages/farmer-distill") if module.startswith("farmer_flow")}
    assert modules == {"farmer_flow"}


@pytest.mark.parametrize("folder", [folder for folder in ALLOWED if folder != "examples"])
def test_packages_need_only_torch_and_einops(folder):
    standard = {"__future__", "collections", "contextlib", "copy", "dataclasses", "inspect", "math", "time", "typing"}
    roots = {module.split(".")[0] for module, _ in imports(folder)}
    assert {r for r in roots if not r.startswith("farmer_")} <= standard | {"torch", "einops"}
