"""A stand-in for `zimage-train --json caption`: the same events and files, without a model.

Run as `fake_captioner.py FOLDER --model M --style S [--kind K] [--trigger T] [--force]`. The model `slow` takes a
second for each image, and `missing` fails as a model does that cannot be had.
"""

import argparse
import sys
import time
from pathlib import Path

from zimage_train.dataset.images import EXTENSIONS
from zimage_train.errors import Problem
from zimage_train.report.printing import as_event, error_event


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for option in ("--model", "--style", "--kind", "--trigger"):
        parser.add_argument(option)
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    images = sorted(path for path in options.folder.rglob("*") if path.suffix in EXTENSIONS)
    print(as_event("progress", what="checking images", done=len(images), total=len(images), note=""), flush=True)
    if options.model == "missing":
        print(
            error_event(Problem("--model: missing", "is no model", "give another", "missing-model"), 4), file=sys.stderr
        )
        return 4
    pairs = [path for path in images if options.force or not path.with_suffix(".txt").exists()]
    print(as_event("line", text=f"loading {options.model}, 1 GB, on cpu"), flush=True)
    for number, path in enumerate(pairs, 1):
        if options.model == "slow":
            time.sleep(1)
        caption = f"{options.trigger or 'something'} seen by {options.model} in {options.style}"
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        print(as_event("line", text=f"{path.name}: {caption}"), flush=True)
        print(as_event("progress", what="captions", done=number, total=len(pairs), note=path.name), flush=True)
    print(as_event("result", text=f"{len(pairs)} captions written to {options.folder}"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
