"""Measure the effect of single settings on the miniature, for docs/recipes.md.

    PYTHONPATH=. python scripts/advice.py --work FOLDER [--workers 2]

Trains three seeds of each row of `laboratory.advice` and scores them; takes about two hours on two cores. The work
folder keeps runs and scores, so the same command continues after an interruption. Writes docs/bench/advice.json, and
the table of docs/recipes.md once all is there.
"""

import argparse
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from laboratory.advice import ADVICE, RECIPE, SEEDS, evaluate, file_of, lines, run_of, table_of
from laboratory.running import train
from laboratory.schemes import write_images

ROOT = Path(__file__).parent.parent
FILE, PAGE = ROOT / "docs" / "bench" / "advice.json", ROOT / "docs" / "recipes.md"
TABLE = re.compile(r"(?<=<!-- advice -->\n\n).*?(?=\n\n<!-- end of advice -->)", re.DOTALL)


def main() -> None:
    """Train and score the missing runs, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps runs and scores")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at once, with one thread each")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    images, runs = write_images(options.work / "pictures"), options.work / "runs"
    file = options.work / "scores.json"
    scores: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {"turbo": evaluate(None)}
    asked = [(name, seed) for seed, name in itertools.product(SEEDS, ADVICE)]
    wanted = [(name, seed) for name, seed in asked if f"{name}, {seed}" not in scores]

    def trained(job: tuple[str, int]) -> tuple[tuple[str, int], dict[str, Any]]:
        values = run_of(*job, images, runs)
        train(values)
        return job, values

    with ThreadPoolExecutor(options.workers) as pool:
        for (name, seed), values in pool.map(trained, wanted):
            scores[f"{name}, {seed}"] = evaluate(file_of(name, values))
            file.write_text(json.dumps(scores, indent=1))
            print(f"{name}, {seed}: {scores[f'{name}, {seed}']}", flush=True)
    table = table_of(scores)
    recipe = {"steps": RECIPE.steps, "batch": RECIPE.batch, "rate": RECIPE.rate, "seeds": len(SEEDS)}
    FILE.write_text(json.dumps({"recipe": recipe, "scores": scores, "table": table}, indent=1) + "\n")
    PAGE.write_text(TABLE.sub(lambda _: "\n".join(lines(table)), PAGE.read_text()))


if __name__ == "__main__":
    main()
