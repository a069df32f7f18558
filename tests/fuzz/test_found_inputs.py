"""Holds inputs that once ended in a traceback, without end, or outside their folder. Each is refused in one line."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossmae.checkpoints.metadata import CLASSES, FORMAT, PIXEL_MEAN, recorded_names, recorded_numbers
from crossmae.checkpoints.weights import read_weights
from crossmae.data.sources import open_source
from crossmae.data.sources.shard_files import MOST_NAMES, expand_braces
from crossmae.errors import UserError
from crossmae.experiments.rows import read_rows
from crossmae.files import load_json, load_literal, load_yaml, read_json_lines
from crossmae.reports.run_folder import read_log
from crossmae.training.log import truncate_log
from tests.crossmae.data.sources.source_files import encoded, tar_bytes
from tests.crossmae.experiments.sample_rows import sample_rows
from tests.fuzz.attempts import limited


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return path


def negative_size(folder: Path) -> Path:
    """A tar file whose second member has a negative size, which leads back to the first (CVE-2025-8194)."""
    content = bytearray(tar_bytes({"0.png": b"x" * 512, "1.png": b"y" * 512}))
    header = content[1024:1536]
    header[124:136] = struct.pack(">Bxxxq", 0xFF, -1024)
    header[125:128] = b"\xff" * 3
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[1024:1536] = header
    return write(folder / "s.tar", bytes(content))


def long_pax(folder: Path) -> Path:
    """A tar file with a record of a length that is no number."""
    content = tar_bytes({"0.png": b"x"})
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 40
    record = b"99999999999999999999 path=" + b"a" * 14
    return write(folder / "s.tar", info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + content)


def parquet_of_bytes(folder: Path) -> Path:
    """Paths that say to be text and are not UTF-8."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    names = pyarrow.array([b"a\xf3.png"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"path": names}), folder / "list.parquet")
    return folder / "list.parquet"


def coco_outside(folder: Path) -> Path:
    write(folder / "secret.png", encoded(0))
    (folder / "data").mkdir()
    entry = {"id": 1, "file_name": "../secret.png"}
    return write(folder / "data/list.json", json.dumps({"images": [entry]}))


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a member of a negative size": negative_size,
    "a pax record of no length": long_pax,
    "text that is not UTF-8": parquet_of_bytes,
    "an image outside the folder": coco_outside,
    "a name of thousands of letters": lambda folder: write(folder / "list.csv", "path\n" + "x" * 100_000),
    "a line of thousands of values": lambda folder: write(folder / "list.tsv", "path\tlabel\n" + "9" * 100_000),
    "billions of shards": lambda folder: f"{folder}/x-{{0..9999999999}}.tar",
    "a product of braces": lambda folder: f"{folder}/{'{0..99}' * 9}.tar",
    "thousands of braces": lambda folder: f"{folder}/{'{a}' * 5000}.tar",
    "a path of one long name": lambda folder: f"{folder}/{'x' * 3000}",
    "a null in a path": lambda folder: f"{folder}/a\0b.tar",
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_data_set_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    value = make(tmp_path)
    with limited(), pytest.raises(UserError) as error:
        open_source(value, "data.train").read(0)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 4500


def test_braces_are_counted_before_they_are_expanded() -> None:
    assert len(expand_braces(f"x-{{1..{MOST_NAMES // 10}}}.tar")) == MOST_NAMES // 10
    with pytest.raises(UserError, match=r"names more than 1,000,000 files"):
        expand_braces(f"x-{{0..{MOST_NAMES}}}.tar")


@pytest.mark.parametrize(
    "change", [{"cell": {}}, {"facts": 1}, {"numbers": {"a": "x"}}, {"cost": None}, {"machine": []}]
)
def test_a_row_of_results_with_other_values_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    row = sample_rows(arms=("own",), shares={10: 40}, seeds=(0,))[0].__dict__
    lines = [json.dumps(row | change), json.dumps(row)]
    with pytest.raises(UserError, match=r"line 1 is no row of results"):
        read_rows(write(tmp_path / "rows.jsonl", "\n".join(lines) + "\n"))


@pytest.mark.parametrize(
    "line", ["[1]", '{"step": {}}', '{"step": "1"}', '{"step": null}', "[" * 9999, '{"step": 1e999}']
)
def test_a_line_of_a_log_is_skipped(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "log.jsonl", f'{line}\n\udcff\n{{"step": 1, "epoch": 1}}\n')
    assert [row for row in read_json_lines(path, step=float) if row] == [{"step": 1, "epoch": 1}]
    assert read_log(path, "epoch").rows == [{"step": 1, "epoch": 1}]
    assert truncate_log(path, 5) == [{"step": 1, "epoch": 1}]


@pytest.mark.parametrize(
    ("key", "text", "read"),
    [
        (CLASSES, "cat", recorded_names),
        (CLASSES, "[1]", recorded_names),
        (CLASSES, "{}", recorded_names),
        (PIXEL_MEAN, '["1"]', recorded_numbers),
        (PIXEL_MEAN, "[1e999]", recorded_numbers),
        (PIXEL_MEAN, "[" * 999, recorded_numbers),
        (PIXEL_MEAN, "[NaN]", recorded_numbers),
        (PIXEL_MEAN, "[true]", recorded_numbers),
    ],
)
def test_metadata_of_another_kind_are_named(key: str, text: str, read: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=f"metadata '{key}' of a weight file: .* is not a JSON list"):
        read({key: text, FORMAT: "crossmae"}, key)


@pytest.mark.parametrize("text", ["9" * 400, "[" * 150 + "]" * 150, "[" * 100_000, "{", ""])
def test_json_has_bounds(text: str) -> None:
    with limited(), pytest.raises(ValueError):
        load_json(text)


@pytest.mark.parametrize("text", ["9" * 30, "[" * 150 + "]" * 150, "[" * 100_000, "{", "1" * 300_000])
@pytest.mark.parametrize("load", [load_yaml, load_literal])
def test_settings_have_bounds(load: Callable[[str], Any], text: str) -> None:
    with limited(), pytest.raises(ValueError):
        load(text)


def test_whole_numbers_that_occur_are_read() -> None:
    assert load_json("[18446744073709551615, -1]") == [2**64 - 1, -1]  # ids made by hashing
    assert load_yaml("[1000000000000000000, 1e-4]") == [10**18, "1e-4"]


@pytest.mark.parametrize("name", ["x" * 3000, "x" * 300 + "/y.pth", "a\0b.pth"])
def test_a_path_that_no_file_can_have_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_weights(tmp_path / name)


def test_an_index_of_weights_stays_in_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    with pytest.raises(UserError, match="a file outside its folder"):
        read_weights(write(tmp_path / "model.safetensors.index.json", json.dumps(index)))
