"""Run under torchrun: a rank whose last act is a collective, while a mesh holds its group and nobody yields the GIL."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from m2rl.launch import process_group

if __name__ == "__main__":
    with process_group(1):
        mesh = init_device_mesh("cpu", (2,))  # lives to the end of the process, as in DTensor's caches
        sys.setswitchinterval(60)  # gloo's threads get the GIL only where this one waits
        for _ in range(2):  # one for each of them
            dist.all_reduce(torch.ones(1000), async_op=True)
        sum(range(10_000_000))  # they finish meanwhile, and stand before the GIL with the tensors in their hands
