"""The laboratory: train a new concept under every scheme on the miniature family, and score the LoRAs.

    PYTHONPATH=. python scripts/lab.py --work FOLDER [--quick] [-o docs]

Writes lab.json, lab.md and grids into the output folder, and the LoRAs into `loras/` in the work folder. The work
folder keeps every run and every score, so the same command continues after an interruption. `--quick` trains one seed,
scores fewer images, writes into the work folder only, and prints whether the schemes are in the order of docs/lab.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from laboratory import drawing, metering, telling
from laboratory.running import in_parallel, lora_of, train
from laboratory.schemes import DIRECT, QUICK, TRAINED, Recipe, config, imitation, write_images
from laboratory.scoring import USES, Use, evaluate
from laboratory.statistics import orders

SEEDS, IMAGE_SEEDS = (101, 102, 103), (11, 12, 13, 14, 15)
QUICK_SEEDS, QUICK_IMAGE_SEEDS = (104,), (16, 17)

Loras = Mapping[str, Mapping[int, Path]]
"""Scheme -> training seed -> LoRA file."""


def main() -> None:
    """Train and score what an earlier start has not, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="keeps runs and scores")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="where lab.json and lab.md go")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--quick", action="store_true", help="train a single seed, and compare with lab.json of the output folder"
    )
    what.add_argument("--loras", type=Path, help="score these LoRAs (loras/ of an earlier work folder); no training")
    parser.add_argument("--image-seeds", type=int, default=5, help="number of image seeds, of five")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at once, with one thread each")
    options = parser.parse_args()
    seeds, shots = (QUICK_SEEDS, QUICK_IMAGE_SEEDS) if options.quick else (SEEDS, IMAGE_SEEDS)
    shots = shots[: options.image_seeds]
    recipe = QUICK if options.quick else Recipe()
    options.work.mkdir(parents=True, exist_ok=True)
    loras = given(options.loras) if options.loras else trained(options.work, seeds, recipe, options.workers)
    scores = scored(options.work / "scores.json", loras, seeds, shots, options.workers)
    table = telling.table(scores)
    if options.quick:
        compare(table, json.loads((options.output / "lab.json").read_text()))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    shipped = loras if options.loras else ship(loras, options.work / "loras")
    meter = telling.meter_against(scores, metering.meter(loras, seeds))
    telling.write(options.output, table, scores, recipe, shipped, meter)
    drawing.save(options.output / "images" / "lab.png", options.work / "shown", loras)
    for said, claim in telling.claims(table).items():
        print(f"{said}: {claim['found']:.2f}, {'holds' if claim['holds'] else 'does not hold'}")


def trained(work: Path, seeds: tuple[int, ...], recipe: Recipe, workers: int) -> Loras:
    """Train what is missing, and return the LoRA of every scheme and seed."""
    images, runs = write_images(work / "pictures"), work / "runs"
    found: dict[str, dict[int, Path]] = {}
    chains: list[list[dict[str, Any]]] = []
    for scheme in TRAINED:
        for seed in seeds:
            first = config(scheme, seed, recipe, images, runs)
            chain = {scheme.name: first}
            if scheme is DIRECT:
                chain["imitation"] = imitation(lora_of(first), seed, recipe, images, runs)
            chains.append(list(chain.values()))
            for name, run in chain.items():
                found.setdefault(name, {})[seed] = lora_of(run)
    in_parallel([partial(train_all, chain) for chain in chains], workers)
    return found


def train_all(chain: list[dict[str, Any]]) -> None:
    """Train the runs in order, since each may start from the LoRA of the run before."""
    for run in chain:
        train(run)


def given(folder: Path) -> Loras:
    """Return the LoRAs that `ship` has copied into a folder."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*-s*.safetensors")):
        name, _, seed = path.stem.rpartition("-s")
        found.setdefault(name, {})[int(seed)] = path
    return found


def scored(
    file: Path, loras: Loras, seeds: tuple[int, ...], shots: tuple[int, ...], workers: int
) -> dict[str, dict[str, Any]]:
    """Return the scores by "use, training seed, image seed"; each new score is written to `file` at once."""
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    asked = [(use, seed, shot) for shot in shots for use in USES for seed in (seeds if use.trained else (0,))]
    wanted = [job for job in asked if key_of(*job) not in found]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(evaluate, use, loras[use.trained][seed] if use.trained else None, shot): (use, seed, shot)
            for use, seed, shot in wanted
        }
        for number, job in enumerate(as_completed(jobs), 1):
            use, seed, shot = jobs[job]
            found[key_of(*jobs[job])] = {"use": use.name, "seed": seed, "shot": shot, **job.result()}
            file.write_text(json.dumps(found, indent=1))
            print(f"scored {number}/{len(wanted)}: {key_of(*jobs[job])}", flush=True)
    return {key_of(*job): found[key_of(*job)] for job in asked}


def key_of(use: Use, seed: int, shot: int) -> str:
    """Return the key of a score."""
    return f"{use.name}, {seed}, {shot}"


def ship(loras: Loras, folder: Path) -> dict[str, dict[int, Path]]:
    """Copy the LoRAs into a folder, so that they can be scored again, and return the copies."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: {seed: Path(shutil.copyfile(path, folder / f"{name}-s{seed}.safetensors")) for seed, path in each.items()}
        for name, each in loras.items()
    }


def compare(table: dict[str, Any], full: dict[str, Any]) -> None:
    """Print the pairs of schemes that are in another order than in the full table, of those whose intervals differ.

    Raises:
        SystemExit: always; the exit code is 1 if there is such a pair.
    """
    wrong, pairs = 0, 0
    for score in telling.SCORES:
        whole = {name: row[score] for name, row in full["schemes"].items()}
        for low, high in orders(whole):
            pairs += 1
            if table[low][score][0] >= table[high][score][0]:
                wrong += 1
                print(
                    f"{score}: {low} {table[low][score][0]:.3f}, {high} {table[high][score][0]:.3f}; there the reverse"
                )
    print(f"{pairs - wrong} of {pairs} pairs are in the same order")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
