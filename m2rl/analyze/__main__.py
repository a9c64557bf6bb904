"""`python -m m2rl.analyze weights|policies|skills|verification|information|efficiency ... --out DIR`.

Each analysis writes DIR/<name>.json (definitions, source, inputs, results, figures as data), one CSV per table and one
SVG per figure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from m2rl.command import exit_with

ANALYSES = {
    "weights": "what training changed: footprints, overlap, cosines, signs, ranks of weight deltas",
    "policies": "KL between all policies on each domain, neighbourhoods, what explains accuracy",
    "skills": "which problems are solved, inherited, lost and novel; flips; significance",
    "verification": "how well models tell right from wrong responses, their own and others'",
    "information": "nats moved from the base against accuracy gained",
    "efficiency": "hours, energy, tokens and steps of every stage",
}
LIGHT = ("skills", "efficiency")  # these read records and compute nothing that threads would speed up


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m m2rl.analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    chosen = next((a for a in argv if a in ANALYSES), None)
    for name, text in ANALYSES.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # the others stay unimported: some take seconds to load
            importlib.import_module(f"m2rl.analyze.{name}").add_arguments(command)
        command.add_argument("--out", required=True, help="folder to write to")
        if name not in LIGHT:
            command.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    args = parser.parse_args(argv)
    module = importlib.import_module(f"m2rl.analyze.{args.analysis}")
    if args.analysis not in LIGHT:
        import torch

        torch.set_num_threads(args.threads)
    analysis = module.run(args)
    path = analysis.write(args.out)
    print(f"{path}: {', '.join(analysis.definitions)}")
    print(f"{len(analysis.tables)} table(s), {len(analysis.figures)} figure(s) beside it")
    return 0


if __name__ == "__main__":
    exit_with(main)
