"""Proves that the commands of README.md, CONTRIBUTING.md and all pages of docs/ are accepted by their programs.

Every command of a program of this repository is parsed by the parser of the program, and its settings are loaded by the
config loader of the program: unknown options, keys, values out of range and missing arguments fail. Make targets,
extras and test files must exist, and every setting in backticks must have a key that exists. Nothing is trained. Words
in capitals, such as IMAGES, stay as they are: tests such as tests/test_readme.py run commands on small data.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel

from crossmae.classification.probe.config import ProbeRunConfig
from crossmae.classification.train.config import FinetuneConfig
from crossmae.doctor import read_lists
from crossmae.errors import COMMANDS, UserError
from crossmae.pretraining.config import PretrainConfig, load_config
from crossmae.training.config import load_typed_config, resolve_config_path
from tools import dataset_stats

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]}
PROGRAMS = ("python", "torchrun", "crossmae", "make", "pip", "docker", "srun")
CONTROL = ("||", "&&", "|", ";", ">")  # words of the shell that end a command
RECORDS = {"results.md", "reliability.md"}  # of what was run: they name scripts
OF_A_RUN = ("OUT", "outputs/")  # configs that only a run writes
SCHEMAS: dict[str, type[BaseModel]] = {"finetune": FinetuneConfig, "probe": ProbeRunConfig}
RECIPES = {"pretrain": "pretrain/small.yaml", "finetune": "finetune/small.yaml", "detect": "own_mask_rcnn.yaml"}
PATHS = ["data.train=IMAGES", "data.val=IMAGES", "output_dir=OUT"]  # that recipes leave to the user
needs_detectron2 = pytest.mark.skipif(
    find_spec("detectron2") is None, reason="detectron2 is not installed: python tools/install_detectron2.py"
)


class Parsed(Exception):
    """The arguments of a command line, raised in place of running the program."""


def commands(text: str) -> list[str]:
    """Commands of a page: indented lines with their continuations, and code in backticks."""
    text = re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^    (\w.*)$", text, re.MULTILINE) + re.findall(r"`(\w[^`\n]* [^`\n]+)`", text)
    return [line.replace("=SEED", "=0") for line in lines if line.startswith(PROGRAMS)]


def program(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """File of this repository that a command runs, and its arguments."""
    words = list(takewhile(lambda word: word not in CONTROL, words))
    for at, word in enumerate(words):
        rest = list(words[at + 1 :])
        if word == "crossmae" and rest and (rest[0] in COMMANDS or at == 0) and not rest[0].startswith("-"):
            return COMMANDS[rest[0]], rest[1:]
        if re.fullmatch(r"(tools|tests)/[\w/]+\.py", word):
            return word, rest
        if word == "-m" and rest and rest[0].startswith("crossmae."):
            return f"{rest[0].replace('.', '/')}.py", rest[1:]
    return None


def parse(file: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments that a program finds in its command line."""

    def stop(parse_words: Any) -> Any:
        def parsed(parser: argparse.ArgumentParser, *values: Any) -> NoReturn:
            raise Parsed(parse_words(parser, *values))

        return parsed

    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop(getattr(argparse.ArgumentParser, name)))
        patch.setattr(sys, "argv", [file, *words])
        with pytest.raises(Parsed) as found:
            module.main()
    return vars(found.value.args[0])


def load(file: str, arguments: dict[str, Any]) -> None:
    """Load the settings of a command by the loader of its program."""
    words = [word for value in arguments.values() if isinstance(value, list) for word in value if isinstance(word, str)]
    kind = {"train_net": "detect", "visualize_data": "detect"}.get(Path(file).stem, Path(file).stem)
    name = arguments.get("config_file")
    if kind == "dataset_stats":
        dataset_stats.load(arguments["config_file"], arguments["overrides"])
    elif kind in ("pretrain", "finetune", "probe", "detect") and name:
        load_settings(kind, name, arguments["overrides"])
    else:  # settings that a program hands on to others
        of_detector = [word for word in words if re.match(r"[A-Z_]+(\.[A-Z_0-9]+)+=", word)]
        if name or of_detector:
            load_settings("detect", name or RECIPES["detect"], of_detector)
        others = [word for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)]
        if others:
            kind = "pretrain" if others == arguments.get("pretrain_set") else "finetune"
            load_settings(kind, RECIPES[kind], [*PATHS, *others])


