"""An exported detector gives what detectron2's own inference gives, in onnxruntime and through `torch.export`.

The detectors are tiny, with seeded random weights made large enough that scores are spread and classes differ.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.layers import ROIAlign
from detectron2.modeling import build_model

from crossmae.checkpoints.weights import save_weights
from crossmae.errors import UserError
from crossmae.models import linear
from det.backbone.record import detector_metadata
from det.backbone.weights import build_detector
from det.classes import Classes
from det.config import flatten, load_det_config
from det.inference import export
from det.inference.export import compare_detections, export_detector, fit_image, load_exported
from det.inference.export_graph import ExportableDetector, obstacle, pool
from det.inference.predict import Predictor
from tests.det.coco_files import TINY

SIZE = 96  # pixels; tables of relative positions are made for 64, so they are resized, and windows of 5 are padded
MULTI_LEVEL = [
    "MODEL.VIT.WINDOW_SIZE=5", "MODEL.VIT.MAX_POOL_LEVEL=True", "MODEL.RPN.IN_FEATURES=['p2','p4']",
    "MODEL.ROI_HEADS.IN_FEATURES=['p2','p3']",
]  # fmt: skip
CASCADE = ["MODEL.ROI_HEADS.NAME=CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG=True"]
GAIN = {"objectness_logits": 20, "anchor_deltas": 20, "cls_score": 30, "bbox_pred": 200, "mask_head.predictor": 500}


@pytest.fixture(scope="module")
def runtime():
    """onnxruntime, where the extra "export" is installed."""
    pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install -e ".[export]"')
    return pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install -e ".[export]"')


def config(tmp_path, *overrides):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return load_det_config(str(tmp_path / "tiny.yaml"), [f"MODEL.VIT.SQUARE_PAD_TEST={SIZE}", *overrides])


def build(tmp_path, *overrides):
    """A detector with random weights that finds several things, padding to SIZE as the export does."""
    cfg = config(tmp_path, *overrides)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(0, 0.5)
            for part, factor in GAIN.items():
                if part in name and name.endswith("weight"):
                    parameter.mul_(factor)
    return pool_from_both_levels(model)


def pool_from_both_levels(model):
    for pooler in (module for module in model.modules() if hasattr(module, "canonical_box_size")):
        pooler.canonical_box_size = 60
    return model


def as_the_tools_build_it(tmp_path, model, *overrides):
    """The same detector with our layers in place of detectron2's: what users export."""
    ours = build_detector(config(tmp_path, *overrides)).eval()
    ours.load_state_dict(model.state_dict())
    assert any(isinstance(module, linear.Linear) for module in ours.roi_heads.modules())
    return pool_from_both_levels(ours)


