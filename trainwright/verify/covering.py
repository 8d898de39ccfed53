"""Few rows in which every pair of levels of two factors occurs: a covering array, made one row at a time.

Each row begins with an uncovered pair and takes for one factor after the other the level that covers most that is new (AETG:
Cohen, Dalal, Fredman and Patton 1997, "The AETG system: an approach to testing based on combinatorial design"), where AETG
draws candidates at random, and here every choice is a function of the factors alone. Sets of levels that can't be together are
kept out by looking ahead: a row is begun only if it can be finished.

Packages that do this (allpairspy, covertable) want all that is forbidden at the start; here it is found on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

Level = tuple[str, str]  # a factor, and one of its levels
Levels = frozenset[Level]
Factors = Mapping[str, Sequence[str]]
CANDIDATES = 24  # rows that are tried for each one that is taken


def pairs(factors: Factors) -> list[Levels]:
    """Every pair of levels of two different factors, in the order of the factors."""
    return [
        frozenset({(one, mine), (other, theirs)})
        for one, other in combinations(factors, 2)
        for mine in factors[one]
        for theirs in factors[other]
    ]


def within(row: Mapping[str, str]) -> set[Levels]:
    """The pairs of a row."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def finished(factors: Factors, row: Mapping[str, str], forbidden: Collection[Levels]) -> dict[str, str] | None:
    """A whole row with these levels that holds nothing forbidden; None where there is none."""
    missing = [factor for factor in factors if factor not in row]
    return None if _conflicts(row.items(), forbidden) else _finished(factors, dict(row), missing, forbidden)


def _finished(
    factors: Factors, row: dict[str, str], missing: list[str], forbidden: Collection[Levels]
) -> dict[str, str] | None:
    if not missing:
        return row
    factor, *others = missing
    for level in factors[factor]:
        further = {**row, factor: level}
        mine = [levels for levels in forbidden if (factor, level) in levels]
        if not _conflicts(further.items(), mine) and (found := _finished(factors, further, others, forbidden)):
            return found
    return None


def _conflicts(levels: Collection[Level], forbidden: Collection[Levels]) -> bool:
    present = set(levels)
    return any(one <= present for one in forbidden)


def next_row(factors: Factors, uncovered: Collection[Levels], forbidden: Collection[Levels]) -> dict[str, str] | None:
    """A row that covers many of the uncovered pairs; None where all that are left can be in no row.

    Args:
        uncovered: in an order that doesn't change from run to run.
        forbidden: levels that can't be together: of a single one, pairs, or more.
    """
    wanted, found = set(uncovered), []
    for begun in _begun(factors, uncovered, forbidden):
        found.append(_filled(factors, begun, wanted, forbidden))
        if len(found) == CANDIDATES:
            break
    return max(found, key=lambda row: len(within(row) & wanted), default=None)


def _begun(factors: Factors, uncovered: Collection[Levels], forbidden: Collection[Levels]) -> Iterator[dict[str, str]]:
    for pair in uncovered:
        row = {factor: dict(pair)[factor] for factor in factors if factor in dict(pair)}
        if finished(factors, row, forbidden) is not None:
            yield row


def _filled(factors: Factors, row: dict[str, str], wanted: set[Levels], forbidden: Collection[Levels]) -> dict[str, str]:
    """The level that makes most wanted pairs comes first, of any factor; then the one that still can make most."""
    while missing := [factor for factor in factors if factor not in row]:
        now, later = _gains(row, wanted)
        options = [(factor, level) for factor in missing for level in factors[factor]]
        options.sort(key=lambda option: (now[option], later[option]), reverse=True)
        further = ({**row, factor: level} for factor, level in options)
        row = next(one for one in further if finished(factors, one, forbidden) is not None)
    return {factor: row[factor] for factor in factors}


def _gains(row: Mapping[str, str], wanted: set[Levels]) -> tuple[Counter[Level], Counter[Level]]:
    """For each level how many wanted pairs it makes with the row, and how many with levels of factors that are missing."""
    now, later = Counter[Level](), Counter[Level]()
    for one, other in wanted:
        for mine, theirs in ((one, other), (other, one)):
            if theirs[0] not in row:
                later[mine] += 1
            elif row[theirs[0]] == theirs[1]:
                now[mine] += 1
    return now, later


def cover(factors: Factors, forbidden: Collection[Levels] = ()) -> list[dict[str, str]]:
    """Rows in which every pair occurs that can."""
    rows: list[dict[str, str]] = []
    uncovered = pairs(factors)
    while (row := next_row(factors, uncovered, forbidden)) is not None:
        rows.append(row)
        here = within(row)
        uncovered = [pair for pair in uncovered if pair not in here]
    return rows
