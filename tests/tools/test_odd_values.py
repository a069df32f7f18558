"""Proves that odd values of settings and data files end in one short line that names the key or the file.

The values are legal as text: a tag that does not fit, thousands of digits, deep nesting, aliases that multiply, a
variable that was not expanded, a path outside a folder. Nothing is written, and nothing outside is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossmae.data.sources import open_source
from crossmae.errors import UserError
from crossmae.pretraining.config import PretrainConfig
from crossmae.training.config import load_typed_config
from tests.crossmae.data.sources.source_files import tar_bytes

DIGITS, LAUGHS = "9" * 5000, "x: [&a [1, 1, 1], " + ", ".join(
    f"&{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(9)
) + "]"  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSET", raising=False)
    model = {"name": "crossmae_vit_tiny_patch16"}
    Path("c.yaml").write_text(yaml.safe_dump({"output_dir": "OUT", "data": {"train": "images"}, "model": model}))
    return "c.yaml"


VALUES = [
    ("optim.batch_size=!!int abc", "optim.batch_size"),
    ("optim.base_lr=!!float x", "optim.base_lr"),
    ("optim=!!timestamp x", "optim"),
    ("optim.batch_size=2020-99-99", "optim.batch_size"),
    ("optim.batch_size=[[[[", "optim.batch_size"),
    ("optim.batch_size=" + "[" * 100_000, "optim.batch_size"),
    ("optim.batch_size=" + "[" * 200 + "]" * 200, "more than 100 lists"),
    (f"optim.batch_size={DIGITS}", "optim.batch_size"),
    (f"optim.base_lr={DIGITS[:4000]}", "optim.base_lr"),
    (f"runtime.seed={DIGITS[:30]}", "greater than 1e+18"),
    (f"data={{{LAUGHS}}}", "behind aliases"),
    ("data=&a [*a]", "data"),
    ("data={train: a, train: b}", "'train' is given again"),
    ("output_dir=''", "output_dir: an empty path"),
    ("output_dir='${UNSET}/x'", "the variable ${UNSET} was not expanded"),
    ("output_dir='~nobody-here/x'", "the home folder ~nobody-here is unknown"),
    ("model.init='$UNSET/x'", "model.init: the variable $UNSET was not expanded"),
    ("model.init='~nobody-here/x'", "model.init: the home folder ~nobody-here is unknown"),
    ("data.root='~nobody-here/x'", "data.root: the home folder ~nobody-here is unknown"),
]


@pytest.mark.parametrize(("word", "told"), VALUES, ids=[word[:40] for word, _ in VALUES])
def test_an_odd_value_of_a_setting_is_named(config: str, word: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load_typed_config(PretrainConfig, config, [word])
    message = str(error.value)
    assert told in message
    assert "\n" not in message
    assert len(message) < 1500
    assert [path.name for path in Path.cwd().iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("text", [f"data: {'[' * 100_000}", f"optim: {{lr: {DIGITS}}}", LAUGHS, "x: " + "a" * 300_000])
def test_an_odd_config_file_is_named(config: str, text: str) -> None:
    Path(config).write_text(text)
    with pytest.raises(UserError, match=r"^c\.yaml: not valid YAML: "):
        load_typed_config(PretrainConfig, config)


def test_names_with_a_dollar_or_tilde_are_paths_where_they_exist(config: str) -> None:
    Path("$UNSET").mkdir()
    Path("~nobody-here").mkdir()
    for value in ("$UNSET/new", "~nobody-here/new"):
        assert load_typed_config(PretrainConfig, config, [f"output_dir='{value}'"]).output_dir == Path(value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("", "data.train: an empty path"),
        ("${UNSET}/x", "data.train: ${UNSET}/x: the variable ${UNSET} was not expanded. Write the value of UNSET."),
        ("$UNSET/x-{0..3}.tar", "the variable $UNSET was not expanded"),
        ("~nobody-here/x", "the home folder ~nobody-here is unknown. Write the whole path."),
        ("deep.json", "deep.json: not valid JSON: more than 100 lists"),
        ("wide.json", "wide.json: not valid JSON: more than 100 lists"),
        ("digits.json", "digits.json: not valid JSON: a number has 4,000 digits"),
    ],
)
def test_an_odd_data_set_is_named(config: str, value: str, told: str) -> None:
    Path("deep.json").write_text('{"images": ' + "[" * 100_000)
    Path("wide.json").write_text('{"images": ' + "[" * 150 + "]" * 150 + "}")
    Path("digits.json").write_text('{"images": [{"file_name": "a.png", "id": ' + DIGITS[:4000] + "}]}")
    with pytest.raises(UserError) as error:
        open_source(value, "data.train")
    assert told in str(error.value)


def shard_folder(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A folder with one shard and its index, after a `change` of the index."""
    folder.mkdir()
    content = tar_bytes({"a.png": b"inside"})
    (folder / "s.tar").write_bytes(content)
    entry = {"file": "s.tar", "bytes": len(content), "sha256": "", "names": ["a.png"], "offsets": [512], "sizes": [6]}
    index = {"format": "crossmae-shards-1", "settings": {}, "classes": ["x"], "shards": [entry | {"labels": [0]}]}
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["shards"][0].update(values)


INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "file above": entry(file="../outside.tar"),
    "absolute file": entry(file="/etc/passwd"),
    "no file": entry(file=""),
    "offset below 0": entry(offsets=[-1]),
    "beyond the shard": entry(sizes=[10**6]),
    "huge size": entry(sizes=[10**30]),
    "no number": entry(offsets=["512"]),
    "true": entry(sizes=[True]),
    "one offset too many": entry(offsets=[512, 512]),
    "unknown class": entry(labels=[1]),
    "class below 0": entry(labels=[-1]),
    "names no list": entry(names="a"),
    "no bytes": entry(bytes=None),
    "shards no list": lambda index: index.update(shards={}),
    "entry no mapping": lambda index: index.update(shards=[1]),
    "classes no names": lambda index: index.update(classes=[1]),
}


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES)
def test_an_index_of_shards_stays_in_its_folder_and_its_shards(tmp_path: Path, change: Callable[..., Any]) -> None:
    (tmp_path / "outside.tar").write_bytes(tar_bytes({"a.png": b"secret"}))
    shard_folder(tmp_path / "shards", change)
    with pytest.raises(UserError, match=r"index\.json: damaged: .* Copy it again"):
        open_source(tmp_path / "shards", "data.train")


def test_the_right_index_is_read(tmp_path: Path) -> None:
    shard_folder(tmp_path / "shards", lambda index: None)
    assert open_source(tmp_path / "shards", "data.train").read(0) == b"inside"