def picture(height=SIZE, width=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def detectron2_finds(model, image):
    """What `GeneralizedRCNN.inference` finds in an (h, w, 3) RGB image, before it is scaled to another size."""
    ordered = image if model.input_format == "RGB" else image[:, :, ::-1]
    sample = {"image": torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1))).float()}
    with torch.no_grad():
        (found,) = model.inference([sample], do_postprocess=False)
    outputs = {"boxes": found.pred_boxes.tensor, "scores": found.scores, "classes": found.pred_classes}
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def inputs_of(image, beside=0):
    """The picture at the top left of the input, and something beside it."""
    canvas = np.full((1, 3, SIZE, SIZE), beside, np.float32)
    canvas[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return {"image": canvas, "image_size": np.array(image.shape[:2])}


def assert_same(expected, received):
    assert len(expected["scores"]) >= 3
    assert expected.keys() == received.keys()
    assert np.array_equal(expected["classes"], received["classes"])
    assert np.abs(expected["boxes"] - received["boxes"]).max() <= 0.01
    assert np.abs(expected["scores"] - received["scores"]).max() <= 1e-4
    if "masks" in expected:
        assert np.ptp(expected["masks"]) > 0.1
        assert np.abs(expected["masks"] - received["masks"]).max() <= 1e-3


def assert_finds_the_same(run, model):
    """Pictures that fill the input and that do not, whatever is beside them; and none, which has no objects."""
    for image in (picture(), picture(48, SIZE, seed=1), picture(70, 50, seed=2)):
        assert_same(detectron2_finds(model, image), run(inputs_of(image, beside=200)))
    nothing = run({"image": inputs_of(picture())["image"], "image_size": np.array([0, 0])})
    assert [value.shape for value in nothing.values()] == [(0, 4), (0,), (0,), (0, 8, 8)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, runtime):
    """A detector, its folder with detector.onnx, and the differences of both. The weights have a file of their own."""
    folder = tmp_path_factory.mktemp("exported")
    model = build(folder, *MULTI_LEVEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "ONE_FILE_BYTES", 0)
        patch.setattr(linear, "LEAST_MULTIPLICATIONS", 1)  # as for the layers of a detector that is not tiny
        ours = as_the_tools_build_it(folder, model, *MULTI_LEVEL)
        parity = export_detector(ours, folder / "detector.onnx", SIZE, metadata={"class_names": '["a", "b", "c"]'})
    return model, folder, parity


def test_onnxruntime_finds_what_detectron2_finds(exported, runtime):
    """Also with the weights in a file of their own, as those of large detectors are."""
    model, folder, parity = exported
    path = folder / "detector.onnx"
    assert parity.compared == 5
    assert not parity.exceeded()
    assert sorted(parity.differences) == ["boxes", "masks", "scores", "unpaired"]

    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [
        ("image", [1, 3, SIZE, SIZE]), ("image_size", [2]),
    ]  # fmt: skip
    names = [value.name for value in session.get_outputs()]
    assert names == ["boxes", "scores", "classes", "masks"]
    assert_finds_the_same(lambda inputs: dict(zip(names, session.run(None, inputs), strict=True)), model)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["a", "b", "c"]
    assert json.loads(about["img_size"]) == [SIZE, SIZE]
    assert "RGB, 0 to 255" in about["input"]
    assert {file.name for file in folder.iterdir()} == {"detector.onnx", "detector.onnx.data", "tiny.yaml"}
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (folder / "detector.onnx.data").stat().st_size > 0.8 * weights


def test_a_loaded_program_finds_what_detectron2_finds(tmp_path, monkeypatch):
    model = build(tmp_path, *CASCADE)
    monkeypatch.setattr(linear, "LEAST_MULTIPLICATIONS", 1)
    ours = as_the_tools_build_it(tmp_path, model, *CASCADE)
    assert export_detector(ours, tmp_path / "detector.pt2", SIZE).compared == 5
    assert_finds_the_same(load_exported(tmp_path / "detector.pt2"), model)
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "detector.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["img_size"] == f"[{SIZE}, {SIZE}]"


@pytest.mark.parametrize(
    "overrides",
    [
        MULTI_LEVEL,
        [*CASCADE, *MULTI_LEVEL],
        ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE=True"],
        ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG=True", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK=True"],
        ["MODEL.MASK_ON=False", "INPUT.FORMAT=BGR", "MODEL.PIXEL_MEAN=[10., 100., 200.]"],
        ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE=9", "MODEL.RPN.PRE_NMS_TOPK_TEST=30", "MODEL.RPN.POST_NMS_TOPK_TEST=12"],
        ["MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.3", "TEST.DETECTIONS_PER_IMAGE=100"],
        ["MODEL.VIT.POS_EMBED=absolute_win", "MODEL.VIT.ATTENTION=materialized", "TEST.DETECTIONS_PER_IMAGE=1000"],
    ],
    ids=lambda overrides: overrides[0].split(".")[-1],
)
def test_the_graph_computes_what_detectron2_does(tmp_path, overrides):
    """Before any export, and so for many settings; equal, because the numbers are rounded alike."""
    model = build(tmp_path, *overrides)
    exportable = ExportableDetector(model, (SIZE, SIZE))
    for image in (picture(), picture(50, 70, seed=1)):
        inputs = {name: torch.from_numpy(value) for name, value in inputs_of(image, beside=99).items()}
        with torch.no_grad():
            received = {name: value.numpy() for name, value in exportable(**inputs).items()}
        expected = detectron2_finds(model, image)
        assert_same(expected, received)
        assert np.array_equal(expected["boxes"], received["boxes"])
        assert np.array_equal(expected["scores"], received["scores"])


