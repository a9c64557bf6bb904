"""Rules and models that merging on CUDA is compared with the CPU on."""

import torch

# name, options: every element is the CPU's bit for bit
EXACT = [
    ("average", {}),
    ("task_arithmetic", {"lam": 0.7}),
    ("ties", {"density": 0.2}),
    ("ties", {"density": 0.3, "scope": "model"}),
    ("ties", {"density": 0.3, "preset": "paper"}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.8, "trim_density": 0.2}),
    ("ram", {}),
    ("ram_plus", {}),
    ("breadcrumbs", {"density": 0.3}),
    ("ties", {"density": 0.2, "compute_dtype": "bfloat16"}),
]
# the same up to the order of float64 sums
SUMMED = [
    ("sce", {}),
    ("sce", {"density": 0.2}),
    ("dare_linear", {"density": 0.3, "rescale": "l1"}),
    ("model_stock", {}),
    ("karcher", {}),
]


def models(shapes, dtype, experts):
    """A base and experts that differ from it at four elements in ten."""
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(s, generator=g) * 0.05 for s in shapes]
    tuned = [
        [
            (b + torch.randn(b.shape, generator=g) * 1e-3 * (torch.rand(b.shape, generator=g) < 0.4)).to(dtype)
            for b in base
        ]
        for _ in range(experts)
    ]
    return [b.to(dtype) for b in base], tuned
