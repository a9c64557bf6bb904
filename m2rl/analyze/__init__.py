"""The analyses: pure functions on arrays and samples, each with a command that writes JSON, CSV and figures.

weights.measure -> weights.analyze           policies.kl_matrix -> policies.analyze -> information.analyze
skills.analyze    verification.verify -> verification.analyze    efficiency.read_run -> efficiency.analyze
"""