def test_every_box_is_pooled_from_the_level_of_its_size(tmp_path):
    pooler = build(tmp_path, *MULTI_LEVEL).roi_heads.box_pooler
    levels = [torch.full((1, 1, 24, 24), 1.0), torch.full((1, 1, 12, 12), 2.0)]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 90, 90], [5, 5, 9, 7], [1, 2, 80, 94]])
    assert pool(pooler, levels, boxes)[:, 0, 1, 1].tolist() == [1, 2, 1, 2]


@pytest.fixture
def fake_files(monkeypatch):
    """Files that need no exporter: what is read back is detectron2's own result, a little changed by `changes`."""
    changes = {}

    def load(path):
        assert path.read_text() == "exported"
        return lambda inputs: {
            name: value + changes.get(name, 0)
            for name, value in export.eager_detections(changes["model"], inputs).items()
        }

    monkeypatch.setattr(export, "_write", lambda model, path, *rest: path.write_text("exported"))
    monkeypatch.setattr(export, "load_exported", load)
    return changes


@pytest.mark.parametrize("changed, by, shown", [("boxes", 0.011, "0.011"), ("scores", 1.5e-4, "0.00015")])
def test_a_file_that_differs_is_not_kept(tmp_path, fake_files, changed, by, shown):
    model = fake_files["model"] = build(tmp_path)
    target = tmp_path / "detector.pt2"
    target.write_text("old")
    fake_files[changed] = by
    with pytest.raises(
        UserError, match=rf"detector.pt2: differs from.*not kept: .*{changed} {shown} \(limit.*--no-check"
    ):
        export_detector(model, target, SIZE, force=True)
    assert target.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"detector.pt2", "tiny.yaml"}
    assert export_detector(model, target, SIZE, force=True, check=False) is None
    assert target.read_text() == "exported"
    fake_files[changed] = by / 2
    assert export_detector(model, target, SIZE, force=True).differences[changed] == pytest.approx(by / 2, rel=0.01)


def test_a_check_that_finds_nothing_says_so(tmp_path, fake_files, caplog):
    model = fake_files["model"] = build(tmp_path, "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.99")
    assert export_detector(model, tmp_path / "detector.pt2", SIZE).compared == 0
    assert "proves little" in caplog.text


def test_what_exporters_do_not_know_is_one_line(tmp_path, monkeypatch, capfd):
    model = build(tmp_path)
    monkeypatch.setattr(model.backbone.net, "forward", lambda x: {"last_feat": x if x.mean().item() > 0 else -x})
    with pytest.raises(UserError, match=r"^the detector cannot be exported: \w+: .*\. Export its backbone"):
        export_detector(model, tmp_path / "detector.pt2", SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yaml"]
    assert capfd.readouterr() == ("", "")  # no graph of thousands of lines


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("detector.pb", SIZE, r"detector.pb: unknown suffix. Use .onnx, or .pt2"),
        ("no/detector.onnx", SIZE, r"there is no folder .*no\. Create"),
        ("detector.onnx", 100, r"image size: 100 x 100 does not fit. Use multiples of 8 pixels"),
        ("detector.onnx", (SIZE, 0), r"image size: 96 x 0 does not fit. Use multiples of 8 pixels"),
        ("old.onnx", SIZE, r"old.onnx: exists already"),
        ("new.onnx", SIZE, r"new.onnx.data: exists already"),
    ],
)
def test_refused_and_nothing_written(tmp_path, name, size, message):
    model = build(tmp_path)
    (tmp_path / "old.onnx").touch()
    (tmp_path / "new.onnx.data").touch()
    with pytest.raises(UserError, match=message):
        export_detector(model, tmp_path / name, size)
    assert {file.name for file in tmp_path.iterdir()} == {"old.onnx", "new.onnx.data", "tiny.yaml"}


def test_parts_that_are_not_known(tmp_path):
    model = build(tmp_path)
    assert obstacle(model) is None
    assert obstacle(model.backbone) == "MODEL.META_ARCHITECTURE is FeaturePyramid, known: GeneralizedRCNN"
    model.roi_heads.keypoint_on = True
    with pytest.raises(UserError, match=r"exported: MODEL.KEYPOINT_ON is True. Export its backbone"):
        export_detector(model, tmp_path / "detector.onnx", SIZE)

    class Otherwise(ROIAlign):
        """A pooler of somebody's own."""

    model.roi_heads.box_pooler.level_poolers[0].__class__ = Otherwise
    assert obstacle(model) == "a POOLER_TYPE is Otherwise, known: ROIAlign"


