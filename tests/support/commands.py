"""Start the project's commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def torchrun(
    *arguments: str, ranks: int = 1, timeout_s: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    return subprocess.run(command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=timeout_s)


def start(*arguments: str) -> subprocess.Popen:
    """`python -m m2rl.train ...` without torchrun, for tests that send signals to the process itself."""
    return subprocess.Popen(
        [sys.executable, "-m", "m2rl.train", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
