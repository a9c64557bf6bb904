"""What can be known to be wrong with a study before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from m2rl.command import named
from m2rl.study.definition import Study, as_input_error
from m2rl.study.plan import Seed, sampling_config, training_configs
from m2rl.types import InputError


def preflight(study: Study, out: Path) -> None:
    """InputError for a checkpoint of another architecture or tokenizer, absent data, an unknown or an empty benchmark.
    Reads headers, tokenizers and rows, no weights."""
    from transformers import AutoTokenizer

    from m2rl import embedded
    from m2rl.data import files
    from m2rl.data.mixture import GENERATED
    from m2rl.evaluate import architecture_key
    from m2rl.merge_inputs import open_inputs
    from m2rl.policy import reading_model
    from m2rl.safetensors_io import resolve_folder

    s = Seed(study, study.seeds[0], out)
    configs = training_configs(s)
    for name, config in configs.items():
        with as_input_error(f"run {name}"):
            files([p for p in config.data.train if p not in GENERATED])
    given = {r.name: r.checkpoint for r in study.run if r.checkpoint}
    for name, folder in given.items():
        try:
            resolve_folder(folder)
        except InputError as error:
            raise InputError(f"run {name}: checkpoint {error}") from None
    if len(given) > 1:
        others = [n for n in given if n != "sft"]
        open_inputs(given["sft"], [given[n] for n in others])  # names, shapes, tokenizer
        for name in others:
            if architecture_key(given[name]) != architecture_key(given["sft"]):
                raise InputError(
                    f"run {name}: {given[name]} is of another architecture, tokenizer or chat template than sft, "
                    f"{given['sft']}"
                )
    path = given.get("sft") or configs["sft"].model.path
    tokenizer: Any
    if path == "embedded":
        tokenizer = embedded.build_tokenizer()
    else:
        with reading_model(f"run sft: {path} has no usable tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(path)
    load_benchmarks(study, tokenizer)


def load_benchmarks(study: Study, tokenizer: Any) -> list[Any]:
    """The benchmarks, their prompts encoded. InputError for an unknown or an empty one."""
    from m2rl import benchmarks

    sources = named(study.sampling.data_files, "sampling.data_files")
    config, found = sampling_config(study), []
    for name in study.sampling.benchmarks:
        with as_input_error(f"sampling.benchmarks {name}"):
            b = benchmarks.load(
                name,
                tokenizer,
                config,
                data_file=sources.get(name, ""),
                k=study.sampling.k,
                limit=study.sampling.problems,
            )
        if not b.prompts:
            raise InputError(f"sampling.benchmarks: {name} has no problem")
        found.append(dataclasses.replace(b, temperature=1.0))  # the policy itself, which is what divergences need
    domains = {p.domain for b in found for p in b.prompts}
    for d in study.domains:
        if d not in domains:
            raise InputError(f"sampling.benchmarks: no benchmark of domain {d}, which has an expert")
    return found
