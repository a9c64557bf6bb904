"""The build says in one sentence what it lacks."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_without_a_compiler_the_install_stops_with_one_sentence(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PATH")} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("m2rl needs a C++17 compiler")
    assert "apt install g++" in done.stderr


def test_the_cpu_library_links_neither_torch_nor_python():
    library = ROOT / "kernels" / "m2rl_kernels" / "libm2rl_cpu.so"
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "torch" not in needed and "python" not in needed


def test_an_installation_has_every_package_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "m2rl").rglob("__init__.py")}
    assert set(listed) == there | {"m2rl_kernels"}
