"""The example of kernels/README.md runs as it stands and computes what it says."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_example_trains_on_what_is_live():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["plan"].bins_per_rank == 2 and names["advantage"].shape == (19,)
    assert names["advantage"][:8].abs().min() > 0 and not names["advantage"][8:].any()
    assert names["weight"].grad.abs().max() > 0 and float(names["stats"][0, 0]) == len(names["b"]["token"])
    assert not names["hidden"].grad[~names["live"]].any()
