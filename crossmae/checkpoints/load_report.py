"""A report of a load: the status of every tensor of the file and the model, also as a table for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from crossmae.checkpoints.formats.facts import Facts
from crossmae.checkpoints.formats.keys import ENCODER_HOMES
from crossmae.errors import shorten

Status = Literal["used", "resampled", "new", "dropped", "mismatched"]
Shape = tuple[int, ...]
_ORDER: tuple[Status, ...] = ("mismatched", "new", "dropped", "resampled", "used")
_INDEXED = re.compile(r"([^.]+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorEntry:
    """The status of one tensor.

    Attributes:
        accepted: false if this entry makes loading fail.
        plain, sources, targets: set by conversions only: the plain name, the names in the source file, and the names in
            the written file.
    """

    name: str
    status: Status
    reason: str = ""
    file_shape: Shape | None = None
    model_shape: Shape | None = None
    accepted: bool = True
    plain: str = ""
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass
class LoadReport:
    """The status of every tensor of the file and of the model.

    | status       | meaning                                                        |
    | ------------ | -------------------------------------------------------------- |
    | `used`       | copied from the file into the model                            |
    | `resampled`  | resampled to the model's size, then copied                     |
    | `new`        | only in the model, keeps its initial value                     |
    | `dropped`    | only in the file                                               |
    | `mismatched` | in both, with different shapes; never accepted                 |
    """

    source: str
    target: str
    entries: list[TensorEntry] = field(default_factory=list)
    licence: str | None = None  # see `provenance.licence_notice`
    assumed: Facts = field(default_factory=dict)  # values of the model that the file does not tell

    @property
    def ok(self) -> bool:
        """True if any tensor is loaded and every entry is accepted."""
        return bool(self.loaded) and all(entry.accepted for entry in self.entries)

    def count(self, status: Status) -> int:
        """Count the tensors with a status."""
        return sum(entry.status == status for entry in self.entries)

    def names(self, status: Status) -> list[str]:
        """List the names of the tensors with a status."""
        return [entry.name for entry in self.entries if entry.status == status]

    @property
    def loaded(self) -> list[str]:
        """Names of the tensors that the model gets from the file."""
        return self.names("used") + self.names("resampled")

    def summary(self) -> str:
        """Count tensors by status in one line, with reasons of dropped tensors."""
        counts = ((status, len(self.names(status))) for status in reversed(_ORDER))
        return ", ".join(
            f"{number} {status}{self._reasons(status)}" for status, number in counts if number or status == "used"
        )

    def _reasons(self, status: Status) -> str:
        """Return the reasons in parentheses, counted if there are several."""
        reasons = Counter(entry.reason for entry in self.entries if entry.status == status)
        if status != "dropped" or not all(reasons):
            return ""
        counted = [reason if len(reasons) == 1 else f"{number} {reason}" for reason, number in reasons.most_common()]
        return f" ({', '.join(counted)})" if counted else ""

    def table(self) -> str:
        """Format a table by module. Errors come first, marked `!`."""
        rows = [("", "status", "module", "tensors", "detail")]
        for status in _ORDER:
            rows += sorted(self._rows(status), key=lambda row: not row[0])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{row[0]:1} {row[1]:{widths[1]}}  {row[2]:{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"  {self.summary()}"])

    def _rows(self, status: Status) -> list[tuple[str, str, str, str, str]]:
        groups: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
        for entry in self.entries:
            if entry.status == status:
                module, index, tensor = split_name(entry.name)
                differing = f"{tensor or 'shape'}: file {entry.file_shape}, model {entry.model_shape}"
                detail = differing if status == "mismatched" else entry.reason
                groups["" if entry.accepted else "!", module, detail].append((index, tensor))
        rows: list[tuple[str, str, str, str, str]] = []
        for (mark, module, detail), members in groups.items():
            indices = sorted({int(index) for index, _ in members if index})
            name = f"{module}.{ranges(indices)}" if indices else module
            tensors = list(dict.fromkeys(tensor for _, tensor in members if tensor))
            if tensors and (status == "new" or (status == "dropped" and mark)):
                detail += f": {shorten(tensors)}"
            rows.append((mark, status, name, str(len(members)), detail))
        return rows


def split_name(name: str) -> tuple[str, str, str]:
    """Split "blocks.3.norm1.bias" into ("blocks", "3", "norm1.bias")."""
    home = next(prefix for prefix in ENCODER_HOMES if name.startswith(prefix))
    rest = name.removeprefix(home)
    indexed = _INDEXED.fullmatch(rest)
    if indexed:
        return home + indexed[1], indexed[2], indexed[3]
    module, _, tensor = rest.partition(".")
    return home + module, "", tensor


def ranges(indices: list[int]) -> str:
    """Format ascending numbers as ranges: [0, 1, 2, 5] gives "0-2,5"."""
    runs = groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ends = [(members[0][1], members[-1][1]) for members in (list(run) for _, run in runs)]
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ends)