def test_pairs_are_found_in_any_order():
    random = np.random.default_rng(0)
    first = {"boxes": random.uniform(0, 90, (6, 4)), "scores": random.uniform(0, 1, 6), "classes": np.arange(6) % 2}
    order = random.permutation(6)
    second = {name: value[order].copy() for name, value in first.items()}
    second["boxes"][2, 1] += 0.25
    second["scores"][3] -= 0.5
    assert compare_detections(first, second).differences == {
        "unpaired": 0, "boxes": pytest.approx(0.25), "scores": pytest.approx(0.5),
    }  # fmt: skip
    assert compare_detections(first, second).exceeded() == ["boxes", "scores"]
    fewer = {name: value[:-1] for name, value in second.items()}
    assert compare_detections(first, fewer).differences["unpaired"] == 1
    assert compare_detections(fewer, first).differences["unpaired"] == 1
    assert compare_detections(first, {name: value[:0] for name, value in first.items()}).differences == {"unpaired": 6}
    assert compare_detections(first, first | {"classes": 1 - first["classes"]}).exceeded()[0] == "unpaired"
    assert compare_detections(first, first | {"scores": np.full(6, np.nan)}).exceeded() != []


def test_a_picture_of_any_size_fits(tmp_path):
    inputs = fit_image(picture(40, 20), (64, SIZE))
    assert inputs["image"].shape == (1, 3, 64, SIZE)
    assert inputs["image_size"].tolist() == [64, 32]
    assert inputs["image"][0, :, :, 31].any()
    assert not inputs["image"][0, :, :, 32:].any()
    same = fit_image(picture(64, 50), (64, SIZE))["image"]
    assert np.array_equal(same[0, :, :, :50], picture(64, 50).transpose(2, 0, 1))
    assert fit_image(picture(1, 500), (64, SIZE))["image_size"].tolist() == [1, SIZE]


def test_the_program_of_the_docs_pastes_the_masks_of_the_predictor(exported, tmp_path, monkeypatch, capsys):
    """Nearly to the pixel, because OpenCV interpolates by steps of 1/32 of a cell."""
    page = (Path(__file__).parents[3] / "docs/detection.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- test: onnxruntime -->\n```python\n(.*?)```", page, re.DOTALL)
    assert not re.search(r"torch|PIL|det\b", code)
    assert len([line for line in code.splitlines() if line]) <= 20
    model, folder, _ = exported
    monkeypatch.chdir(tmp_path)
    for name in ("detector.onnx", "detector.onnx.data"):
        Path(name).symlink_to(folder / name)
    Image.fromarray(picture()).save("photo.jpg", format="png")  # without loss, so that both read the same pixels
    sides = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.VIT.SQUARE_PAD_TEST")
    words = [*(f"{key}={SIZE}" for key in sides), *MULTI_LEVEL]
    settings = dict(flatten(load_det_config(str(folder / "tiny.yaml"), words)))
    about = detector_metadata(settings, Classes(("a", "b", "c"), (1, 2, 3)))
    save_weights("detector.safetensors", model.state_dict(), about)
    predictor = Predictor("detector.safetensors")
    expected, pasted = predictor("photo.jpg"), []
    exec(code.replace("    print(", "    pasted.append(inside)\n    print("), {"pasted": pasted})
    lines = capsys.readouterr().out.splitlines()
    scores = [f"{name} {score:.2f}" for name, score in zip(predictor.names(expected), expected.scores, strict=True)]
    assert [line.partition(":")[0] for line in lines] == scores
    masks = expected.pred_masks.numpy()
    assert masks.any(axis=(1, 2)).sum() >= 3
    for mine, theirs in zip(pasted, masks, strict=True):
        assert mine.shape == theirs.shape == (SIZE, SIZE)
        assert (mine & theirs).sum() >= 0.99 * (mine | theirs).sum()
