"""Read a recipe in mergekit's YAML schema: `python -m m2rl.merge --config merge.yaml --out DIR` in place of
`mergekit-yaml`.

Defaults and conventions are mergekit's (`preset="mergekit"`). Scalars, gradients (a list over the depth of the model)
and filters (a list of {value, filter}) are understood. Everything else of that schema is an error that names the key:
nothing is ignored.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2rl_kernels.merge_recipe import Recipe, recipe

from m2rl.types import InputError

METHODS = {
    "linear": "average",
    "ramplus_tl": "ram_plus",
    **{
        name: name
        for name in (
            "task_arithmetic",
            "ties",
            "dare_linear",
            "dare_ties",
            "breadcrumbs",
            "breadcrumbs_ties",
            "della",
            "della_linear",
            "sce",
            "ram",
            "model_stock",
            "karcher",
        )
    },
}
OWN = ("weight", "density", "gamma", "epsilon")  # per model
SHARED = {
    "normalize": "normalize",
    "lambda": "lam",
    "select_topk": "density",
    "r": "r",
    "alpha": "alpha",
    "max_iter": "iterations",
    "rescale": "rescale",
    "int8_mask": "",
    "epsilon": "epsilon",
}  # key -> our option ("": no effect on the result)
FLAGS = ("normalize", "rescale", "int8_mask")  # the others are numbers
READ = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source"}


@dataclass(frozen=True)
class Plan:
    """A recipe file, resolved."""

    base: str | None
    experts: list[str]
    recipe: Recipe
    dtype: str | None


def read_config(path: str | Path) -> Plan:
    """InputError names the file and the key that is missing, unknown or not supported."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InputError(f"--config {path} does not exist")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} must be a mapping with merge_method and models")
    for key in sorted(set(config) - READ, key=str):
        raise InputError(
            f"{path}: key {key!r} is not supported here (whole-model merges of one architecture; "
            f"keys: {', '.join(sorted(READ))})"
        )
    name = config.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(
            f"{path}: merge_method {name!r} is not supported here; supported: {', '.join(sorted(METHODS))}"
        )
    if config.get("tokenizer_source") not in (None, "base"):
        raise InputError(f"{path}: tokenizer_source {config['tokenizer_source']!r} is not supported here; only 'base'")
    for key in ("dtype", "out_dtype"):
        if config.get(key) not in (None, "float32", "bfloat16", "float16"):
            raise InputError(f"{path}: {key} must be float32, bfloat16 or float16, got {config[key]!r}")
    base = None if config.get("base_model") is None else _reference(path, "base_model", config["base_model"])
    method = METHODS[name]
    if base is None and method not in ("average", "karcher"):
        raise InputError(f"{path}: base_model is needed by {name}")
    models = config.get("models")
    if not isinstance(models, list) or not models:
        raise InputError(f"{path}: models must be a list of at least one model")
    experts, own = [], []
    for entry in models:
        if not isinstance(entry, dict) or "model" not in entry or set(entry) - {"model", "parameters"}:
            raise InputError(f"{path}: models: an entry has a model and parameters, got {entry!r}")
        source = _reference(path, "models", entry["model"])
        if source == base and method not in ("average", "karcher"):
            continue  # mergekit lets the base stand in the list; it contributes no task vector
        experts.append(source)
        own.append(_parameters(path, f"models: parameters of {source}", entry.get("parameters")))
    shared = _parameters(path, "parameters", config.get("parameters"))
    if not experts:
        raise InputError(f"{path}: models must name a model beside the base, got only {base}")
    per_model = {key for key in OWN if not (key == "epsilon" and method in ("ram", "ram_plus"))}
    for key in sorted({k for p in own for k in p} - per_model):
        raise InputError(
            f"{path}: parameter {key!r} of a model is not supported here; supported: {', '.join(sorted(per_model))}"
        )
    for key in sorted(set(shared) - set(SHARED) - per_model):
        raise InputError(
            f"{path}: parameter {key!r} is not supported here; supported: {', '.join(sorted(set(SHARED) | per_model))}"
        )
    return Plan(
        base,
        experts,
        _recipe(path, method, own, shared, config, per_model),
        config.get("out_dtype") or config.get("dtype"),
    )


