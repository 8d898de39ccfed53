"""``python -m tests.mutants [--json] [NAME...]``: every mutant must be caught; ``--healthy N``: and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import healthy
from tests.mutants.catalogue import MUTANTS
from tests.mutants.trying import Result, Trials


def main() -> int:
    """0 where everything is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of mutants, by default all")
    parser.add_argument("--json", action="store_true", help="print numbers and results as JSON")
    parser.add_argument("--healthy", type=int, metavar="N", help="look for false alarms instead, over N seeds")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Trials(Path(folder)) as trials:
        if wanted.healthy:
            return healthy.report(trials, Path(folder), wanted.healthy, wanted.names, as_json=wanted.json)
        return _mutants(trials, wanted.names, as_json=wanted.json)


def _mutants(trials: Trials, names: list[str], *, as_json: bool) -> int:
    started = time.perf_counter()
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    results = []
    for result in trials.all(chosen):
        results.append(result)
        print(_told(result), file=sys.stderr if as_json else sys.stdout, flush=True)
    caught, named = sum(result.caught for result in results), sum(result.rightly for result in results)
    ill = [result.name for result in results if not result.healthy]
    if as_json:
        numbers = {"mutants": len(results), "caught": caught, "named": named, "false_alarms": ill}
        print(json.dumps({**numbers, "results": [result.plain() for result in results]}, indent=1))
    else:
        seconds = time.perf_counter() - started
        print(f"{len(results)} mutants, {caught} caught, {named} named; {len(ill)} false alarms; {seconds:.0f} s")
    return 0 if caught == len(results) and named >= 0.9 * len(results) and not ill else 1


def _told(result: Result) -> str:
    alarm = "" if result.healthy else "FALSE ALARM without it; "
    if not result.caught:
        return f"NOT CAUGHT  {result.name} ({alarm}{result.seconds} s)"
    names = " x ".join(result.found) or "no technique"
    right = "rightly" if result.rightly else "WRONGLY"
    return f"caught  {result.name}: {alarm}{result.line}: {result.where}; {right} named: {names} ({result.seconds} s)"


if __name__ == "__main__":
    sys.exit(main())
