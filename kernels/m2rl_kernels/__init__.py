"""m2rl's kernels, importable without the engine: torch in, torch out.

    from m2rl_kernels import linear_logprob, policy_loss, group_advantages, plan_packing

Names resolve lazily (PEP 562), so importing one operation imports only what it needs.
"""

import importlib
import sys
import types

_HOME = {
    "linear_logprob": "linear_logprob",
    "linear_logprob_forward": "linear_logprob",
    "linear_logprob_backward": "linear_logprob",
    "linear_kl": "linear_kl",
    "sampled_reverse_kl": "linear_kl",
    "token_logprob": "token_logprob",
    "policy_loss": "policy_loss",
    "Advantages": "advantages",
    "group_advantages": "advantages",
    "PackPlan": "packing",
    "plan_packing": "packing",
    "pack": "packing",
    "unpack": "packing",
    "gather_rows": "packing",
    "average": "delta_merge",
    "task_arithmetic": "delta_merge",
    "ties": "delta_merge",
    "dare": "delta_merge",
    "sce": "delta_merge",
    "ram": "delta_merge",
    "della": "delta_merge",
    "breadcrumbs": "delta_merge",
    "model_stock": "delta_merge",
    "karcher": "delta_merge",
    "tsv_m": "delta_merge",
    "iso_c": "delta_merge",
    "merge_tensors": "delta_merge",
    "topk_masks": "delta_merge",
    "SyncPlan": "weight_sync",
    "checksum": "weight_sync",
    "delta_stats": "delta_stats",
    "count_sketch": "delta_stats",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'm2rl_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_HOME])


class _Package(types.ModuleType):
    """An operation and the file that holds it share a name: the attribute is always the operation, whoever imported
    first."""

    def __setattr__(self, name, value):
        if name in _HOME and isinstance(value, types.ModuleType) and hasattr(value, name):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
