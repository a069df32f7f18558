"""Proves that a config is right as a whole or fails at once, naming file and keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmae.errors import UserError
from crossmae.pretraining.config import load_config
from crossmae.training.config import CONFIG_ROOT, resolve_config_path
from tests.crossmae.pretraining.runs import make_config

MINIMAL = """
output_dir: out
data: {train: images}
model: {name: crossmae_vit_tiny_patch16}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_values_come_from_file_then_command_line(config_file: Path) -> None:
    config = load_config(str(config_file), ["optim.base_lr=1e-4", "model.fuse_blocks=[0, -1]", "data.workers=0"])
    assert config.optim.base_lr == 1e-4  # YAML reads 1e-4 as text; it is a number here
    assert config.model.fuse_blocks == (0, -1)
    assert config.data.workers == 0
    assert config.data.train == "images"
    assert config.schedule.epochs == 800


@pytest.mark.parametrize("word, expected", [(None, "auto"), ("auto", "auto"), ("true", True), ("no", False)])
def test_compilation_is_automatic_on_or_off(config_file: Path, word: str | None, expected: bool | str) -> None:
    config = load_config(str(config_file), [f"runtime.compile={word}"] if word else [])
    assert config.runtime.compile is expected
    assert config.run_settings().compiled is expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.batchsize=4", r"unknown key 'optim.batchsize' \(did you mean 'optim.batch_size'\?\)"),
        ("optimizer.lr=4", r"unknown key 'optimizer' \(did you mean 'optim'\?\)"),
        ("optim.batch_size=many", r"optim.batch_size: .*integer.*got 'many'"),
        ("optim.batch_size=true", r"optim.batch_size: input should not be true or false, got True"),
        ("model.name=crossmae_vit_giant", r"model.name: unknown model .*crossmae_vit_tiny_patch16"),
        ("optim.batch_size=0", r"optim.batch_size: .*greater than 0.*got 0"),
        ("model.mask_ratio=75", r"model.mask_ratio: .*less than 1.*got 75"),
        ("model.decoder=cros", r"model.decoder: .*'cross', 'cross_self' or 'self'"),
        ("data.crop_scale=[0.9, 0.2]", r"data: crop_scale must be two shares"),
        ("optim.lr=.nan", r"optim.lr: .*finite"),
        ("model.name=null", r"model.name"),
        ("runtime.compile=sometimes", r"runtime.compile: input should be 'auto', True or False, got 'sometimes'"),
        ("optim", r"optim: no key=value"),
        ("model.init=' '", r"model.init: an empty path, got ' '\. Name a file or folder\.$"),
        ("optim.lr.x=1", r"optim.lr: .*valid number"),
        ("output_dir.x=1", r"'output_dir' is not a section"),
        ("data.train=[", r"not valid YAML"),
        (
            "model.in_chans=1",
            r"data.mean has 3 values for model.in_chans 1\. Measure them with \S+\.py\.$",
        ),
        ("probe.train=there", r"probe: the probe needs both, .*\. Give the other, too\.$"),
        ("health.band=[[0.5, 1, 2], [0.1, 1, 2]]", r"health.band: rows must be .* rising shares"),
        ("optim.ema=1", r"command line: optim.ema: .*less than 1"),
        ("data.broken=skip", r"command line: data.broken: .*'error' or 'substitute'"),
    ],
)
def test_a_wrong_word_names_its_key(config_file: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(config_file), [word])
    assert "\n" not in str(caught.value)


def test_the_command_line_is_blamed_for_its_words_and_the_file_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(MINIMAL + "optim: {accumulate: 0}\n")
    with pytest.raises(UserError) as caught:
        load_config(str(path), ["optim.batch_size=0"])
    words, file = str(caught.value).split(f"; {path}: ")
    assert words.startswith("command line: optim.batch_size")
    assert file.startswith("optim.accumulate")


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("data: {train: x, worker: 2}\nmodel: {mask_ratio: 2}\n")
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    for part in (
        "bad.yaml",
        "missing key 'output_dir'",
        "'data.worker'",
        "did you mean 'data.workers'",
        "model.name",
        "got 2",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "has a list"), ("!!python/none", "YAML")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"bad.yaml: .*{message}"):
        load_config(str(path))


def test_bare_names_resolve_and_unknown_ones_list_what_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/pretrain/demo.yaml", "pretrain/demo.yaml", "pretrain/demo", "demo.yaml"):
        assert resolve_config_path(name) == CONFIG_ROOT / "pretrain" / "demo.yaml"
    with pytest.raises(UserError, match=r"--config-file nothing.yaml.*pretrain/demo\.yaml"):
        resolve_config_path("nothing.yaml")


def test_settings_without_effect_are_named() -> None:
    quiet = make_config(Path("images"), Path("out"))
    assert quiet.ignored(is_plain=False, has_shards=False) == {}
    loud = make_config(
        Path("images"),
        Path("out"),
        model={"decoder": "self", "fuse_input": False},
        optim={"lr": 1e-3, "lr_rule": "none"},
        validation={"images": 5},
        probe={"k": 3},
        data={"broken_budget": 0.5, "shuffle_shards": 3},
    )
    found = loud.ignored(is_plain=True, has_shards=False)
    assert sorted(key for keys in found.values() for key in keys) == [
        "data.broken_budget",
        "data.shuffle_shards",
        "model.fuse_input",
        "optim.base_lr",
        "optim.lr_rule",
        "probe.k",
        "validation.images",
    ]


@pytest.mark.parametrize("name", ["set #1", "[1]", "a: b", "{x}", "2023", "two\nlines", "caf\udce9", "'q'", "null"])
def test_paths_on_the_command_line_are_taken_as_they_are(name: str, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert load_config(str(config_file), [f"data.train={tmp_path / name}"]).data.train == str(tmp_path / name)


def test_an_absolute_path_need_not_exist(config_file: Path, tmp_path: Path) -> None:
    """YAML would write the run to a folder `runs`."""
    words = ["data.train=x", f"output_dir={tmp_path}/runs #2/a: b"]
    assert load_config(str(config_file), words).output_dir == tmp_path / "runs #2/a: b"


def test_a_folder_that_other_programs_cannot_write_is_an_error(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir: a name in UTF-8 is needed, got 'caf\\udce9'"):
        load_config(str(config_file), ["output_dir=caf\udce9"])


def test_a_config_in_another_encoding_is_named(config_file: Path) -> None:
    config_file.write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(UserError, match=r"run\.yaml: is UTF-16 text, not UTF-8\. Convert it: iconv"):
        load_config(str(config_file))
    config_file.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(str(config_file)).data.train == "images"
