"""The sizes in plan, page and help are those that the tools use."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmae.experiments.cells import step_fingerprints
from crossmae.experiments.rows import Row, append_row
from crossmae.experiments.worth import plan
from crossmae.experiments.worth.grid import PRESETS, build_cells, choose_budget, classify_words
from crossmae.experiments.worth.inputs import LabelledPart
from crossmae.experiments.worth.model_sizes import describe_presets, sizes_of
from tests.crossmae.classification.labelled import write_classes
from tests.crossmae.experiments.worth.tiny_question import ask, tiny_preset


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("settings", [(), ("INPUT.MAX_SIZE_TEST=384",), ("INPUT.SIZE=256",)])
def test_sizes_of_the_detector_are_those_of_its_config(name: str, settings: tuple[str, ...]) -> None:
    """An independent reader of the configs: the detector's own."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from det.config import load_det_config

    preset = PRESETS[name]
    config, found = load_det_config(preset.detect, settings), sizes_of(preset, "detect", (), settings)
    assert found.image == str(config.INPUT.MAX_SIZE_TEST)
    vit = config.MODEL.VIT
    assert (found.width, found.depth, found.patch) == (vit.EMBED_DIM, vit.DEPTH, vit.PATCH_SIZE)
    assert found.crop == f"{vit.PRETRAIN_IMG_SIZE} x {vit.PRETRAIN_IMG_SIZE}"


def test_sizes_follow_the_settings() -> None:
    pretrain = ("model.img_size=[32, 96]", "model.depth=2", "model.embed_dim=48")
    found = sizes_of(PRESETS["demo"], "classify", pretrain)
    assert (found.crop, found.image, found.depth, found.width, found.patch) == ("32 x 96", "32 x 96", 2, 48, 8)
    larger = sizes_of(PRESETS["demo"], "classify", pretrain, ("model.img_size=128", "optim.lr=1"))
    assert (larger.crop, larger.image) == ("32 x 96", "128 x 128")


def test_plan_page_and_help_have_the_sizes(tmp_path: Path) -> None:
    labels, preset = LabelledPart(write_classes(tmp_path / "classes", per_class=10)), tiny_preset(tmp_path / "configs")
    question = ask(tmp_path / "out", tmp_path / "classes", labels, preset, ("own",))
    budget = choose_budget(question, 1234)
    words = classify_words(question, question.labels.train[0, 100.0], 15, 1234, tmp_path, 0)
    assert {"model.img_size=32", "model.patch_size=8", "model.embed_dim=24", "model.depth=2"} <= set(words)
    made = plan.Plan(build_cells(question, budget), budget, load=1.0)
    results = question.output / plan.RESULTS
    for name, fingerprints in step_fingerprints(made.cells, results).items():
        facts = next(cell.facts for cell in made.cells if cell.name == name)
        cost = {"cpu_seconds": 9.0, "wall_seconds": 9.0}
        append_row(results, Row(name, facts, {"top1": 50.0}, cost, fingerprint=fingerprints[-1]))
    plan.write_answer(question, made, {})
    page = (tmp_path / "out" / plan.PAGE).read_text()
    sizes = "width 24, depth 2, patches of 8 x 8 pixels"
    for text in (plan.describe_plan(question, made, 1, []), page):
        assert "crops of 32 x 32 pixels" in text
        assert "the classifier sees 32 x 32 pixels" in text
        assert sizes in text
    assert "1,234 steps train it. The results may not hold for full-size training" in page
    assert "demo: images of 64 x 64 pixels (classes) or 128 (detection), encoder of width 192" in describe_presets()
