"""The law of the house: a room imports only from the rooms before it (WORKSPACE.md). Nothing else about style."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["core", "parallel", "layers", "models", "train", "steps", "plan", "pipeline.py", "tasks", "serve"]
FILES = sorted(
    path.relative_to(ROOT) for top in ("cogvideox_jax", "configs", "data") for path in (ROOT / top).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def allowed(path: Path, name: str) -> bool:
    top, *rest = name.split(".")
    room = path.parts[1] if path.parts[0] == "cogvideox_jax" else path.parts[0]
    is_task = path.parts[0] == "cogvideox_jax" and room in ("tasks", "serve")
    is_above_data = is_task or path == Path("cogvideox_jax/pipeline.py")
    if top == "ml_collections":
        return path.parts[0] == "configs" or is_task or room == "main.py"
    if top == "configs":
        return path.parts[0] == "configs"
    if top == "data":
        return path.parts[0] == "data" or is_above_data
    if top == "cogvideox_jax" and rest:
        if path.parts[0] == "configs":
            return False
        if path.parts[0] == "data":
            return rest[0] in ("core", "models")
        if room == "main.py":
            return rest[0] in ("core", "parallel", "train")
        target = f"{rest[0]}.py" if rest[0] == "pipeline" else rest[0]
        if room in ROOMS and target in ROOMS:
            return ROOMS.index(target) <= ROOMS.index(room)
    return True


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports(path):
    wrong = sorted(name for name in imports(path) if not allowed(path, name))
    assert not wrong, f"{path} may not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_mesh_words_stay_in_parallel(path):
    if path.parts[1] == "parallel":
        return
    names = {name.split(".")[-1] for name in imports(path)}
    assert not names & {"PartitionSpec", "shard_map", "NamedSharding"}, path