def _parameters(path: Path, where: str, found: Any) -> dict[str, Any]:
    """key -> its value. Numbers are numbers, though YAML reads 1e-3 as text."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path}: {where} must be a mapping of names to values, got {found!r}")
    return {key: _parameter(path, key, value) for key, value in found.items()}


def _parameter(path: Path, key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_parameter(path, key, v) for v in value]
    if isinstance(value, dict):
        return {k: _parameter(path, key, v) if k == "value" else v for k, v in value.items()}
    if value is None or (key in FLAGS and isinstance(value, bool)):
        return value
    if key not in FLAGS:
        with contextlib.suppress(TypeError, ValueError):
            return value if isinstance(value, (int, float)) else float(value)
    raise InputError(
        f"{path}: parameter {key!r} must be {'true or false' if key in FLAGS else 'a number'}, got {value!r}"
    )


def _reference(path: Path, key: str, value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("model"), dict) and set(value) == {"model"}:
        value = value["model"]
    if isinstance(value, dict) and set(value) == {"path"}:
        value = value["path"]
    if not isinstance(value, str):
        raise InputError(f"{path}: {key}: a model is a folder or a hub id, got {value!r}")
    if "+" in value:
        raise InputError(
            f"{path}: {key}: {value!r} asks for a LoRA adapter: merge it into its base model first, then give that "
            "folder"
        )
    return value


def _recipe(path: Path, method: str, own: list[dict], shared: dict, config: dict, per_model: set[str]) -> Recipe:
    def lists(key: str, default: Any) -> list[Any]:
        found = [p.get(key, shared.get(key, default)) for p in own]
        if any(v is None for v in found):
            raise InputError(
                f"{path}: parameter {key!r} is missing for model {[v is None for v in found].index(True) + 1} of "
                f"{len(own)}"
            )
        return found

    weighted = method not in ("sce", "ram", "ram_plus", "model_stock", "karcher")
    weights = lists("weight", None) if weighted else [1.0] * len(own)
    sparse = method in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
    densities = lists("density", 1.0) if sparse else [shared.get("select_topk", 1.0)] * len(own)
    lam = shared.get("lambda", 1.0)
    options: dict[str, Any] = {"compute_dtype": config.get("dtype") or "input"}
    if method == "average":
        options["compute_dtype"] = "float32"  # mergekit accumulates this one in float32 too
    for key, option in SHARED.items():
        if key in shared and option and key not in ("lambda", "select_topk"):
            value = shared[key]
            if isinstance(value, (list, dict)):
                raise InputError(f"{path}: parameter {key!r} must be one value here, got {value!r}")
            options[option] = ("l1" if value else "none") if key == "rescale" else value
            if key == "max_iter":
                options[option] = int(value)
    for key in ("gamma", "epsilon"):
        values = [p[key] for p in own if key in p]
        if values:
            if any(v != values[0] for v in values) or len(values) < len(own) or isinstance(values[0], (list, dict)):
                raise InputError(
                    f"{path}: parameter {key!r} must be the same number for every model here, got {values}"
                )
            options[key] = values[0]
    per_tensor = None
    everything = [*weights, *densities, lam]
    if any(isinstance(v, (list, dict)) for v in everything):
        _check_forms(path, everything)
        per_tensor = resolver(path, weights, densities, lam)
    scalar = [[v if isinstance(v, (int, float)) else 1.0 for v in values] for values in (weights, densities)]
    return recipe(
        method,
        len(own),
        preset="mergekit",
        weights=scalar[0],
        density=scalar[1],
        lam=lam if isinstance(lam, (int, float)) else 1.0,
        per_tensor=per_tensor,
        config=path.read_text(),
        **options,
    )


def _check_forms(path: Path, values: list[Any]) -> None:
    for value in values:
        entries = value if isinstance(value, list) else [value]
        mixed = len({isinstance(e, dict) for e in entries}) != 1
        if mixed or any(isinstance(e, dict) and not _is_conditional(e) for e in entries):
            raise InputError(
                f"{path}: a parameter is a number, a list of numbers, or a list of {{value, filter}}, got {value!r}"
            )


def _is_conditional(entry: dict[str, Any]) -> bool:
    return {"value"} <= set(entry) <= {"value", "filter"} and isinstance(entry.get("filter"), str | None)


def resolver(path: Path, weights: list[Any], densities: list[Any], lam: Any) -> Callable[[str], Mapping[str, Any]]:
    """tensor name -> {weights, density, lam}. Depth t runs from 0 (first layer) to 1 (last); what is in no layer
    (embedding, final norm, head) has 0, as in mergekit 0.1.5."""
    layers: dict[str, int] = {}

    def at(name: str) -> dict[str, Any]:
        found = re.search(r"layers\.(\d+)\.", name)
        last = layers.get("last", 0)
        t = 0.0 if not found else int(found.group(1)) / last if last else 1.0
        values = [[_value(path, v, name, t) for v in row] for row in (weights, densities, [lam])]
        return {"weights": values[0], "density": values[1], "lam": values[2][0]}

    at.layers = layers  # type: ignore[attr-defined]  # the number of the last layer, told by who knows all names
    return at


def _value(path: Path, setting: Any, name: str, t: float) -> float:
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list):
        if isinstance(setting[0], dict):
            for entry in setting:
                pattern = entry.get("filter")
                if pattern in (None, "*") or pattern in name:
                    return _value(path, entry["value"], name, t)
            raise InputError(f"{path}: no value for {name}: add one without a filter")
        at = t * (len(setting) - 1)
        low = int(at)
        high = min(low + 1, len(setting) - 1)
        return (1 - (at - low)) * float(setting[low]) + (at - low) * float(setting[high])
    return float(setting)
