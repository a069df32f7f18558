"""Files whose names are written in another way: separators, letters, case, folders, suffixes.

A name in a list or a COCO file may come from another system, such as `Set1\\A%20b.JPEG` for `set1/a b.jpg`. Both sides
are reduced to the same spelling and compared from the end. A name is accepted if exactly one file fits best.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from html import unescape
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from crossmae.data.paths import COMPANIONS, IMAGE_SUFFIXES, SPLIT_WORDS, walk_files
from crossmae.errors import printable, shorten

SAME_FORMAT = {".jpe": ".jpg", ".jpeg": ".jpg", ".jfif": ".jpg", ".tiff": ".tif", ".j2k": ".jp2"}
NUMBERS_AND_SPLITS = re.compile(rf"\d+|{SPLIT_WORDS}")
OPPOSITES = [
    *("left right", "before after", "front back", "top bottom", "upper lower", "inner outer", "input output target"),
    *("source target", "clean noisy", "sharp blurred blur", "real fake", "good bad", "positive negative", "hr lr"),
    *("high low", "day night", "rgb ir thermal infrared nir", "visible infrared", "query gallery"),
    *("original augmented", "dirty clean", "hazy clear", "l r"),
]
WORD = re.compile(r"[^\W_]+")
OTHER_FOLDERS = "other folders, the same base name"
NOTHING_LIKE = "no file has a name like it"
QUERY = re.compile(rf"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})\?.*", re.IGNORECASE)  # of a signed URL
# Signs of the direction of writing, as in a path that was copied in Windows, and others without a width.
INVISIBLE = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
MOST_CANDIDATES = 3  # number of candidates in a reason
MOST_COMPARED = 20  # number of candidates whose spelling is compared


def _unquote(text: str) -> str:
    while "%" in text and (plain := unquote(text)) != text:  # some programs quote twice
        text = plain
    text = unescape(text).replace("?d=", "/")  # Label Studio's local files are `/data/local-files/?d=FOLDER/NAME`
    return QUERY.sub(r"\1", text) if "?" in text else text


def _bare(text: str) -> str:
    text = text.strip(" \t\r\n\"'" + INVISIBLE)
    return re.sub(r"\s*/\s*", "/", text) if " " in text else text


def _letters(text: str) -> str:
    return text if text.isascii() else normalize("NFKC", text)


def _without_suffix(text: str) -> str:
    stem, suffix = os.path.splitext(text)
    return stem if suffix in IMAGE_SUFFIXES or suffix in SAME_FORMAT else text


# Ways to write the same name differently. Earlier entries are more certain.
_SPELLINGS: dict[str, Callable[[str], str]] = {
    "quoted as in a URL": _unquote,
    "separators of Windows": lambda text: text.replace("\\", "/"),
    "composed or decomposed letters": _letters,
    "spaces or quotes at the ends": _bare,
    "upper and lower case": str.casefold,
    "another suffix": _without_suffix,
}
_TITLES = list(_SPELLINGS)
_LEAST_CERTAIN = _TITLES.index("upper and lower case")  # another suffix is as likely


def _reduce(text: str, left_out: str = "") -> list[str]:
    """Split a path into its parts, in a common spelling."""
    for title, spell in _SPELLINGS.items():
        if title != left_out:
            text = spell(text)
    return [part for part in text.split("/") if part not in ("", ".", "..")]


class _Fit(NamedTuple):
    """A file that may be meant: its path in the folder, and how many parts of both paths are equal, from the end."""

    path: str
    shared: int


def find_moved(
    folder: Path, missing: Sequence[str], present: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Find files for names that do not exist as written.

    The folder is searched once, and only if a name is missing.

    Args:
        folder: base folder of the names. Only files in it are accepted.
        missing: names as written, relative or absolute.
        present: names that exist as written. No other name is given their files.

    Returns:
        The accepted names with their paths relative to `folder`, and all other names with a reason.
    """
    if not missing:
        return {}, {}
    names = list(dict.fromkeys(missing))
    files = _Files(folder, {(_reduce(name) or [""])[-1] for name in names})
    fits: dict[str, _Fit] = {}
    reasons: dict[str, str] = {}
    for name in names:
        found = files.best(name)
        if isinstance(found, str):
            reasons[name] = found
        else:
            fits[name] = found
    taken = {os.path.normpath(os.path.join(files.top, name)) for name in present} if fits else set()
    written: dict[str, list[str]] = defaultdict(list)
    for name, fit in fits.items():
        written[fit.path].append(name)
    for path, claims in written.items():
        others = len({os.path.normpath(name.replace("\\", "/")) for name in claims}) > 1
        if os.path.join(files.top, path) in taken or others:
            for name in claims:
                other = next((claim for claim in claims if claim != name), path)
                reasons[name] = f"the only file like it, {printable(path)}, also fits the entry {printable(other)}"
    accepted = {name: fit.path for name, fit in fits.items() if name not in reasons}
    return accepted, {name: reasons[name] for name in names if name in reasons}


