"""Check proofs that were sent, keep them in docs/bench/proofs, and tabulate them in docs/memory.md.

    python scripts/collect_proofs.py [prove.json ...]

A proof is refused if its form is another one, if a verdict is not that of its value and bound, or if a text in it could
be a path. Without arguments the table and the digests are written anew from the proofs that are kept.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zimage_train.io.json_text import parse_json
from zimage_train.measure.proofs import weights
from zimage_train.measure.proofs.proof import Proof

ROOT = Path(__file__).parent.parent
PROOFS, PAGE = ROOT / "docs" / "bench" / "proofs", ROOT / "docs" / "memory.md"
DIGESTS = Path(weights.__file__).with_name("digests.json")
BEGIN, END = "<!-- proofs: scripts/collect_proofs.py writes this -->", "<!-- end of proofs -->"
NONE_YET = "No proof has been sent yet, so **no card is in this table**."
MOST_BYTES = 1_000_000
PATH = re.compile(r"[\\~]|(^|\s)/|[A-Za-z]:/|@|/(home|Users|root|mnt|workspace)\b")
"""A text that could name a folder, a person or a machine. Fractions such as 48/48 may stand in it."""


class ProofError(Exception):
    """A proof cannot be taken; the message says why."""


def read_proof(path: Path) -> Proof:
    """Return a proof that can be kept.

    Raises:
        ProofError: it has another form, contradicts itself, or could be personal.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ProofError(f"has more than {MOST_BYTES:,} bytes")
    try:
        proof = Proof.model_validate(parse_json(path.read_bytes()))
    except ValueError as error:
        raise ProofError(f"is no prove.json ({error})") from error
    if proof.machine.card is None or proof.machine.memory_gb is None:
        raise ProofError("was measured without a GPU")
    for row in proof.claims:
        if row.verdict == "not tried" and (row.value is not None or row.bound is not None):
            raise ProofError(f"was not tried and has numbers: {row.promise}")
        verdict = row.claim.verdict(proof.model.is_miniature)
        if verdict != row.verdict:
            raise ProofError(f"says {row.verdict!r} where the numbers say {verdict!r}: {row.promise}")
    try:
        _row(proof), digests({name_of(proof): proof})
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ProofError(f"lacks facts or versions, or has others ({type(error).__name__}: {error})") from error
    found = [text for text in _texts(proof.as_json()) if PATH.search(text)]
    if found:
        raise ProofError(f"holds a text that could be a path or a name: {found[0]!r}")
    return proof


def _texts(value: Any) -> Iterable[str]:
    """Yield each text in a JSON value, the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, content in value.items():
            yield str(name)
            yield from _texts(content)
    elif isinstance(value, list):
        for content in value:
            yield from _texts(content)


def name_of(proof: Proof) -> str:
    """Return the name of the file that a proof is kept in: the newest of a card, a version and a form."""
    form = "quick" if proof.quick else "whole"
    words = f"{proof.machine.card} {proof.versions['zimage-train']} {proof.model.variant} {form}"
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-") + ".json"


def table(proofs: list[Proof]) -> str:
    """Return a row for each proof: seconds a step, and how far predictions were off."""
    if not proofs:
        return NONE_YET
    head = (
        *("card", "512 px", "768 px", "1024 px"),
        *("to the forecast", "to diffusers + peft", "peak to prediction", "hold, fail"),
    )
    rows = [head, ("---",) * len(head)]
    for proof in sorted(proofs, key=name_of):
        rows.append(_row(proof))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(proof: Proof) -> tuple[str, ...]:
    facts = [claim.facts for claim in proof.claims]
    seconds = {fact["side"]: fact["seconds"] for fact in facts if "seconds" in fact}
    forecast = [fact["seconds"] / fact["predicted_seconds"] for fact in facts if "predicted_seconds" in fact]
    reference = [fact["to_reference"] for fact in facts if "to_reference" in fact]
    peaks = [fact["allocated_gb"] / fact["predicted_gb"] for fact in facts if "allocated_gb" in fact]
    return (
        f"{proof.machine.card}, {proof.machine.memory_gb:.0f} GB ({proof.versions['zimage-train']})",
        *(f"{seconds[side]:.2f} s" if side in seconds else "" for side in (512, 768, 1024)),
        _range(forecast),
        _range(reference),
        _range(peaks),
        f"{proof.verdicts.count('holds')}, {proof.verdicts.count('fails')}",
    )


def _range(ratios: list[float]) -> str:
    if not ratios:
        return ""
    least, most = min(ratios), max(ratios)
    return f"{least:.2f}" if f"{least:.2f}" == f"{most:.2f}" else f"{least:.2f} to {most:.2f}"


def digests(proofs: dict[str, Proof]) -> dict[str, str]:
    """Return the digests of published files in `proofs`, each with the file, and the proof that reported it first."""
    found: dict[str, str] = {}
    for name, proof in sorted(proofs.items()):
        for claim in proof.claims:
            if claim.facts.get("is_published"):
                text = f"{claim.facts['file']} of {proof.model.variant}, as docs/bench/proofs/{name} has it"
                found.setdefault(claim.facts["sha256"], text)
    return found


def written_page(text: str, content: str) -> str:
    """Return the page with `content` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Keep the proofs, and write the table and the digests; return 1 if one was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("proofs", nargs="*", type=Path, metavar="prove.json")
    refused = 0
    for path in parser.parse_args(arguments).proofs:
        try:
            proof = read_proof(path)
        except (ProofError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            refused += 1
            continue
        PROOFS.mkdir(parents=True, exist_ok=True)
        (PROOFS / name_of(proof)).write_text(json.dumps(proof.as_json(), indent=1) + "\n", encoding="utf-8")
        print(f"{path}: kept as {name_of(proof)}")
    kept = {path.name: read_proof(path) for path in sorted(PROOFS.glob("*.json"))}
    PAGE.write_text(written_page(PAGE.read_text(encoding="utf-8"), table(list(kept.values()))), encoding="utf-8")
    DIGESTS.write_text(json.dumps(digests(kept), indent=1) + "\n", encoding="utf-8")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
