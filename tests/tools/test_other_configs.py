"""Proves that a config of another tool is recognised, for all pairs of tools and all shipped configs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from crossmae.classification.probe.config import ProbeRunConfig
from crossmae.classification.train.config import FinetuneConfig
from crossmae.errors import USER_ERROR_EXIT_CODE, UserError
from crossmae.pretraining.config import PretrainConfig
from crossmae.training.config import (
    CONFIG_ROOT,
    DETECT,
    EXAMPLES,
    FINETUNE,
    KEYS_OF_ONE_TOOL,
    PRETRAIN,
    PROBE,
    find_tool,
    load_typed_config,
    read_yaml,
)
from det.config import load_det_config
from tests.tools.command_line import exit_code
from tools import finetune, pretrain, probe, train_net

SCHEMAS: dict[str, Any] = {PRETRAIN: PretrainConfig, FINETUNE: FinetuneConfig, PROBE: ProbeRunConfig}
MAINS: dict[str, Callable[..., None]] = {
    PRETRAIN: pretrain.main,
    FINETUNE: finetune.main,
    PROBE: probe.main,
    DETECT: train_net.main,
}
CONFIGS = sorted(CONFIG_ROOT.rglob("*.yaml"))


def tool_of(path: Path) -> str:
    """Return the tool of a shipped config by its name."""
    if path.parent != CONFIG_ROOT:
        return f"tools/{path.parent.name}.py"
    return PROBE if path.name.startswith("probe") else DETECT


def read(tool: str, path: Path) -> None:
    if tool == DETECT:
        load_det_config(str(path))
    else:
        load_typed_config(SCHEMAS[tool], str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(CONFIG_ROOT)))
def test_every_other_tool_names_the_right_tool(path: Path) -> None:
    own = tool_of(path)
    assert find_tool(read_yaml(path)) == own
    for reader in MAINS.keys() - {own}:
        with pytest.raises(UserError) as caught:
            read(reader, path)
        message = str(caught.value)
        _, _, rest = message.partition(": ")
        assert rest == f"is a config of {own}, not of {reader}. Name a config of {reader}, such as {EXAMPLES[reader]}."
        assert message.startswith(str(CONFIG_ROOT))


@pytest.mark.parametrize(("tool", "given"), [pair for pair in product(MAINS, MAINS) if len(set(pair)) > 1])
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str, given: str
) -> None:
    """Also with settings of the tool's own, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    settings = ["OUTPUT_DIR=OUT", "SEED=1"] if tool == DETECT else ["output_dir=OUT", "data.train=images"]
    assert exit_code(MAINS[tool], "--config-file", EXAMPLES[given], *settings) == USER_ERROR_EXIT_CODE
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f": is a config of {given}, not of {tool}." in line
    assert list(tmp_path.iterdir()) == []


def test_a_dumped_config_is_recognised() -> None:
    """A run records all its settings, defaults included."""
    words = ["data.train=images", "data.val=images", "output_dir=out"]
    for tool, schema in SCHEMAS.items():
        if tool == PROBE:
            words = [*words, "weights=null", "model.name=crossmae_vit_tiny_patch16"]
        config = load_typed_config(schema, EXAMPLES[tool], words)
        assert find_tool(config.model_dump(mode="json")) == tool


def test_a_few_wrong_keys_do_not_make_another_config(tmp_path: Path) -> None:
    """Then the unknown keys are named, with the known keys once."""
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: x, crop_pct: 1}\noutput_dir: out\nmodel: {name: crossmae_vit_tiny_patch16}\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown key 'data\.crop_pct'"):
        load_typed_config(PretrainConfig, str(path))
    path.write_text("output_dir: out\nyyy: {a: 1}\nzwei: 2\ndata: {q: 1}\nmodel: {}\n")
    with pytest.raises(UserError) as caught:
        load_typed_config(PretrainConfig, str(path))
    message = str(caught.value)
    assert "unknown keys 'yyy', 'zwei' (known: output_dir, data, model" in message
    assert message.count("(known: output_dir") == 1


def test_marks_are_the_keys_of_one_tool() -> None:
    """A new key of one schema only gets a mark, a key of two schemas none."""
    keys = {tool: all_keys(schema) for tool, schema in SCHEMAS.items()}
    for tool, own in keys.items():
        others = set[str]().union(*(keys[other] for other in keys if other != tool))
        sections = {key.partition(".")[0] for key in others}
        single = {key if key.partition(".")[0] in sections else key.partition(".")[0] for key in own - others}
        assert set(KEYS_OF_ONE_TOOL[tool].split()) == single


def all_keys(schema: type[BaseModel]) -> set[str]:
    """Collect the dotted keys of a schema. A section without keys of its own counts as a key."""
    found: set[str] = set()
    for name, field in schema.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= {f"{name}.{key}" for key in kind.model_fields} if is_section else {name}  # type: ignore[union-attr]
    return found
