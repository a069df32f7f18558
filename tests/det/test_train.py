"""Training: layer decay, repeatable and bit-exactly resumable runs, atomic checkpoints, evaluation, one-line errors."""

import json
import logging
import math

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model

from crossmae.errors import UserError, run_cli
from det.coco import use_own_data
from det.config import load_det_config
from det.evaluate import evaluate, format_results
from det.train import AtomicCheckpointer, Trainer, parameter_groups
from tests.det.coco_files import TINY, save, write_coco
from tools.train_net import build_parser, main


@pytest.fixture(autouse=True)
def quiet_root_logger():
    """The tool adds a console handler to the root logger; take it away again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def command(tmp_path):
    """The words of a command line for a tiny run in tmp_path / "out"."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    path, images, _ = write_coco(tmp_path / "data")
    words = ["--config-file", str(tmp_path / "tiny.yaml"), "--train-json", str(path), "--train-images", str(images)]
    return [*words, "--val-json", str(path), "--val-images", str(images), f"OUTPUT_DIR={tmp_path / 'out'}"]


def final_state(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_layer_decay_gives_each_parameter_its_rate_once():
    cfg = load_det_config("coco_mask_rcnn.yaml", ["MODEL.DEVICE=cpu"])
    model = build_model(cfg)
    groups = parameter_groups(cfg, model)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable)
    expected = {
        "backbone.net.pos_embed": (1e-4 * 0.7**13, 0.0),
        "backbone.net.patch_embed.proj.weight": (1e-4 * 0.7**13, 0.1),
        "backbone.net.blocks.0.attn.qkv.weight": (1e-4 * 0.7**12, 0.1),
        "backbone.net.blocks.0.attn.rel_pos_h": (1e-4 * 0.7**12, 0.1),
        "backbone.net.blocks.0.norm1.weight": (1e-4 * 0.7**12, 0.0),
        "backbone.net.blocks.11.mlp.fc2.bias": (1e-4 * 0.7, 0.1),
        "backbone.simfp_2.0.weight": (1e-4, 0.1),
        "backbone.simfp_2.1.weight": (1e-4, 0.0),
        "proposal_generator.rpn_head.conv.conv0.weight": (1e-4, 0.1),
        "roi_heads.box_head.conv1.norm.bias": (1e-4, 0.0),
        "roi_heads.box_predictor.cls_score.weight": (1e-4, 0.1),
    }
    for name, values in expected.items():
        assert found[id(trainable[name])] == pytest.approx(values), name
    for name, parameter in trainable.items():
        if ".norm" in name or name.endswith("pos_embed"):
            assert found[id(parameter)][1] == 0, name


def test_a_run_repeats_and_resumes_bit_for_bit(tmp_path, command, capsys):
    """Drop path and the sampling of boxes included; whatever the workers; then evaluation alone gives the same AP."""
    main(command)
    printed = capsys.readouterr().out
    whole = final_state(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("events")) == [
        "config.yaml", "inference", "last_checkpoint", "log.txt", "metrics.json", "model_0000001.pth",
        "model_0000003.pth", "model_final.pth", "results.json", "run.json",
    ]  # fmt: skip
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert {"AP", "AP50", "AP75", "AP-a", "AP-b"} <= set(results["bbox"])
    assert json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert printed.splitlines()[0].split() == ["AP", "AP50", "AP75"]
    assert {line.split()[0] for line in printed.splitlines() if line.strip()} >= {"box", "mask", "class", "a", "b"}

    second = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'second'}", "DATALOADER.NUM_WORKERS=1"]
    main(second)
    interrupt(tmp_path / "second", "model_0000001")
    with pytest.raises(UserError, match=r"already holds a run; pass --resume"):
        main(second)
    main([*second, "--resume"])
    resumed = final_state(tmp_path / "second")
    assert resumed["iteration"] == whole["iteration"] == 3
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    assert json.loads((tmp_path / "second/results.json").read_text()) == results

    weights = tmp_path / "out/model_final.pth"
    main([*command[:-1], "--eval-only", f"OUTPUT_DIR={tmp_path / 'third'}", f"MODEL.WEIGHTS={weights}"])
    assert json.loads((tmp_path / "third/results.json").read_text()) == results
    assert not list((tmp_path / "third").glob("*.pth"))


