"""Proves that shards hold what their source holds, and that interrupted, damaged or broken cases end the same way."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from crossmae.data.sources import open_source, shard_writer
from crossmae.data.sources.shard_writer import ShardSettings, make_shards, verify_shards
from crossmae.data.sources.source import Source
from crossmae.errors import UserError
from crossmae.files.claim import claim
from crossmae.files.leftovers import temporary_name
from tests.crossmae.data.sources.source_files import CLASSES, write_tree

SETTINGS = ShardSettings(short_side=8, images_per_shard=4)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_tree(tmp_path / "tree", 10)
    return open_source(tmp_path / "tree", "SRC")


def of_a_dead_process(name: str) -> str:
    return temporary_name(name).replace(f".{os.getpid()}.", f".{2**31 - 1}.")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(source: Source, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    make_shards(source, tmp_path / "whole", SETTINGS, threads=2)
    return contents(tmp_path / "whole")


def test_names_and_members(whole: dict[str, bytes], tmp_path: Path) -> None:
    assert list(whole) == ["index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    with tarfile.open(tmp_path / "whole/shard-000001.tar") as tar:
        assert tar.getnames()[:3] == ["000000004.jpg", "000000004.cls", "000000004.json"]
        about = json.loads(tar.extractfile("000000004.json").read())  # type: ignore[union-attr]
    assert about == {"name": str(tmp_path / "tree/bee/004.png"), "label": "bee", "width": 20, "height": 14}


def test_originals_come_back_with_their_labels(source: Source, tmp_path: Path) -> None:
    settings = ShardSettings(images_per_shard=3, keep_original=True)
    make_shards(source, tmp_path / "d", settings, threads=2)
    shards = open_source(tmp_path / "d", "data.train")
    assert [shards.read(index) for index in range(10)] == [source.read(index) for index in range(10)]
    assert shards.classes == source.classes == CLASSES
    assert [shards.label(index) for index in range(10)] == [source.label(index) for index in range(10)]
    again = open_source(str(tmp_path / "d/shard-{000000..000003}.tar"), "data.train")
    assert [again.read(index) for index in range(10)] == [source.read(index) for index in range(10)]


def test_without_index_the_shards_are_plain_webdataset(source: Source, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "whole/index.json").unlink()
    shards = open_source(tmp_path / "whole", "data.train")
    assert [shards.label(index) for index in range(10)] == [source.label(index) for index in range(10)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("harm", [damage, delete])
def test_a_damaged_shard_is_found_and_made_again(
    harm: Any, number: int, source: Source, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    assert verify_shards(folder) == 3
    harm(folder / f"shard-00000{number}.tar")
    with pytest.raises(UserError, match=rf"1 of 3 shards are missing or changed: shard-00000{number}\.tar\. "):
        verify_shards(folder)
    assert make_shards(source, folder, SETTINGS, threads=2)[1] == 2
    assert contents(folder) == whole


@pytest.mark.parametrize("stop_at", [0, 3, 4, 7, 9])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stop_at: int, source: Source, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = source.read

    def interrupted(index: int) -> bytes:
        if index == stop_at:
            raise KeyboardInterrupt
        return read(index)

    folder = tmp_path / "d"
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_shards(source, folder, SETTINGS, threads=1)
    assert not (folder / "index.json").exists()
    with pytest.raises(UserError, match="has not finished"):
        open_source(folder, "data.train")
    with pytest.raises(UserError, match="has not finished"):
        verify_shards(folder)
    (folder / of_a_dead_process("shard-000009.tar")).write_bytes(b"left by a kill")
    with open(folder / "progress.jsonl", "a") as file:
        file.write('{"file": "shard-0000')  # so was this line
    assert make_shards(source, folder, SETTINGS, threads=2)[1] == stop_at // 4
    assert contents(folder) == whole


def test_nothing_is_done_twice(
    source: Source, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "read", lambda index: pytest.fail("read again"))
    index, kept = make_shards(source, tmp_path / "whole", SETTINGS, threads=2)
    assert (kept, len(index.shards), index.total("names")) == (3, 3, 10)
    assert contents(tmp_path / "whole") == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ShardSettings(short_side=9, images_per_shard=4), "short_side was 8, now 9"),
        (ShardSettings(short_side=8, images_per_shard=5), "images_per_shard was 4, now 5"),
        (ShardSettings(short_side=8, images_per_shard=4, keep_original=True), "short_side was 8, now None"),
    ],
)
def test_other_settings_are_refused(
    changed: ShardSettings, message: str, source: Source, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"holds shards with other settings: {message}"):
        make_shards(source, tmp_path / "whole", changed, threads=2)
    assert contents(tmp_path / "whole") == whole


def test_another_source_is_refused(source: Source, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tree/ant/000.png").rename(tmp_path / "tree/ant/renamed.png")
    with pytest.raises(UserError, match="names_sha256 was"):
        make_shards(open_source(tmp_path / "tree", "SRC"), tmp_path / "whole", SETTINGS, threads=2)


def test_another_pillow_is_only_a_warning(
    source: Source,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shard_writer.PIL, "__version__", "0.0")
    make_shards(source, tmp_path / "whole", SETTINGS, threads=2)
    assert "pillow was" in caplog.text


def test_a_folder_with_other_things_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DST: .*/tree holds something else \(ant, bee, cat\)"):
        make_shards(source, tmp_path / "tree", SETTINGS, threads=2)


def test_a_broken_image_stops_or_is_left_out_and_listed(source: Source, tmp_path: Path) -> None:
    Path(source.name(5)).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"bee/005\.png: cannot be read as an image"):
        make_shards(source, tmp_path / "a", SETTINGS, threads=2)
    settings = ShardSettings(short_side=8, images_per_shard=4, skip_broken=True)
    index, _ = make_shards(source, tmp_path / "b", settings, threads=2)
    assert (index.total("names"), index.total("broken")) == (9, 1)
    assert (tmp_path / "b/broken.txt").read_text() == (
        f"{source.name(5)}: cannot be read as an image: not an image of a kind that this tool reads\n"
    )
    shards = open_source(tmp_path / "b", "data.train")
    others = [index for index in range(10) if index != 5]
    assert [shards.name(index)[-13:] for index in range(9)] == [f"{index:09d}.jpg" for index in others]
    assert [shards.label(index) for index in range(9)] == [source.label(index) for index in others]


def test_a_shard_of_broken_images_is_empty_and_none_at_all_an_error(source: Source, tmp_path: Path) -> None:
    settings = ShardSettings(short_side=8, images_per_shard=4, skip_broken=True)
    for index in range(4, 8):
        Path(source.name(index)).write_bytes(b"")
    make_shards(source, tmp_path / "a", settings, threads=2)
    assert len(open_source(tmp_path / "a", "data.train")) == 6
    for index in range(10):
        Path(source.name(index)).write_bytes(b"")
    with pytest.raises(UserError, match=r"SRC: no image can be read: .*000\.png"):
        make_shards(source, tmp_path / "b", settings, threads=2)


def test_a_file_that_can_not_be_opened_is_never_left_out(source: Source, tmp_path: Path) -> None:
    Path(source.name(5)).unlink()
    settings = ShardSettings(short_side=8, images_per_shard=4, skip_broken=True)
    with pytest.raises(UserError, match=r"bee/005\.png: cannot be read: No such file"):
        make_shards(source, tmp_path / "d", settings, threads=2)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="--short-side 0: out of range"):
        ShardSettings(short_side=0)
    with pytest.raises(UserError, match="--images-per-shard 0"):
        ShardSettings(images_per_shard=0)
    with pytest.raises(UserError, match="--quality 101"):
        ShardSettings(quality=101)


def test_two_processes_do_not_make_shards_in_one_folder(source: Source, tmp_path: Path) -> None:
    with claim(tmp_path / "shards", "shards"), pytest.raises(UserError, match=r"DST: .* is in use by a shards run"):
        make_shards(source, tmp_path / "shards", SETTINGS, 1)


def test_leftovers_of_a_killed_run_are_removed_and_other_files_stay(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    left = folder / of_a_dead_process("shard-000000.tar")
    left.mkdir()
    make_shards(source, folder, SETTINGS, 1)
    assert not left.exists()
    (folder / ".mine.tmp").write_text("not ours")
    make_shards(source, folder, SETTINGS, 1)
    assert (folder / ".mine.tmp").read_text() == "not ours"


def test_a_folder_with_other_files_stays_as_it_is(source: Source, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        make_shards(source, tmp_path, SETTINGS, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tree"]
