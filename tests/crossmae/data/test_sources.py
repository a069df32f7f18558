"""Proves that every kind of source gives the same images and labels, in any process, and that a bad value is named."""

from __future__ import annotations

import csv
import json
import logging
import pickle
import pickletools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from crossmae.data.sources import Source, open_source
from crossmae.errors import UserError
from tests.crossmae.data.sources.source_files import CLASSES, tar_bytes, write_shards, write_tree


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_tree(tmp_path / "tree")


def as_text(folder: Path, paths: list[Path]) -> str:
    lines = ["# a comment", "", *(str(path.relative_to(folder)) for path in paths[:5]), *map(str, paths[5:])]
    (folder / "list.txt").write_text("\n".join(lines))
    return str(folder / "list.txt")


def as_csv(folder: Path, paths: list[Path], name: str = "list.csv") -> str:
    with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
        writer.writerow(["note", "file_name", "class"])
        writer.writerows(['of "two"\nlines', path.relative_to(folder), path.parent.name] for path in paths)
    return str(folder / name)


def as_parquet(folder: Path, paths: list[Path]) -> str:
    pa = pytest.importorskip("pyarrow")
    table = {"path": [str(path.relative_to(folder)) for path in paths], "label": [path.parent.name for path in paths]}
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(table), folder / "list.parquet")
    return str(folder / "list.parquet")


def as_coco(folder: Path, paths: list[Path]) -> str:
    names = [str(path.relative_to(folder)) for path in [*paths, paths[0]]]
    content = {"images": [{"id": index, "file_name": name} for index, name in enumerate(names)]}
    (folder / "coco.json").write_text(json.dumps(content))
    return str(folder / "coco.json")


def as_shards(folder: Path, paths: list[Path], value: str = "{}") -> str:
    write_shards(folder / "shards", paths)
    return value.format(folder / "shards")


def as_url(folder: Path, paths: list[Path], value: str = "memory://bucket") -> str:
    memory = fsspec.filesystem("memory")
    for shard in write_shards(folder / "shards", paths):
        memory.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    return value


def as_hugging_face(folder: Path, paths: list[Path]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {
        "picture": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [CLASSES.index(path.parent.name) for path in paths],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "hf"))
    return str(folder / "hf")


Kind = Callable[[Path, list[Path]], str]
LABELLED: dict[str, Kind] = {
    "tree": lambda folder, paths: str(folder / "tree"),
    "csv": as_csv,
    "tsv": partial(as_csv, name="list.tsv"),
    "parquet": as_parquet,
    "shards": as_shards,
    "glob": partial(as_shards, value="{}/s-*.tar"),
    "braces": partial(as_shards, value="{}/s-{{000..002}}.tar"),
    "file_url": partial(as_shards, value="file://{}/s-*.tar"),
    "hugging_face": as_hugging_face,
    "url": partial(as_url, value="memory://bucket/s-{000..002}.tar"),
    "url_glob": partial(as_url, value="memory://bucket/*.tar"),
    "url_folder": as_url,
    "chained_url": partial(as_url, value="simplecache::memory://bucket/s-{000..002}.tar"),
}
KINDS = LABELLED | {"text": as_text, "coco": as_coco}


def contents(source: Source) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images_and_labels(kind: str, tmp_path: Path, paths: list[Path]) -> None:
    source = open_source(KINDS[kind](tmp_path, paths), "data.train")
    # Shards hold their images in an order of their own.
    expected = {path.read_bytes(): path for path in paths}
    found = contents(source)
    assert len(source) == len(paths)
    assert set(found) == set(expected)
    assert [source.tail(index) for index in range(9)] == [data[-16:] for data in found]
    assert source.description.startswith("9 images")
    if kind in LABELLED:
        assert source.classes == CLASSES
        for index, data in enumerate(found):
            assert source.classes[source.label(index)] == expected[data].parent.name
    else:
        assert source.classes == ()
        with pytest.raises(UserError, match=r"9 images .* have no labels. .*one subfolder per class"):
            source.label(0)