def load_settings(kind: str, name: str, words: list[str]) -> None:
    try:
        resolve_config_path(name)
    except UserError:
        if not name.startswith(OF_A_RUN):
            raise
        name = RECIPES[kind]
    if kind == "pretrain":
        load_config(name, words)
    elif kind == "detect":
        from det.config import load_det_config  # here, because it needs detectron2

        load_det_config(name, words)
    else:
        load_typed_config(SCHEMAS[kind], name, words)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept devices that this machine lacks."""
    if find_spec("detectron2") is not None:
        monkeypatch.setattr("det.config.choose_device", lambda cfg, asked: None)


@needs_detectron2
@pytest.mark.parametrize("page", PAGES)
def test_programs_accept_the_commands(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], any_device: None
) -> None:
    wrong = []
    for line in commands(PAGES[page].read_text(encoding="utf-8")):
        found = program(shlex.split(line, comments=True))
        if found is None or "..." in line:
            continue
        file, words = found
        if not (ROOT / file).is_file():
            wrong.append(f"{line}: there is no {file}")
        elif file.startswith("tests/") or not words:  # a bare name is a mention
            continue
        else:
            try:
                load(file, parse(file, words, monkeypatch))
            except (UserError, SystemExit) as error:
                wrong.append(f"{line}: {error} {capsys.readouterr().err}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_targets_extras_and_test_files_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in commands(PAGES[page].read_text(encoding="utf-8")):
        first, *rest = [word for word in shlex.split(line, comments=True) if word != "&&"]
        if first == "make":
            wanted = [word for word in rest if re.fullmatch("[a-z-]+", word)]
            assert set(wanted) <= set(targets), line
        if first == "pip":
            extras = {name for found in re.findall(r"\[([\w,]+)\]", line) for name in found.split(",")}
            assert extras <= set(read_lists()), line
        if "pytest" in rest:
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), line


@needs_detectron2
@pytest.mark.parametrize("page", PAGES)
def test_settings_in_the_text_exist(page: str) -> None:
    """`section.key=value` and `SECTION.KEY` in backticks, of any program."""
    from det.config import detectron2_defaults  # here, because it needs detectron2

    known = set().union(*(fields(schema) for schema in (PretrainConfig, FinetuneConfig, ProbeRunConfig)))
    of_detector = set(nodes(detectron_keys(detectron2_defaults())))
    text = re.sub(r"```\w*\n.*?```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"(?<![\w.])[a-z_]+\.[a-z_]+(?==[\w\[{])", " ".join(re.findall(r"`[^`\n]+`", text)))
    named += [
        key for key in re.findall(r"`'?([A-Z_]{3,}(?:\.[A-Z_0-9]+)+)(?=[=`])", text) if key.split(".")[0] in of_detector
    ]
    assert set(named) <= known | of_detector


def detectron_keys(cfg: Any) -> Any:
    from det.config import add_crossmae_config

    add_crossmae_config(cfg)
    return cfg


def nodes(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and keys."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from nodes(value, f"{prefix}{key}.")


def fields(schema: type[BaseModel]) -> set[str]:
    """Dotted names of all keys of a schema."""
    found = set()
    for name, field in schema.model_fields.items():
        found.add(name)
        inner = [one for one in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(one, type)]
        for one in inner:
            if issubclass(one, BaseModel):
                found |= {f"{name}.{key}" for key in fields(one)}
    return found


@pytest.mark.parametrize("page", sorted(PAGES.keys() - RECORDS))
def test_commands_are_named_as_subcommands(page: str) -> None:
    """A script without arguments is a mention, and the installer also runs where this package is not installed."""
    scripts = set(COMMANDS.values()) - {"tools/install_detectron2.py"}
    found = [(line, program(line.split())) for line in commands(PAGES[page].read_text(encoding="utf-8"))]
    assert not [line for line, one in found if one and one[1] and one[0] in scripts and one[0] in line]


def test_faults_are_noticed(monkeypatch: pytest.MonkeyPatch, any_device: None) -> None:
    text = "Text `python tools/x.py` and\n\n    python tools/worth.py \\\n        A B --plam || exit\n"
    assert commands(text) == ["python tools/worth.py A B --plam || exit", "python tools/x.py"]
    assert program(shlex.split(commands(text)[0])) == ("tools/worth.py", ["A", "B", "--plam"])
    file, words = program(shlex.split("torchrun --standalone tools/pretrain.py --config-file x")) or ("", [])
    assert (file, words) == ("tools/pretrain.py", ["--config-file", "x"])
    assert program(shlex.split("torchrun --no-python crossmae pretrain --config-file x")) == (file, words)
    with pytest.raises(SystemExit):
        parse("tools/worth.py", ["A", "B", "--plam"], monkeypatch)
    pretrain = ["--config-file", "pretrain/small.yaml", "optim.batch_sice=2"]
    with pytest.raises(UserError, match="batch_sice"):
        load("tools/pretrain.py", parse("tools/pretrain.py", pretrain, monkeypatch))
    with pytest.raises(UserError, match="no such file"):
        load_settings("pretrain", "pretrain/smal.yaml", [])
