"""stalling_train.py VERSION ...: m2rl.train with a vLLM that stops answering once it holds weights of that version."""

import sys
import time

from m2rl import train
from m2rl.command import exit_with
from m2rl.rollout.vllm import VllmEngine

poll = VllmEngine.poll


def stuck(self):
    if self.version >= int(sys.argv[1]) and self.pending:
        wait_for_a_lost_kernel()
    return poll(self)


def wait_for_a_lost_kernel():
    time.sleep(3600)


if __name__ == "__main__":
    VllmEngine.poll = stuck
    exit_with(lambda: train.main(sys.argv[2:]))
