"""Make the runs of the proof table, and write their numbers to docs/bench/proof.json, from which its page is made.

    PYTHONPATH=. python scripts/proof_table.py [KEY ...]

Takes some three minutes. With keys, or beginnings of keys, it makes the runs of these settings alone, and keeps the
rest of the file. Exits with 1 if a setting does not do what its row says.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from proofs.page import FILE, recorded
from proofs.proving import Proof, prove
from proofs.rows import Row
from proofs.table import ROWS
from proofs.trials import Trials


def main(keys: list[str]) -> int:
    """Make the runs of the rows whose settings begin with one of `keys`, or of all, and write the file."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = {row.label: found[row.label] for row in ROWS if row.label in found}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        trials = quietly(lambda: Trials(Path(folder)))
        for number, row in enumerate(ROWS, 1):
            if keys and not row.key.startswith(tuple(keys)):
                continue
            proof = quietly(lambda row=row: prove(row, trials))
            found[row.label] = entry(row, proof)
            failed += bool(proof.failures)
            print("; ".join([f"{number}/{len(ROWS)} {row.label}", *proof.failures]), flush=True)
    in_order = {row.label: found[row.label] for row in ROWS if row.label in found}
    FILE.write_text(json.dumps(in_order, indent=1) + "\n")
    print(f"{failed} settings do not do what their row says" if failed else f"{FILE} is complete")
    return int(failed > 0)


def entry(row: Row, proof: Proof) -> dict[str, Any]:
    """Return the entry of a row in the file."""
    return {"expected": row.expected.text, "without": recorded(proof.without), "with": recorded(proof.with_it)}


def quietly(work: Any) -> Any:
    """Return the result of `work`, and discard its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
