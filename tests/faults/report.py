"""Print the table of docs/reliability.md from the log of the matrix: ``python tests/faults/report.py FILE ...``."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def table(records: list[dict]) -> str:
    """Return a Markdown table: a line for each fault and MPI, in the order of their first records."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        rows.setdefault((record["fault"], record["mpi"]), []).append(record)
    lines = ["| fault | MPI | runs | every run ended with | recovery: median, maximum |", "|---|---|---|---|---|"]
    for (fault, mpi), runs in rows.items():
        ends = list(dict.fromkeys(run["ended"] for run in runs if run["ok"]))
        failed = [run for run in runs if not run["ok"]]
        if failed:
            ends.append(f"**{len(failed)} failed**: {failed[0]['ended'].splitlines()[0]}")
        seconds = [second for run in runs for second in run.get("recovery_seconds", [])]
        spent = f"{statistics.median(seconds):.3f} s, {max(seconds):.3f} s" if seconds else "–"
        lines.append(f"| {fault} | {mpi} | {len(runs)} | {'; or '.join(ends)} | {spent} |")
    return "\n".join(lines)


if __name__ == "__main__":
    texts = [Path(name).read_text() for name in sys.argv[1:]]
    sys.stdout.write(table([json.loads(line) for text in texts for line in text.splitlines()]) + "\n")
