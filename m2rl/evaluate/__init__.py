"""Models on benchmarks: the evaluator that commands share, and `torchrun -m m2rl.evaluate`.

    with Evaluator("folder") as evaluator:              # one engine and one verifier pool per architecture
        evaluator.score("folder", ["math", "if"], k=8)  # of a folder, a state dict or a live Policy: {name: Score}

What Avg@K and its interval are: scores.py. Problems and their settings: benchmarks.py. Samples on disk: sample_log.py.
Tables: published.py.
"""

from m2rl.evaluate.evaluator import Evaluator, Weights, architecture_key, evaluate_model, evaluation_config

__all__ = ["Evaluator", "Weights", "architecture_key", "evaluate_model", "evaluation_config"]
