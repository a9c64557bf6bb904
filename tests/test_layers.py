"""The directions of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYER = {  # a module may import its own layer and those below
    "types": 0,
    "configs": 0,
    "config": 0,
    "command": 0,
    "display": 0,
    "domains": 1,
    "embedded": 2,
    "data": 2,
    "policy": 2,
    "safetensors_io": 2,
    "samples": 3,
    "checkpoint": 3,
    "rollout": 3,
    "objectives": 3,
    "learner": 4,
    "launch": 4,
    "telemetry": 4,
    "scores": 4,
    "evaluate": 5,
    "sample_log": 5,
    "benchmarks": 5,
    "published": 5,
    "metrics": 5,
    "train": 6,
    "plan": 6,
    "distill": 6,
    "merge_inputs": 3,
    "merge_output": 4,
    "merge": 6,
    "merge_yaml": 6,
    "merge_sweep": 6,
    "analyze": 6,
    "report": 7,
    "comparison": 7,
    "findings": 7,
    "browser": 7,
    "study": 8,
}


def imports(path: Path) -> set[str]:
    """Dotted names of every module imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted((ROOT / "m2rl").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "m2rl_kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_engine(path):
    names = {n.split(".")[0] for n in imports(path)}
    assert "m2rl" not in names
    assert names <= {"__future__", "m2rl_kernels", "torch", "triton", "numpy", *__import__("sys").stdlib_module_names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    parts = path.relative_to(ROOT / "m2rl").with_suffix("").parts
    if parts == ("__init__",):
        assert path.read_text() == ""
        return
    assert parts[0] in LAYER, f"give {parts[0]} a layer"
    for name in imports(path):
        if name.startswith("m2rl.") and name.split(".")[1] in LAYER:
            below = name.split(".")[1]
            assert LAYER[below] <= LAYER[parts[0]], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "m2rl" / "domains").glob("*.py")), ids=lambda p: p.name)
def test_domains_know_no_tensor(path):
    assert not {n.split(".")[0] for n in imports(path)} & {"torch", "transformers", "m2rl_kernels"}


def test_only_one_file_imports_vllm():
    users = [p.name for p in MODULES if any(n.split(".")[0] == "vllm" for n in imports(p))]
    assert users in ([], ["vllm.py"])


def test_only_the_learner_differentiates():
    users = [p.name for p in MODULES if ".backward()" in p.read_text()]
    assert users == ["learner.py"]


def test_names_say_something():
    vague = {"utils", "helpers", "common", "misc", "base", "registry", "factory"}
    assert not [p for p in [*MODULES, *KERNELS] if p.stem in vague]
