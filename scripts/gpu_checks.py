"""Run the checks that need a GPU: everything that the docs claim or the planner assumes about GPUs.

    OUT=FOLDER python scripts/gpu_checks.py [PART ...] [--dry]
    python scripts/gpu_checks.py --list

All parts take about half an hour. Each runs in its own process with a time limit, and writes FOLDER/PART.json after
every case, so the same command continues after an interruption, and repeats failed cases. `--dry` runs every part on a
CPU in a tiny shape, with results in FOLDER/dry, to find errors before a GPU is rented.

Where the package is not installed, set PYTHONPATH=. as for the other scripts.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from gpu_parts import runner
from gpu_parts.identity import identity
from gpu_parts.parts import PARTS, Part
from gpu_parts.records import Records, Stamp
from gpu_parts.runner import Watch

FOLDER = Path(__file__).parent.parent / "docs" / "bench" / "gpu"
FAILED, NO_GPU = 1, 2


def parser(parts: Mapping[str, Part]) -> argparse.ArgumentParser:
    """Return the parser of the command line; options between the processes are hidden."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument(
        "parts", nargs="*", metavar="PART", help=f"some of {', '.join(parts)}; default: all, in this order"
    )
    folder = Path(os.environ.get("OUT") or FOLDER)
    found.add_argument("--out", type=Path, default=folder, help="default: $OUT, or docs/bench/gpu")
    found.add_argument("--dry", action="store_true", help="run on the CPU, in a tiny shape, into the folder `dry`")
    found.add_argument("--list", action="store_true", help="print what each part shows, and its time limit")
    found.add_argument("--identify", action="store_true", help=argparse.SUPPRESS)
    found.add_argument("--measure", choices=list(parts), help=argparse.SUPPRESS)
    found.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    found.add_argument("--stamp", type=json.loads, help=argparse.SUPPRESS)
    return found


def main(arguments: list[str], parts: Mapping[str, Part] = PARTS, script: Path = Path(__file__)) -> int:
    """Run the parts; return 0 if every case has a result, 1 if some have none, and 2 without a GPU.

    Args:
        script: the file that processes of parts are started with, which has to know `parts`.
    """
    command = parser(parts)
    asked = command.parse_args(arguments)
    unknown = [name for name in asked.parts if name not in parts]
    if unknown:
        command.error(f"no part is called {unknown[0]}; there are {', '.join(parts)}")
    if asked.list:
        print_parts(parts)
        return 0
    if asked.identify:
        print(json.dumps(identity()))
        return 0
    if asked.measure is not None:
        records = Records(asked.out / f"{asked.measure}.json")
        return runner.measure(asked.measure, parts[asked.measure], asked.cases, records, Stamp(**asked.stamp))
    stamp = runner.ask_stamp(script, asked.dry)
    if stamp is None:
        print("no GPU was found by torch; --dry runs every part on the CPU", file=sys.stderr)
        return NO_GPU
    watch = Watch(script, asked.out / "dry" if asked.dry else asked.out, stamp)
    answered = [watch.run(name, parts[name]) for name in asked.parts or parts]
    return 0 if all(answered) else FAILED


def print_parts(parts: Mapping[str, Part]) -> None:
    """Print a line for each part: its time limit, its number of cases and what it shows."""
    for name, part in parts.items():
        print(f"{name:10} {part.limit_s:4.0f} s  {len(part.cases):3} cases  {part.shows}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
