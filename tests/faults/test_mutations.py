"""Proves that the mutation check still finds the guards that it disables, and tests that exist."""

from __future__ import annotations

import pytest

from tests.faults.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=list(MUTATIONS))
def test_the_pattern_of_a_guard_occurs_exactly_once(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text("utf-8")
    assert text.count(mutation.pattern) == 1, f"{mutation.file}: update the pattern in tests/faults/mutations.py"
    changed = text.replace(mutation.pattern, mutation.replacement)
    assert changed != text
    compile(changed, mutation.file, "exec")
    assert (ROOT / mutation.tests[0]).is_file()