@pytest.mark.parametrize("kind", ["tree", "csv", "shards", "chained_url", "hugging_face"])
def test_a_copy_reads_the_same_after_the_original_was_used(kind: str, tmp_path: Path, paths: list[Path]) -> None:
    source = open_source(KINDS[kind](tmp_path, paths), "data.train")
    found = contents(source)
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == found
    assert [copy.name(index) for index in range(9)] == [source.name(index) for index in range(9)]
    assert [copy.label(index) for index in range(9)] == [source.label(index) for index in range(9)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(  # what is in memory is there in forked processes only
    ("kind", "method"), [("tree", "fork"), ("tree", "spawn"), ("shards", "fork"), ("shards", "spawn"), ("url", "fork")]
)
def test_another_process_reads_the_same(kind: str, method: str, tmp_path: Path, paths: list[Path]) -> None:
    source = open_source(KINDS[kind](tmp_path, paths), "data.train")
    found = contents(source)  # leaves files open, which a forked process inherits
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        assert pool.submit(contents, source).result() == found


def test_many_images_are_few_objects(tmp_path: Path, paths: list[Path]) -> None:
    # Objects would be copied page by page into every worker, as their reference counts change.
    (tmp_path / "long.csv").write_text("path,label\n" + f"{paths[0]},a\n" * 1000)
    (tmp_path / "long.tar").write_bytes(tar_bytes({f"{number}.png": b"x" for number in range(1000)}))
    for name in ("long.csv", "long.tar"):
        source = open_source(str(tmp_path / name), "data.train")
        assert len(source) == 1000
        assert len(list(pickletools.genops(pickle.dumps(source)))) < 300


def test_only_a_tree_with_every_image_in_a_class_has_classes(
    tmp_path: Path, paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "tree"
    (root / "empty class").mkdir()
    (root / "empty class" / "1.heic").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert open_source(root, "data.train").classes == CLASSES
    assert "no image in the class folder empty class" in caplog.text
    assert "1 .heic are not read by this tool, more files than images in empty class" in caplog.text
    paths[0].rename(root / "000.png")  # beside the class folders
    assert open_source(root, "data.train").classes == ()
    assert open_source(root / "bee", "data.train").classes == ()


def test_numbers_as_classes_are_sorted_by_value(tmp_path: Path, paths: list[Path]) -> None:
    labels = [10, 9, 2]
    rows = [f"{path},{labels[index % 3]}" for index, path in enumerate(paths)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    source = open_source(tmp_path / "list.csv", "data.train")
    assert source.classes == ("2", "9", "10")
    assert [source.label(index) for index in range(3)] == [2, 1, 0]


def test_a_missing_label_turns_labels_off_and_is_counted(
    tmp_path: Path, paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.csv").write_text(f"path,label\n{paths[0]},a\n{paths[1]},\n")
    assert open_source(tmp_path / "list.csv", "data.train").classes == ()
    assert "labels are not used, there is none for 1 sample" in caplog.text


def test_root_is_where_relative_paths_start(tmp_path: Path, paths: list[Path]) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.txt").write_text("ant/000.png")
    source = open_source(str(tmp_path / "lists/list.txt"), "data.train", tmp_path / "tree")
    assert contents(source) == [paths[0].read_bytes()]


BAD: list[tuple[str, str, str]] = [
    (
        "nowhere/deeper",
        "",
        r"data.train: .*nowhere/deeper does not exist \(.*: .*\). Expected a folder of images, .tar",
    ),
    ("empty.txt", "# only this\n", r"empty\.txt names no image"),
    (
        "gone.txt",
        "\n".join(f"{n}.png" for n in range(7)),
        r"7 of 7 images are not there: .* 4\.png and 2 more\. .*data.root=",
    ),
    (
        "columns.csv",
        "a,b\n1,2\n",
        r"columns\.csv: the columns are a, b\. Name one of them path, image, file_name or filename",
    ),
    ("header.csv", "ant/000.png\nant/001.png\n", r"header\.csv: the first line is .* must name the columns"),
    ("semicolons.csv", "ant/000.png;a\n", r"semicolons\.csv: the first line is .* must name the columns"),
    ("nothing.csv", "\n", r"nothing\.csv is empty\. Fill it, or name another list"),
    ("table.csv.gz", "\x1f\x8b\x08", r"table\.csv\.gz: is compressed with gzip, not text\. Unpack it: gunzip -k table"),
    ("table.xlsx", "PK\3\4", r"table\.xlsx: is a zip archive or an Excel table, not text\. .*save the table as CSV"),
    ("row.csv", "path,label\nx.png\n", r"row\.csv, line 2: has 1 value, the header 2"),
    ("blank.csv", "path,label\n,a\n", r"blank\.csv: image 1 of 1 has an empty path"),
    ("quote.csv", 'path\n"x.png', r"quote\.csv: not valid CSV"),
    ("broken.json", "{", r"broken\.json: not valid JSON"),
    ("list.json", "[]", r'list\.json: no COCO annotations. Give a mapping with a list "images"'),
    ("name.json", '{"images": [{"id": 1}]}', r"name\.json: images\[0\]: file_name is None"),
    ("out.json", '{"images": [{"file_name": "../x.png"}]}', r"\.\./x\.png \(leads out of the folder\)"),
    ("absolute.json", '{"images": [{"file_name": "/x.png"}]}', r"/x\.png \(leads out of the folder\)"),
    ("gone.json", '{"images": [{"file_name": "x.png"}]}', r"1 of 1 images are not there: .*set data.root=FOLDER"),
    ("data.xyz", "?", r"data\.xyz: no such kind of data is known. Expected a folder"),
    ("bad.parquet", "?", r"bad\.parquet: not a whole Parquet file"),
    ("x-*.tar", "", r"x-\*\.tar: .* no file matches"),
    ("x-{00..11}.tar", "", r"12 of 12 shards are not there: .*x-00\.tar, .*x-04\.tar and 7 more"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_a_bad_value_is_one_error_with_key_and_file(name: str, content: str, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content:
        (tmp_path / name).write_text(content, encoding="latin-1" if name.endswith("z") else "utf-8")
    with pytest.raises(UserError, match=message) as raised:
        open_source(str(tmp_path / name), "data.train")
    assert "data.train" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nono://bucket/x.tar", "data.train: nono://bucket/x.tar cannot be opened: Protocol not known"),
        ("memory://empty/x.tar", "data.train: 1 of 1 shards are not there: memory:///empty/x.tar"),
        ("memory://empty", r"data.train: no file matches memory://empty/\*\.tar"),
    ],
)
def test_a_bad_url_is_named_at_once(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError, match=message):
        open_source(url, "data.train")


def test_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"list\.txt: is UTF-16 text, not UTF-8. Convert it: iconv -f UTF-16"):
        open_source(tmp_path / "list.txt", "data.train")


def test_parquet_with_images_inside_says_what_to_do(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"image": [{"bytes": b"x", "path": "x"}]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"column 'image' holds struct<.*save_to_disk"):
        open_source(tmp_path / "x.parquet", "data.train")


LISTED: dict[str, tuple[str, list[str | None]]] = {  # name and content of a list of the first images, and their labels
    "semicolon.csv": ("path;label\nant/000.png;x\nant/001.png;y\n", ["x", "y"]),
    "tabs.csv": ("label\tpath\nx\tant/000.png\ny\tant/001.png\n", ["x", "y"]),
    "bars.csv": ('note|File Name|Class\n"a|b"|ant/000.png|x\n|ant/001.png|y\n', ["x", "y"]),
    "commas.tsv": ("path,label\nant/000.png,x\nant/001.png,y\n", ["x", "y"]),
    "excel.csv": ("sep=;\r\nPATH;LABEL\r\nant/000.png;x\r\nant/001.png;y\r\n;\r\n", ["x", "y"]),
    "exact.csv": ("Path,path,LABEL,label\n?,ant/000.png,?,x\n?,ant/001.png,?,y\n", ["x", "y"]),
    "moved.csv": ('path,label\n"C:\\d\\ANT\\000.PNG",x\n./tree/ant/001.png,y\n', ["x", "y"]),
    "missing.csv": ("path,label\nant/000.png,NaN\nant/001.png,y\n", [None, None]),
    "empty.csv": ("path,label\nant/000.png,\nant/001.png,\n", [None, None]),
    "names.csv": ("path,label\nant/000.png,NA\nant/001.png,Nan\n", ["NA", "Nan"]),
    "caffe.txt": ("ant/000.png 0\nant/001.png 7\n", ["0", "7"]),
    "tabs.txt": ("ant/000.png\tx\nant\\001.png\ty\n", ["x", "y"]),
    "quoted.txt": ('"D:\\tree\\ant\\000.png"\n"D:\\tree\\ant\\001.png"\n', [None, None]),
    "coco.json": ('{"images": [{"file_name": "/x/ant/000.png"}, {"file_name": "..\\\\ant\\\\001.png"}]}', [None, None]),
}


@pytest.mark.parametrize("name", LISTED)
def test_lists_are_read_as_people_write_them(name: str, tmp_path: Path, paths: list[Path]) -> None:
    content, labels = LISTED[name]
    (tmp_path / "tree" / name).write_text(content, newline="")
    source = open_source(tmp_path / "tree" / name, "data.train")
    assert contents(source) == [path.read_bytes() for path in paths[:2]]
    found = [source.classes[source.label(index)] for index in range(2)] if source.classes else [None, None]
    assert found == labels


def test_a_coco_file_never_names_images_outside_its_folder(tmp_path: Path, paths: list[Path]) -> None:
    for name in (str(paths[0]), "../tree/ant/000.png"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/coco.json").write_text(json.dumps({"images": [{"file_name": name}]}))
        with pytest.raises(UserError, match=r"1 of 1 images are not there: .*000\.png \(leads out of the folder\)"):
            open_source(tmp_path / "other/coco.json", "data.train")


def test_moved_files_are_said_and_missing_ones_have_a_reason(
    tmp_path: Path, paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text("tree/ant/000.png\ntree\\ant\\001.png\n")
    assert contents(open_source(lines, "data.train")) == [path.read_bytes() for path in paths[:2]]
    assert "list.txt: 1 of 1 are there as tree/ant/001.png: separators of Windows" in caplog.text
    lines.write_text("tree/ant/000.png\nTree/Ant/000.PNG\n9.png\n")
    reason = r"2 of 3 images are not there: Tree/Ant/000\.PNG \(the only file like it, .*\), 9\.png\. Relative"
    with pytest.raises(UserError, match=reason):
        open_source(lines, "data.train")


def test_an_image_with_two_labels_has_none(tmp_path: Path, paths: list[Path]) -> None:
    rows = f"path,label\n{paths[0]},a\n{paths[1]},b\n"
    (tmp_path / "list.csv").write_text(rows + f"{paths[0]},a\n")
    assert open_source(tmp_path / "list.csv", "data.train").classes == ("a", "b")  # more often, but the same
    (tmp_path / "list.csv").write_text(rows + f"tree/../tree/{paths[0].relative_to(tmp_path / 'tree')},b\n")
    source = open_source(tmp_path / "list.csv", "data.train")
    with pytest.raises(UserError, match=r"000\.png is listed as 'a' and 'b'\. Keep one of these lines, or"):
        source.labels()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Train/1", "valid/2", "test2017/3"], r"folders Train, test2017, valid are splits, not classes\. Name one of"),
        (
            ["all/train/1", "all/val/2"],
            r"folders train, val are splits, not classes\. Name one of them, such as .*/all/t",
        ),
        (["train/1", "bus/2"], ""),
        (
            ["all/in/ant/1", "all/in/bee/2"],
            r"all are in .*/all/in\. Name that folder if its folders ant, bee are the cl",
        ),
        (
            ["ant/1", "bee/2", "3"],
            r"there is none for 1 sample, the first is .*/3\.png\. Label them, or leave them out: 2 would",
        ),
        (["ant/1", "bee/2", "3", "4"], r"have no labels\. Labels come from"),
        (["ant/1", "3"], r"have no labels\. Labels come from"),
        (["ant/1"], r"have no labels\. Labels come from"),
        (["Ant/1", "ant/2"], ""),
    ],
)
def test_folders_that_are_no_classes_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(b"x")
    source = open_source(tmp_path, "data.train")
    assert len(source) == len(names)  # all of them, for training without labels
    if message:
        with pytest.raises(UserError, match=message):
            source.labels()
    else:
        assert len(source.classes) == len({name.partition("/")[0].lower() for name in names})


def test_a_preview_next_to_packed_images_is_named(
    tmp_path: Path, paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    shards = Path(as_shards(tmp_path, paths))
    (shards / "@eaDir").mkdir()
    for name in ("preview.png", "@eaDir/SYNOPHOTO.png"):
        (shards / name).write_bytes(paths[0].read_bytes())
    source = open_source(shards, "data.train")
    assert source.description.startswith("9 images in 3 tar shards")
    assert "s-000.tar, s-001.tar, s-002.tar are read, not the images next to them: preview.png" in caplog.text
    (tmp_path / "tree/archive.tar").write_bytes(next(shards.glob("*.tar")).read_bytes())
    assert open_source(tmp_path / "tree", "data.train").classes == CLASSES
    assert "tree are read, not the files next to them: archive.tar. To read these, name them" in caplog.text


def test_the_parent_of_shards_is_named(tmp_path: Path, paths: list[Path]) -> None:
    shards = Path(as_shards(tmp_path / "up", paths))
    with pytest.raises(
        UserError, match=rf"the \.tar shards of {tmp_path}/up are in {shards}\. Name one of these folders"
    ):
        open_source(tmp_path / "up", "data.train")


def test_a_digest_is_of_names_in_order_and_labels(tmp_path: Path) -> None:
    """It stays if the data set is moved."""

    def digests(name: str, rows: str) -> tuple[str, str]:
        (tmp_path / name).mkdir(exist_ok=True)
        for image in ("a.png", "b.png", "c.png"):
            Image.new("RGB", (2, 2)).save(tmp_path / name / image)
        (tmp_path / name / "list.csv").write_text("path,label\n" + rows)
        source = open_source(tmp_path / name / "list.csv", "data.train")
        return source.digest(labelled=False), source.digest(labelled=True)

    plain = digests("one", "a.png,x\nb.png,y\nc.png,y\n")
    assert plain == digests("other", "a.png,x\nb.png,y\nc.png,y\n")
    relabelled = digests("one", "a.png,x\nb.png,x\nc.png,y\n")
    assert relabelled[0] == plain[0]
    assert relabelled[1] != plain[1]
    for rows in ("b.png,x\na.png,y\nc.png,y\n", "a.png,x\nb.png,y\n"):
        assert not set(digests("one", rows)) & set(plain)
