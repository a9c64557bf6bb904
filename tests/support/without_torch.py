"""Run a command in a process of its own and see that it never loads torch: seconds and hundreds of MB for nothing."""

import subprocess
import sys


def run_without_torch(module: str, *arguments: str) -> None:
    code = f"import sys; from {module} import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
