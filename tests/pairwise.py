"""Few combinations of options in which every two values occur together."""

import itertools
import random


def pairwise(factors: dict[str, list]) -> list[dict]:
    """
    Rows with a value of each factor, so that any two values of two factors are together in a row. Takes the row that
    adds most of these pairs, out of some that are drawn around a missing one. The same at each call.
    """
    draws, names = random.Random(0), [*factors]
    columns = [range(len(values)) for values in factors.values()]

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    missing = set()
    for (i, of_one), (j, of_other) in itertools.combinations(enumerate(columns), 2):
        missing |= {((i, a), (j, b)) for a in of_one for b in of_other}
    rows = []
    while missing:
        (i, a), (j, b) = min(missing)
        drawn = [[draws.choice(column) for column in columns] for _ in range(30)]
        for row in drawn:
            row[i], row[j] = a, b
        rows.append(max(drawn, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return [{name: factors[name][value] for name, value in zip(names, row)} for row in rows]
