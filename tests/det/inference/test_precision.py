"""Predictions in fp32 are those of before, bf16 and tf32 change them by rounding, and all results are float32."""

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.data import build_detection_test_loader

from crossmae.errors import UserError
from det.backbone.weights import build_detector
from det.config import load_det_config
from det.data.coco import use_own_data
from det.data.loader import NamingMapper
from det.evaluation.evaluate import evaluate, predict
from det.inference.precision import check_precision, detect, inference_precision, tf32_allowed
from det.inference.predict import Predictor
from det.training.checkpoint import shared_settings
from det.training.train import evaluate_only, train
from tests.det.coco_files import write_coco
from tests.det.detectors import write_run
from tests.det.inference.test_predict import noise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("precision") / "run")


def open_predictor(run, precision):
    cfg = load_det_config(str(run / "config.yaml"), [f"TEST.PRECISION={precision}"])
    return Predictor(cfg, run)


def flags():
    products = torch.backends.cuda.matmul
    newer = getattr(products, "fp32_precision", None)
    return newer, products.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_fp32_is_bitwise_what_the_model_computes(run):
    predictor = open_predictor(run, "fp32")
    image = torch.from_numpy(noise(64, 48).transpose(2, 0, 1).copy())
    inputs = [{"image": image, "height": 64, "width": 48}]
    with torch.no_grad():
        (expected,) = predictor.model.inference(inputs, do_postprocess=False)
        (found,) = detect(predictor.model, inputs, "fp32")
    assert len(found) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert all(torch.equal(found.get(name), expected.get(name)) for name in ("scores", "pred_classes", "pred_masks"))


def test_bf16_changes_scores_a_little_and_gives_float32(run):
    exact, rounded = (open_predictor(run, precision) for precision in ("fp32", "bf16"))
    images = [noise(64, 48), noise(40, 64, seed=1)]
    for one, other in zip(exact.predict_raw(images), rounded.predict_raw(images), strict=True):
        assert {other.scores.dtype, other.pred_boxes.tensor.dtype, other.pred_masks.dtype} == {torch.float32}
        assert not torch.equal(one.scores, other.scores), "nothing was computed in bf16"
        torch.testing.assert_close(one.scores, other.scores, atol=0.02, rtol=0)
        torch.testing.assert_close(one.pred_masks.mean(), other.pred_masks.mean(), atol=0.02, rtol=0)
    (pasted,) = rounded.predict(images[:1])
    assert (pasted.pred_masks.dtype, pasted.scores.dtype) == (torch.bool, torch.float32)
    assert next(rounded.model.parameters()).dtype == torch.float32
    assert 0 < rounded.highest_score(images) < 1


def test_evaluation_computes_in_the_precision_of_the_key(cfg, tmp_path):
    path, images, _ = write_coco(tmp_path / "data", images=2)
    use_own_data(cfg, None, (str(path), str(images)))
    cfg.TEST.PRECISION = "bf16"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    torch.manual_seed(0)
    model, seen = build_detector(cfg), []
    model.backbone.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    assert set(evaluate(cfg, model)) == {"bbox", "segm"}
    assert seen == [True, True]
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=NamingMapper(cfg, False))
    predict(model, loader, (1, 3))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_of_torch_are_restored_after_an_error(precision):
    def fail():
        with inference_precision(precision, torch.device("cpu")):
            raise KeyError

    before = flags()
    with pytest.raises(KeyError):
        fail()
    assert flags() == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_for_the_time_of_a_prediction(allowed):
    def fail():
        with tf32_allowed():
            seen.append(flags())
            raise KeyError

    seen, untouched = [], flags()
    if allowed:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = flags()
        with pytest.raises(KeyError):
            fail()
        assert flags() == before
        assert seen[0][1:3] == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = untouched[1]
        if untouched[0] is not None:
            torch.backends.cuda.matmul.fp32_precision = untouched[0]
    assert flags() == untouched


def test_a_precision_that_the_device_does_not_have_is_refused(run, cfg, tmp_path, monkeypatch):
    message = "TEST.PRECISION: tf32 needs a GPU from Ampere on, and this is cpu. Set TEST.PRECISION=fp32 or bf16."
    with pytest.raises(UserError, match=message):
        open_predictor(run, "tf32")
    path, images, _ = write_coco(tmp_path / "data")
    use_own_data(cfg, (str(path), str(images)), (str(path), str(images)))
    cfg.TEST.PRECISION, cfg.MODEL.WEIGHTS = "tf32", str(run / "model_final.pth")
    for start in (train, evaluate_only):
        with pytest.raises(UserError, match=message):
            start(copy.deepcopy(cfg))
    assert not (tmp_path / "output").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="and this is cuda"):
        check_precision("tf32", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match=r"TEST.PRECISION: cuda has no bf16"):
        check_precision("bf16", torch.device("cuda"))


def test_a_run_may_continue_with_another_precision_of_evaluation():
    values = {"SEED": 0, "DATASETS.TRAIN": (), "SOLVER.ACCUMULATE": 1, "TEST.PRECISION": "bf16"}
    assert not any("PRECISION" in key for key in shared_settings(values, 1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_gpu_predicts_in_reduced_precision(run, precision):
    before = flags()
    words = ["MODEL.DEVICE=cuda", f"TEST.PRECISION={precision}"]
    rounded = Predictor(load_det_config(str(run / "config.yaml"), words), run)
    exact = open_predictor(run, "fp32")
    for one, other in zip(exact.predict_raw([noise(64, 48)]), rounded.predict_raw([noise(64, 48)]), strict=True):
        assert other.pred_masks.dtype == torch.float32
        torch.testing.assert_close(one.scores, other.scores.cpu(), atol=0.02, rtol=0)
    assert flags() == before