class _Files:
    """Files of a folder by the ends of their reduced paths, as far as their base names are wanted."""

    def __init__(self, folder: Path, wanted: Collection[str]) -> None:
        self.top = os.path.abspath(folder)
        self.own = _reduce(os.path.basename(self.top))
        self.folders: set[str] = set()
        self.by_end: dict[str, list[str]] = defaultdict(list)
        start = len(os.path.join(self.top, ""))
        for path in sorted(file[start:] for file in walk_files(self.top, []) if os.path.isfile(file)):
            parts = _reduce(path)
            self.folders.update(parts[:-1])
            if parts and parts[-1] in wanted:
                for shared in range(len(parts) + len(self.own)):
                    self.by_end["/".join([*self.own, *parts][shared:])].append(path)

    def best(self, name: str) -> _Fit | str:
        """Find the only file that fits best, or say why not."""
        if os.path.islink(os.path.join(self.top, name)):
            return f"is a link to {printable(os.readlink(os.path.join(self.top, name)))}, which is not there"
        inside = name.removeprefix(self.top + os.sep)
        own = _reduce(inside)
        parts = own if os.path.isabs(inside) or inside[:3] in ("../", "..\\") else [*self.own, *own]
        suffix = _canonical_suffix(_bare(_unquote(name)))
        others: list[str] = []
        for start in range(len(parts)):
            fitting = self.by_end.get("/".join(parts[start:]), [])
            found = [path for path in fitting if not suffix or _canonical_suffix(path) == suffix]
            if found:
                return self._only(name, found, len(parts) - start, own)
            others += fitting[: 1 - len(others)]
        if others:
            return f"only {printable(others[0])} is there, of another format"
        return NOTHING_LIKE

    def _only(self, name: str, found: list[str], shared: int, own: list[str]) -> _Fit | str:
        found = [path for path in found if _reduce(path) == own] or found
        if len(found) > 1:  # `A.png` and `a.png`, or the same base name in several folders
            ranks = {path: _rank(name, path, shared) for path in found[:MOST_COMPARED]}
            found = [path for path in found if ranks.get(path) == min(ranks.values())]
        if len(found) > 1:
            return f"{len(found)} files fit: {shorten([printable(path) for path in found], MOST_CANDIDATES)}"
        there, mine = [*self.own, *_reduce(found[0])], own[: max(len(own) - shared, 0)]
        other = there[: len(there) - shared]
        inside = set(_reduce(found[0])[:-shared]) - set(mine)
        is_sibling = bool(mine and other) and _siblings(mine[-1], other[-1])
        if mine and (mine[-1] in self.folders or is_sibling or inside & COMPANIONS):
            return f"only {printable(found[0])} has its name, in another folder"
        return _Fit(found[0], shared)


def _canonical_suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1].strip().lower()
    return SAME_FORMAT.get(suffix, suffix if suffix in IMAGE_SUFFIXES else "")


def _siblings(one: str, other: str) -> bool:
    """Check for names such as `train` and `val`, or `left` and `right`."""
    if one == other or NUMBERS_AND_SPLITS.sub("#", one) == NUMBERS_AND_SPLITS.sub("#", other):
        return one != other
    words, others = WORD.findall(one), WORD.findall(other)
    differing = [{a, b} for a, b in zip(words, others, strict=False) if a != b]
    return len(words) == len(others) and len(differing) == 1 and any(differing[0] <= set(o.split()) for o in OPPOSITES)


def _rank(name: str, path: str, shared: int) -> int:
    """Rank a path by the least certain spelling that it needs."""
    positions = [_TITLES.index(title) for title in _needed(name, path, shared)]
    return min(max(positions, default=-1), _LEAST_CERTAIN)


def _needed(name: str, path: str, shared: int) -> list[str]:
    """List the spellings without which the last `shared` parts differ."""
    causes = []
    mine, theirs = name, path
    for title, spell in _SPELLINGS.items():
        before, (mine, theirs) = (mine, theirs), (spell(mine), spell(theirs))
        if before != (mine, theirs):
            a, b = _reduce(name, title)[-shared:], _reduce(path, title)[-shared:]
            causes += [title] if a[-len(b) :] != b[-len(a) :] else []
    return causes


def explain(folder: Path, name: str, path: str) -> str:
    """Explain how a name differs from its accepted path."""
    top = os.path.abspath(folder)
    mine, theirs, own = _reduce(name), _reduce(path), _reduce(os.path.basename(top))
    pairs = zip(reversed(mine), reversed(theirs), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    causes = _needed(name, path, shared)
    if os.path.isabs(name) or re.match(r"\W*(\w+:[\\/]|\\\\)", name):
        causes[:0] = ["absolute paths", OTHER_FOLDERS] if len(theirs) > shared else ["absolute paths"]
    elif mine == [*own, *theirs]:
        causes.insert(0, f"the folder {printable(os.path.basename(top))} is named again")
    elif len(mine) > shared:
        causes.insert(0, OTHER_FOLDERS if len(theirs) > shared else "folders that are not there")
    elif len(theirs) > shared:
        causes.insert(0, "in a subfolder")
    return " and ".join(causes) or "written differently"


def describe_moved(folder: Path, accepted: Mapping[str, str], total: int) -> str:
    """Describe accepted names in one line, with counts and causes.

    The least certain cause, `OTHER_FOLDERS`, is the first.

    Args:
        total: number of missing names.
    """
    first: dict[str, str] = {}
    counts = Counter[str]()
    for name, path in accepted.items():
        cause = explain(folder, name, path)
        first.setdefault(cause, path)
        counts[cause] += 1
    shown = [
        f"{count:,} of {total:,} are there as {printable(first[cause])}: {cause}"
        for cause, count in sorted(counts.most_common(), key=lambda item: OTHER_FOLDERS not in item[0])
    ]
    return shorten(shown, separator="; ")
