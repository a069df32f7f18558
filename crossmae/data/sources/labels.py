"""Labels as people write them: spaces, upper and lower case, whole numbers with a point, missing values."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from unicodedata import normalize

from crossmae.errors import counted, shorten

WHOLE_NUMBER = re.compile(r"([+-]?\d+)(\.0*)?")
TEXT_OF_LIST = re.compile(r"""\[\s*(?:'[^']*'|"[^"]*")(?:\s*,?\s*(?:'[^']*'|"[^"]*"))*\s*\]""")  # ['cat', 'dog']
MOST_CASE_SENSITIVE = 2  # letters: `a` and `A`, or `Co` and `CO`, may be two classes


def unify_labels(texts: Sequence[str | None]) -> tuple[list[str | None], list[str]]:
    """Write equal labels in one way.

    Labels that differ in spaces or case only become the most frequent spelling, and `1.0` becomes `1`.

    Returns:
        The labels, None without one, and a sentence for each decision.
    """
    counts = Counter(text for text in texts if text is not None)
    plain = _whole_numbers({text: plain_label(text) for text in counts})
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in plain.items():
        if label:
            spellings[label if len(label) <= MOST_CASE_SENSITIVE else fold_label(label)][label] += counts[text]
    chosen = {
        label: min(group, key=lambda one: (-group[one], one != one.lower(), one))
        for group in spellings.values()
        for label in group
    }
    written: dict[str, list[str]] = defaultdict(list)
    for text, label in plain.items():
        if label:
            written[chosen[label]].append(text)
    joined = [
        f"{' and '.join(f'{text!r} ({counts[text]:,})' for text in sorted(group))} are one class, {label!r}"
        for label, group in written.items()
        if len({text for text in group if not WHOLE_NUMBER.fullmatch(text)}) > 1
    ]
    notes = [shorten(joined, separator=". ")] if joined else []
    return [chosen.get(plain[text] or "") if text is not None else None for text in texts], notes


def plain_label(text: str) -> str:
    """Remove spaces at the ends, double and invisible spaces."""
    return " ".join(re.sub(r"[\s\u200b\ufeff]+", " ", normalize("NFC", text)).split())


def fold_label(text: str) -> str:
    """Remove differences in spaces and case."""
    return plain_label(text).casefold()


def alike_labels(classes: Sequence[str]) -> list[str]:
    """List classes that differ in spaces or case only."""
    counts = Counter(map(fold_label, classes))
    return sorted(name for name in classes if counts[fold_label(name)] > 1)


def doubt_labels(counts: Mapping[str, int]) -> list[str]:
    """List labels that may be no classes, by their numbers of images."""
    notes = []
    numbers = all(WHOLE_NUMBER.fullmatch(label) for label in counts)
    if numbers and {"-1", "0", "1"} <= set(counts) and not any(re.match("-[^1]|-1.", label) for label in counts):
        why = "is a class like the others, but often means unlabelled"
        notes.append(f"the label -1 of {counted(counts['-1'], 'image')} {why}. If so, leave these images out")
    if texts := [repr(label) for label in counts if TEXT_OF_LIST.fullmatch(label)]:
        notes.append(
            f"the labels {shorten(texts)} are the text of a list. Write the label itself, or join several by |"
        )
    return notes


def _whole_numbers(plain: dict[str, str]) -> dict[str, str]:
    """Write `1.0` as `1` if all labels are whole numbers or NaN."""
    numbers = [label for label in plain.values() if label and label.lower() != "nan"]
    if not numbers or not all(label.isascii() and WHOLE_NUMBER.fullmatch(label) for label in numbers):
        return plain
    matches = {text: WHOLE_NUMBER.fullmatch(label) for text, label in plain.items()}
    return {text: match[1] if match else "" for text, match in matches.items()}
