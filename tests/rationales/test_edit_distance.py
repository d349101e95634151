"""Edit distance and key steps, against a plain recursion."""

from __future__ import annotations

import random

from distill_trainers.answers.edit_distance import edit_distance
from distill_trainers.rationales import edits, key_tokens


def plain(a, b):
    """Levenshtein's recursion, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def pairs(count=400, longest=25, alphabet=4):
    generator = random.Random(1)
    for _ in range(count):
        yield tuple([generator.randrange(alphabet) for _ in range(generator.randrange(longest))] for _ in range(2))


def applied(a, b, found):
    """`a` with the edits made, from their places alone."""
    gone = set(found.deleted)
    new = {j: b[j] for j in found.inserted}
    replaced = {i: b[j] for i, j in found.replaced}
    kept = iter([replaced.get(i, token) for i, token in enumerate(a) if i not in gone])
    return [new[j] if j in new else next(kept) for j in range(len(b))]


def test_distance_and_edits_on_random_sequences():
    for a, b in pairs():
        found = edits(a, b)
        assert found.distance == edit_distance(b, a) == plain(a, b)
        assert len(found.replaced) + len(found.inserted) + len(found.deleted) == found.distance
        assert applied(a, b, found) == b


def test_distance_and_edits_of_long_chains():
    """Beyond the 64 tokens that rapidfuzz holds in one word."""
    for a, b in pairs(60, longest=200, alphabet=6):
        changes = edits(a, b)
        assert changes.distance == edit_distance(a, b) == plain(a, b)
        assert applied(a, b, changes) == b


def test_key_tokens_cover_exactly_the_edits():
    assert key_tokens([1, 2, 3, 4, 5], [1, 9, 3, 5]) == ([0, 1, 0, 1, 0], [0, 1, 0, 0])  # 9 -> 2, 4 inserted
    assert key_tokens([1, 2, 3], [1, 2, 8, 3]) == ([0, 0, 0], [0, 0, 1, 0])  # 8 deleted
    for a, b in pairs(200):
        on_right, on_wrong = key_tokens(a, b)
        found = edits(b, a)
        assert sum(on_right) == len(found.inserted) + len(found.replaced)
        assert sum(on_wrong) == len(found.deleted) + len(found.replaced)


def test_identical_and_empty_chains():
    assert key_tokens([1, 2], [1, 2]) == ([0, 0], [0, 0])
    assert key_tokens([], [7, 8]) == ([], [1, 1])
    assert edit_distance([], []) == 0


def test_long_chains_take_little_time():
    generator = random.Random(2)
    a = [generator.randrange(1000) for _ in range(2000)]
    b = [token if generator.random() < 0.9 else 1001 for token in a]
    assert edit_distance(a, b) == sum(x != y for x, y in zip(a, b, strict=True))
