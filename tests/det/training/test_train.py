"""Training: layer decay, repeatable and bit-exactly resumable runs, atomic checkpoints, evaluation, one-line errors."""

import json
import logging
import math
import os
import pickle
import signal
import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")


from det.training.hooks import keep_best

from crossmae.errors import UserError, run_cli
from det.training.checkpoint import AtomicCheckpointer, last_checkpoint
from det.training.steps import StepTrainer
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
def no_pictures(monkeypatch):
    """Draw neither report nor pictures nor curves, which take seconds and have tests of their own."""
    for name in ("det.training.train", "det.training.hooks"):
        monkeypatch.setattr(sys.modules[name], "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(sys.modules["det.evaluation.evaluate"], "validation_pictures", lambda *_: [])
    monkeypatch.setattr(sys.modules["det.evaluation.evaluate"], "save_figure", lambda *_: None)


@pytest.fixture
def command(tmp_path):
    """The words of a command line for a tiny run in tmp_path / "out"."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    path, images, _ = write_coco(tmp_path / "data")
    words = ["--config-file", str(tmp_path / "tiny.yaml"), "--train-json", str(path), "--train-images", str(images)]
    return [*words, "--val-json", str(path), "--val-images", str(images), f"OUTPUT_DIR={tmp_path / 'out'}"]


def final_state(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_objects_outside_their_images_stop_a_run_before_anything_is_written(tmp_path, command, monkeypatch):
    """Should the checks of the file ever miss what is wrong with them."""
    monkeypatch.setattr("det.data.coco.find_faults", lambda *_, **__: [])
    path = tmp_path / "data/coco.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["bbox"][0] += 100
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="of 10 objects in 5 images, only 0 are left before any augmentation: 10 boxes"):
        main(command)
    assert not (tmp_path / "out").exists()


def test_a_run_repeats_and_resumes_bit_for_bit(tmp_path, command, capsys, request):
    """Drop path and the sampling of boxes included; whatever the workers; then evaluation alone gives the same AP."""
    main(command)
    printed = capsys.readouterr().out
    whole = final_state(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("events")) == [
        "config.yaml", "inference", "last_checkpoint", "log.txt", "metrics.json", "model_0000001.pth",
        "model_0000003.pth", "model_best.json", "model_best.pth", "model_final.pth", "pictures", "report.html",
        "results.json", "run.json",
    ]  # fmt: skip
    report = (tmp_path / "out/report.html").read_text()
    assert "Detector: out" in report
    assert 'class="card missing"' not in report
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {"bbox", "segm"} <= set(results)
    assert {"AP", "AP50", "AP75", "AP-a", "AP-b"} <= set(results["bbox"])
    assert json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert printed.splitlines()[0].split() == ["AP", "AP50", "AP75"]
    assert {line.split()[0] for line in printed.splitlines() if line.strip()} >= {"box", "mask", "class", "a", "b"}

    request.getfixturevalue("no_pictures")
    second = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'second'}", "DATALOADER.NUM_WORKERS=1"]
    main(second)
    interrupt(tmp_path / "second", "model_0000001")
    with pytest.raises(UserError, match=r"already has a run. Continue it with --resume"):
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


@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_an_average_and_parts_resumes_bit_for_bit(tmp_path, command, caplog):
    """And keeps the newest checkpoints, the best weights by mask AP, and evaluates the average."""
    caplog.set_level("INFO")
    words = [
        "SOLVER.EMA.ENABLED=True",
        "SOLVER.ACCUMULATE=2",
        "SOLVER.CHECKPOINT_PERIOD=1",
        "SOLVER.CHECKPOINTS_KEPT=2",
    ]
    words += ["SOLVER.CLIP_GRADIENTS.ENABLED=True", "TEST.EVAL_PERIOD=2"]
    main([*command, *words])
    run = tmp_path / "out"
    whole = final_state(run)
    assert sorted(path.name for path in run.glob("model_*.pth")) == [
        "model_0000002.pth", "model_0000003.pth", "model_best.pth", "model_final.pth",
    ]  # fmt: skip
    assert any(not torch.equal(whole["model"][name], value) for name, value in whole["trained_model"].items())
    assert "4 steps of 2 images in 2 parts: 1.6 epochs of 5 images; learning rate 0.001" in caplog.text

    record = json.loads((run / "model_best.json").read_text())
    results = [line for line in map(json.loads, (run / "metrics.json").read_text().splitlines()) if "segm/AP" in line]
    assert len(results) == 2
    best = max(results, key=lambda line: line["segm/AP"])
    assert record["segm/AP"] == pytest.approx(best["segm/AP"])
    kept = torch.load(run / "model_best.pth", weights_only=True)
    assert kept["iteration"] == record["iteration"] == (4 if best["iteration"] > 2 else 2)
    assert "optimizer" not in kept

    second = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'second'}", *words]
    main(second)
    interrupt(tmp_path / "second", "model_0000002")
    main([*second, "--resume"])
    resumed = final_state(tmp_path / "second")
    for key in ("model", "trained_model"):
        for name, tensor in whole[key].items():
            assert torch.equal(resumed[key][name], tensor), name

    final = ["--eval-only", f"OUTPUT_DIR={tmp_path / 'third'}", f"MODEL.WEIGHTS={run / 'model_final.pth'}"]
    main([*command[:-1], *final])
    assert json.loads((tmp_path / "third/results.json").read_text()) == json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("values", "best"), [([3.0, 5.0, 4.0], 2), ([float("nan"), 1.0, 1.0], 2), ([2.0, 9.0, 10.0], 3)]
)
def test_the_best_weights_are_those_of_the_highest_mask_ap(tmp_path, values, best):
    """The first of equals; NaN is no record; a run that goes on knows the record of the one that was cut off."""
    model = torch.nn.Linear(1, 1)
    for number, value in enumerate(values):
        torch.nn.init.constant_(model.weight, number + 1)
        checkpointer = AtomicCheckpointer(model, str(tmp_path))
        keep_best(checkpointer, {"bbox": {"AP": 100.0 - value}, "segm": {"AP": value}}, number + 1)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["model"]["weight"].item() == best
    assert json.loads((tmp_path / "model_best.json").read_text()) == {"iteration": best, "segm/AP": values[best - 1]}


@pytest.mark.usefixtures("no_pictures")
def test_a_run_without_a_checkpoint_yet_is_a_run(tmp_path, command):
    """Another is not laid over it, and --resume begins it anew, without the record of what is lost."""
    run = tmp_path / "out"
    main([*command, "SOLVER.MAX_ITER=1"])
    for path in [*run.glob("model_*.pth"), run / "last_checkpoint"]:
        path.unlink()
    (run / "model_best.json").write_text('{"iteration": 1, "segm/AP": 99.0}')
    with pytest.raises(UserError, match=r"already has a run. Continue it with --resume"):
        main([*command, "SOLVER.MAX_ITER=1"])
    main([*command, "SOLVER.MAX_ITER=1", "--resume"])
    assert json.loads((run / "model_best.json").read_text())["segm/AP"] < 99
    assert "1 steps of 2 images" in (run / "log.txt").read_text()  # logged before there is a folder
    main([*command, "SOLVER.MAX_ITER=3", "--resume"])
    with pytest.raises(UserError, match="3 steps are done already, of 2"):
        main([*command, "SOLVER.MAX_ITER=2", "--resume"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_between_two_steps_and_the_run_goes_on_bit_for_bit(
    tmp_path, command, monkeypatch, request, number, end
):
    main(command)
    whole = final_state(tmp_path / "out")
    step = StepTrainer.run_step

    def step_and_signal(self):
        step(self)
        if self.iter == 2:
            os.kill(os.getpid(), number)

    second = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'second'}"]
    # The shell may have told this process to ignore Ctrl-C, which a run respects.
    before = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, before))
    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "run_step", step_and_signal)
        with pytest.raises(end):
            main(second)
    assert (tmp_path / "second/last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "second/results.json").exists()
    main([*second, "--resume"])
    for name, tensor in whole["model"].items():
        assert torch.equal(final_state(tmp_path / "second")["model"][name], tensor), name


@pytest.mark.usefixtures("no_pictures")
def test_checkpoints_of_before_a_resume_are_not_kept_for_ever(tmp_path, command):
    words = [*command, "SOLVER.CHECKPOINT_PERIOD=1", "SOLVER.CHECKPOINTS_KEPT=2"]
    main([*words, "SOLVER.MAX_ITER=3"])
    main([*words, "SOLVER.MAX_ITER=5", "--resume"])
    assert sorted(path.name for path in (tmp_path / "out").glob("model_0*.pth")) == [
        "model_0000003.pth", "model_0000004.pth",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_evaluation_does_not_write_over_the_results_of_a_training(tmp_path, command):
    """Named by its folder, for the config as for the weights."""
    main([*command, "SOLVER.MAX_ITER=1"])
    run = tmp_path / "out"
    before = (run / "results.json").read_bytes()
    _, images, content = write_coco(tmp_path / "other", images=2)
    val = ["--val-json", str(save(tmp_path / "other", content)), "--val-images", str(images)]
    main(["--config-file", str(run), "--eval-only", *val, f"MODEL.WEIGHTS={run}"])
    assert (run / "results.json").read_bytes() == before
    again = json.loads((run / "evaluation/results.json").read_text())
    assert [one["objects"] for one in again["classes"]] == [2, 2]


def interrupt(folder, checkpoint):
    """Leave a run as it was when `checkpoint` was the last."""
    for path in folder.glob("model_*.pth"):
        if path.stem != checkpoint:
            path.unlink()
    (folder / "last_checkpoint").write_text(f"{checkpoint}.pth")


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000000")

    def die(data, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_0000001")
    assert last_checkpoint(tmp_path) == tmp_path / "model_0000000.pth"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000000.pth"]


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
        (["SOLVER.BASE_RL=1"], "unknown key SOLVER.BASE_RL. Did you mean SOLVER.BASE_LR?"),
        (
            ["SOLVER.ACCUMULATE=4"],
            "SOLVER.IMS_PER_BATCH: 2 images cannot be divided over 1 processes and SOLVER.ACCUMULATE 4",
        ),
        (["SOLVER.IMS_PER_BATCH=9"], "SOLVER.IMS_PER_BATCH: 9 is more than the 5 training images"),
        (["MODEL.WEIGHTS=nowhere.pth"], "MODEL.WEIGHTS: "),
        (["--eval-only"], "MODEL.WEIGHTS is empty"),
        (["--eval-only", "--resume"], "--eval-only and --resume contradict each other"),
        (["--train-json", "nowhere.json"], "nowhere.json: no such file"),
        (["--num-gpus", "99"], "--num-gpus 99: this machine has"),
        (["OUTPUT_DIR=/proc/no"], "OUTPUT_DIR: cannot write in /proc/no"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, command, capsys, monkeypatch, words, message):
    assert message in fails_with_one_line([*command, *words], capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_training_is_named(tmp_path, command, capsys, monkeypatch, workers):
    """After the check before training, which would have found it."""

    def damage(*_):
        for path in (tmp_path / "data/images").iterdir():
            path.write_bytes(b"no image any more")

    monkeypatch.setattr(sys.modules["det.training.train"], "load_weights", damage)
    line = fails_with_one_line([*command, f"DATALOADER.NUM_WORKERS={workers}"], capsys, monkeypatch)
    assert ".png: cannot be read as an image: not an image" in line


def test_without_data_the_flags_are_named(command, capsys, monkeypatch):
    assert "--train-json" in fails_with_one_line(command[:2], capsys, monkeypatch)
    line = fails_with_one_line([*command[:2], "--train-json", command[3]], capsys, monkeypatch)
    assert "--train-json and --train-images belong together" in line
    line = fails_with_one_line([*command[:2], "DATASETS.TRAIN=('nothing',)"], capsys, monkeypatch)
    assert "no data set 'nothing' is registered" in line
    line = fails_with_one_line([*command[:2], "DATASETS.TRAIN=('coco_2017_train',)"], capsys, monkeypatch)
    assert "DETECTRON2_DATASETS" in line


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(tmp_path, command, capsys, monkeypatch):
    """Also in the last step, which is not evaluated then."""
    line = fails_with_one_line([*command, "SOLVER.BASE_LR=1e30", "SOLVER.MAX_ITER=2"], capsys, monkeypatch)
    assert "training diverged at iteration 1: " in line
    assert "Lower SOLVER.BASE_LR" in line
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.usefixtures("no_pictures")
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
        assert line.endswith(f"settings of the run have changed: {change}. Restore them, or start a new run.")
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
    assert f"{final}: truncated or damaged" in line
    assert line.endswith(f"Name an older checkpoint in {run / 'last_checkpoint'}.")
    assert (run / "run.json").read_bytes() == before
    final.write_bytes(whole)
    main(longer)
    assert final_state(run)["iteration"] == 1

    (run / "run.json").write_text("{")
    assert "run.json is missing or damaged" in fails_with_one_line(longer, capsys, monkeypatch)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.usefixtures("no_pictures")
def test_resuming_runs_nothing_that_is_in_a_checkpoint(tmp_path, command, capsys, monkeypatch):
    """Neither in a pickle that `last_checkpoint` names nor in a file with the name of a checkpoint."""
    run, sentinel = tmp_path / "out", tmp_path / "sentinel"
    main([*command, "SOLVER.MAX_ITER=1"])
    content = torch.load(run / "model_final.pth", weights_only=True)
    for name in ("payload.pkl", "model_final.pkl", "model_0000007.pkl"):
        (run / name).write_bytes(pickle.dumps({"model": Payload(sentinel), "__author__": "x"}))
        (run / "last_checkpoint").write_text(name)
        line = fails_with_one_line([*command, "--resume"], capsys, monkeypatch)
        assert f"{run / 'last_checkpoint'}: '{name}' is not the name of a checkpoint. " in line
    path = run / "model_0000007.pth"
    (run / "last_checkpoint").write_text(path.name)
    for write in (
        lambda: torch.save(content | {"extra": Payload(sentinel)}, path),
        lambda: path.write_bytes(pickle.dumps({"model": Payload(sentinel)}, protocol=2)),
    ):
        write()
        line = fails_with_one_line([*command, "--resume"], capsys, monkeypatch)
        assert line.startswith(f"error: {path}: ")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not the name of a checkpoint. Write the name"),
        ("\0\xff" * 500, "is not the name of a checkpoint"),
        ("model_0000001.pth\nmodel_0000002.pth", "is not the name of a checkpoint"),
        ("../model_0000001.pth", "is not the name of a checkpoint"),
        ("/etc/model_0000001.pth", "is not the name of a checkpoint"),
        ("model_best.pth", "is not the name of a checkpoint"),
        ("model_000000\u0661.pth", "is not the name of a checkpoint"),
        ("model_0000001.pth", "model_0000001.pth does not exist. Write the name"),
        ("model_0000002.pth", "model_0000002.pth is a link to a file outside"),
    ],
)
def test_last_checkpoint_names_one_checkpoint_of_its_folder(tmp_path, text, message):
    folder = tmp_path / "out"
    folder.mkdir()
    torch.save({}, tmp_path / "model_0000001.pth")
    (folder / "model_0000002.pth").symlink_to("../model_0000001.pth")
    torch.save({}, folder / "model_best.pth")
    (folder / "last_checkpoint").write_text(text)
    with pytest.raises(UserError) as raised:
        last_checkpoint(folder)
    assert str(raised.value).startswith(f"{folder / 'last_checkpoint'}: ")
    assert message in str(raised.value)


def test_last_checkpoint_may_be_written_by_hand(tmp_path):
    assert last_checkpoint(tmp_path) is None
    torch.save({}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert last_checkpoint(tmp_path) == tmp_path / "model_0000001.pth"


@pytest.mark.parametrize("content", [[], {}, {"model": []}, {"trainer": {}, "model": None}])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "model_0000001.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"^{path}: has no model.* no checkpoint of a training run\. Name an older"):
        AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).load(str(path))


WEIGHT = "roi_heads.mask_head.predictor.weight"


@pytest.mark.usefixtures("no_pictures")
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, command, capsys, monkeypatch):
    """Neither to train on from, nor to evaluate, nor on --resume, where the average is checked, too."""
    run, average = tmp_path / "out", "SOLVER.EMA.ENABLED=True"
    main([*command, average, "SOLVER.MAX_ITER=1"])
    path = run / "model_final.pth"
    content = torch.load(path, weights_only=True)
    message = f"{path}: 1 of {len(content['model'])} tensors hold NaN or infinity: {WEIGHT}"
    for part in ("model", "trained_model"):
        damaged = content | {part: content[part] | {WEIGHT: content[part][WEIGHT].clone()}}
        damaged[part][WEIGHT][0, 0] = math.nan
        torch.save(damaged, path)
        assert message in fails_with_one_line([*command, average, "--resume"], capsys, monkeypatch)
        if part == "model":
            words = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'new'}", f"MODEL.WEIGHTS={path}"]
            assert message in fails_with_one_line(words, capsys, monkeypatch)
            assert message in fails_with_one_line([*words, "--eval-only"], capsys, monkeypatch)
    assert not (tmp_path / "new").exists()


def spoil_step(monkeypatch, method, iteration, spoil):
    """Call `spoil` with the detector after `method` of a step, once."""
    original = getattr(StepTrainer, method)

    def spoiled(self, *args):
        result = original(self, *args)
        if self.iter == iteration:
            spoil(self.model)
        return result

    monkeypatch.setattr(StepTrainer, method, spoiled)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(tmp_path, command, capsys, monkeypatch, parts):
    """In one part of a step already; the checkpoint of before stays the last, and nothing is evaluated."""

    def spoil(model):
        model.get_parameter(WEIGHT).grad[0, 0] = math.nan

    spoil_step(monkeypatch, "_backward", 3, spoil)
    line = fails_with_one_line([*command, f"SOLVER.ACCUMULATE={parts}"], capsys, monkeypatch)
    assert "training diverged at iteration 3: the norm of the gradient is nan: 1 of " in line
    assert f"tensors hold NaN or infinity: {WEIGHT}. Lower SOLVER.BASE_LR" in line
    run = tmp_path / "out"
    assert [path.name for path in run.glob("model_*")] == ["model_0000001.pth"]
    assert (run / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (run / "results.json").exists()


@pytest.mark.parametrize("spoiled", ["model", "average"])
@pytest.mark.parametrize("tensor", ["weight", "running_var"])
def test_no_file_gets_weights_that_are_not_finite(tmp_path, spoiled, tensor):
    """Parameters and buffers, of the model and of its average; the checkpoint of before stays the last."""
    models = {name: torch.nn.BatchNorm1d(2) for name in ("model", "average")}
    checkpointer = AtomicCheckpointer(models["model"], str(tmp_path), models["average"])
    checkpointer.save("model_0000000")
    models[spoiled].state_dict()[tensor][1] = math.inf
    with pytest.raises(UserError, match=rf"model_0000001.pth: not written, because 1 of 5 .*: {tensor} "):
        checkpointer.save("model_0000001")
    with pytest.raises(UserError, match=r"model_best.pth: not written") if spoiled == "average" else nullcontext():
        keep_best(checkpointer, {"bbox": {"AP": 1.0}}, 1)
    names = {"last_checkpoint", "model_0000000.pth"}
    names |= set() if spoiled == "average" else {"model_best.json", "model_best.pth"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model_0000000")
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 1), str(tmp_path))
    with pytest.raises(UserError, match=r"does not fit the config: 2 tensors .* such as weight"):
        checkpointer.load(str(last_checkpoint(tmp_path)))


def test_the_command_line_is_frozen():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--config-file", "--num-gpus", "--eval-only", "--resume",
        "--train-json", "--train-images", "--val-json", "--val-images",
    }  # fmt: skip