def interrupt(folder, checkpoint):
    """Leave a run as it was when `checkpoint` was the last."""
    for path in folder.glob("model_*.pth"):
        if path.stem != checkpoint:
            path.unlink()
    (folder / "last_checkpoint").write_text(f"{checkpoint}.pth")


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("first")

    def die(data, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("second")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.pth", "last_checkpoint"]


def fails_with_one_line(words, capsys, monkeypatch):
    """Run the tool's main as its command line does; returns the error line."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main(words))
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("error: ") or "Traceback" in line]
    assert stopped.value.code == 2
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_RL=1"], "unknown key SOLVER.BASE_RL (did you mean SOLVER.BASE_LR?)"),
        (["SOLVER.IMS_PER_BATCH=9"], "SOLVER.IMS_PER_BATCH is 9, but the training set has only 5 images"),
        (["MODEL.WEIGHTS=nowhere.pth"], "MODEL.WEIGHTS: "),
        (["--eval-only"], "MODEL.WEIGHTS is empty"),
        (["--train-json", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--num-gpus", "99"], "--num-gpus 99: this machine has"),
        (["OUTPUT_DIR=/proc/no"], "OUTPUT_DIR: can not write in /proc/no"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, command, capsys, monkeypatch, words, message):
    assert message in fails_with_one_line([*command, *words], capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("annotations"), "no list 'annotations'"),
        (lambda content: content["images"][0].update(file_name="../1.png"), "file_name '../1.png' leads out"),
    ],
)
def test_a_bad_coco_file_is_one_line_and_writes_nothing(tmp_path, command, capsys, monkeypatch, damage, message):
    _, images, content = write_coco(tmp_path / "bad")
    damage(content)
    words = [*command, "--train-json", str(save(tmp_path / "bad", content)), "--train-images", str(images)]
    assert message in fails_with_one_line(words, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_training_is_named(tmp_path, command, capsys, monkeypatch, workers):
    """Whole at its end, so that the check before training passes, but not what it says it is."""
    for path in (tmp_path / "data/images").iterdir():
        path.write_bytes(b"not an image IEND\xaeB`\x82")
    line = fails_with_one_line([*command, f"DATALOADER.NUM_WORKERS={workers}"], capsys, monkeypatch)
    assert ".png: can not be used: " in line


def test_half_a_pair_of_paths_is_refused(command, capsys, monkeypatch):
    line = fails_with_one_line(["--config-file", command[1], "--train-json", command[3]], capsys, monkeypatch)
    assert "--train-json and --train-images belong together" in line


def test_without_data_the_flags_are_named(command, capsys, monkeypatch):
    assert "--train-json" in fails_with_one_line(command[:2], capsys, monkeypatch)
    line = fails_with_one_line([*command[:2], "DATASETS.TRAIN=('nothing',)"], capsys, monkeypatch)
    assert "no data set 'nothing' is registered" in line
    line = fails_with_one_line([*command[:2], "DATASETS.TRAIN=('coco_2017_train',)"], capsys, monkeypatch)
    assert "DETECTRON2_DATASETS" in line


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(tmp_path, command, capsys, monkeypatch):
    line = fails_with_one_line([*command, "SOLVER.BASE_LR=1e30"], capsys, monkeypatch)
    assert "training diverged at iteration 1: " in line
    assert "Lower SOLVER.BASE_LR" in line


def test_resuming_with_other_settings_or_a_torn_checkpoint_is_refused(tmp_path, command, capsys, monkeypatch):
    """What only says where and how long to train may change."""
    main([*command, "SOLVER.MAX_ITER=1"])
    run = tmp_path / "out"
    before = (run / "run.json").read_bytes()
    for word, change in [
        ("SEED=1", "SEED was 0, now 1"),
        ("SOLVER.IMS_PER_BATCH=1", "SOLVER.IMS_PER_BATCH was 2, now 1"),
        ("MODEL.VIT.DEPTH=3", "MODEL.VIT.DEPTH was 2, now 3"),
    ]:
        line = fails_with_one_line([*command, "--resume", word], capsys, monkeypatch)
        assert line.endswith(f"holds a run with other settings: {change}")
    path, images, _ = write_coco(tmp_path / "other", images=4)
    words = [*command, "--resume", "--train-json", str(path), "--train-images", str(images)]
    line = fails_with_one_line(words, capsys, monkeypatch)
    assert "SHA-256 of the json of own_coco_train was '" in line
    assert "number of training images was 5, now 4" in line

    longer = [*command, "--resume", "SOLVER.MAX_ITER=2", "SOLVER.CHECKPOINT_PERIOD=1", "TEST.DETECTIONS_PER_IMAGE=4"]
    final = run / "model_final.pth"
    whole = final.read_bytes()
    final.write_bytes(whole[: len(whole) // 2])
    line = fails_with_one_line(longer, capsys, monkeypatch)
    assert f"{final}: can not be read: " in line
    assert (run / "run.json").read_bytes() == before
    final.write_bytes(whole)
    main(longer)
    assert final_state(run)["iteration"] == 1

    (run / "run.json").write_text("{")
    assert "run.json is missing or damaged" in fails_with_one_line(longer, capsys, monkeypatch)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("first")
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 1), str(tmp_path))
    with pytest.raises(UserError, match=r"is of another model than the config: 2 tensors .* like weight"):
        checkpointer.load(checkpointer.get_checkpoint_file())


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # detectron2 calls it to say so
def test_a_detector_that_finds_nothing_has_results_for_boxes_and_masks(tmp_path, command):
    cfg = load_det_config(command[1], [command[-1], "MODEL.ROI_HEADS.SCORE_THRESH_TEST=1.0"])
    use_own_data(cfg, None, (command[3], command[5]))
    results = evaluate(cfg, build_model(cfg))
    assert set(results) == {"bbox", "segm"}
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["bbox"]["AP"] is written["segm"]["AP"] is None


def test_resume_without_a_checkpoint_starts_and_says_so(tmp_path, command, caplog):
    caplog.set_level("INFO")
    cfg = load_det_config(command[1], command[-1:])
    assert Trainer._find_checkpoint(FakeTrainer(cfg), resume=True) is False
    assert "--resume: no checkpoint in" in caplog.text


class FakeTrainer:
    def __init__(self, cfg):
        self.cfg = cfg
        self.checkpointer = AtomicCheckpointer(torch.nn.Linear(1, 1), cfg.OUTPUT_DIR)


def test_the_table_shows_what_is_not_defined_as_a_dash():
    table = format_results({"bbox": {"AP": 51.64, "AP50": 70.0, "AP75": math.nan, "AP-cat": math.nan}})
    assert table.splitlines() == [
        "           AP    AP50    AP75",
        "box      51.6    70.0       -",
        "",
        "class  box AP",
        "cat         -",
    ]


def test_the_command_line_is_frozen():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--config-file", "--num-gpus", "--eval-only", "--resume",
        "--train-json", "--train-images", "--val-json", "--val-images",
    }  # fmt: skip
