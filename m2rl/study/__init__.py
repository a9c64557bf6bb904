"""`python -m m2rl.study --out DIR`: mix or merge? The whole comparison, one command, stage by stage.

    sft -> math, code, science, if (experts) -> mixed -> merges -> distill -> samples of all -> analyses -> report.html

A study is a TOML file: `study_embedded` (the default, 2 CPU cores), `study_qwen3_4b` (full size), or your own. Every
stage is a process of its own (training: `m2rl.train`, under torchrun where `ranks` is above 1) that writes into DIR and
leaves DIR/stages/<stage>.json with a hash of what it was made from: a finished stage is not done again, a killed one is
continued by the same command, and a changed setting redoes exactly what depends on it. A run with a `checkpoint` is not
trained. Several seeds are several studies, DIR/seed0 ..., under one plan and one report.
"""
