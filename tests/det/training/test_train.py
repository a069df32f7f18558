"""Training: layer decay, repeatable and bit-exactly resumable runs, atomic checkpoints, evaluation, one-line errors."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")


from crossmae.checkpoints.formats.training_record import recorded_training
from crossmae.checkpoints.run_checkpoint import complete_checkpoints, read_state, step_of
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.errors import UserError, run_cli
from crossmae.files import sha256
from crossmae.training.state import TrainingState
from det.training.evaluations import is_best
from tests.det.coco_files import save, write_coco
from tools.train_net import build_parser, main


def final_state(folder):
    return read_weights(folder / "model_final.safetensors")


def steps(run):
    return [step_of(folder) for folder in complete_checkpoints(run)]


def interrupt(run, step):
    """Leave a run as it was when the checkpoint of `step` was the last."""
    (run / "model_final.safetensors").unlink()
    for folder in complete_checkpoints(run):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def assert_same_end(one, other):
    """Compare the last checkpoints of two runs, bit for bit."""
    ends = [complete_checkpoints(run)[-1] for run in (one, other)]
    tensors = [load_file(end / "model.safetensors") for end in ends]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    states = [dict(flatten(read_state(end))) for end in ends]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        same = torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key]
        assert same, key


def flatten(value, prefix=""):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield prefix, value
    for key, inner in pairs or ():
        yield from flatten(inner, f"{prefix}.{key}")


def rows(run):
    """The lines of the log without times."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    varying = {"images_per_second", "data_wait_share", "memory_gb"}
    return [{key: value for key, value in row.items() if key not in varying} for row in found]


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".claim.json", ".claim.lock",
        "checkpoints", "config.yaml", "inference", "log.jsonl", "log.txt", "model_best.json", "model_best.safetensors",
        "model_final.safetensors", "pictures", "report.html", "results.json", "run.json", "tensorboard",
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
    interrupt(tmp_path / "second", 2)
    with pytest.raises(UserError, match=r"already holds a run .* Pass --resume"):
        main(second)
    main([*second, "--resume"])
    assert_same_end(tmp_path / "out", tmp_path / "second")
    assert final_state(tmp_path / "second").metadata["step"] == "4"
    assert rows(tmp_path / "second") == rows(tmp_path / "out")
    assert json.loads((tmp_path / "second/results.json").read_text()) == results

    weights = tmp_path / "out/model_final.safetensors"
    main([*command[:-1], "--eval-only", f"OUTPUT_DIR={tmp_path / 'third'}", f"MODEL.WEIGHTS={weights}"])
    assert json.loads((tmp_path / "third/results.json").read_text()) == results
    assert not list((tmp_path / "third").glob("*.safetensors"))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_an_average_and_parts_resumes_bit_for_bit(tmp_path, command, caplog, monkeypatch):
    """And keeps the newest checkpoints, the best weights by mask AP, evaluates the average, and estimates its time."""
    caplog.set_level("INFO")
    monkeypatch.setattr(sys.modules["crossmae.training.log"], "TIMED_STEPS", 1)
    monkeypatch.setattr(sys.modules["crossmae.training.log"], "TIMED_SECONDS", 0.0)
    words = [
        "SOLVER.EMA.ENABLED=True",
        "SOLVER.ACCUMULATE=2",
        "SOLVER.CHECKPOINT_PERIOD=1",
        "SOLVER.CHECKPOINTS_KEPT=2",
    ]
    words += ["SOLVER.CLIP_GRADIENTS.ENABLED=True", "TEST.EVAL_PERIOD=2"]
    main([*command, *words])
    run = tmp_path / "out"
    assert steps(run) == [3, 4]
    trained = load_file(run / "checkpoints/step-00000004/model.safetensors")
    whole = final_state(run).tensors  # the average
    assert any(not torch.equal(trained[name], value) for name, value in whole.items())
    assert "4 steps of 2 images in 2 parts: 1.6 epochs of 5 images; learning rate 0.001" in caplog.text
    assert re.search(r"for the remaining 2 steps and 1 evaluation on .*\); stop any time with Ctrl-C", caplog.text)

    record = json.loads((run / "model_best.json").read_text())
    results = [row for row in rows(run) if "segm/AP" in row]
    assert [row["step"] for row in results] == [2, 4]
    best = max(results, key=lambda row: row["segm/AP"])
    assert record["segm/AP"] == pytest.approx(best["segm/AP"])
    kept = read_weights(run / "model_best.safetensors")
    assert int(kept.metadata["step"]) == record["iteration"] == best["step"]
    figures = {key: value for key, value in best.items() if key.startswith(("bbox/", "segm/")) and "AP-" not in key}
    figures["loss"] = next(row["loss"] for row in rows(run) if row["step"] == best["step"] and "loss" in row)
    told = recorded_training(kept.metadata)
    assert (told.figures, told.step) == (figures, best["step"])
    assert told.data["train"].images == 5

    second = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'second'}", *words]
    main(second)
    interrupt(tmp_path / "second", 3)
    main([*second, "--resume"])
    assert_same_end(run, tmp_path / "second")
    resumed = final_state(tmp_path / "second").tensors
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    final = ["--eval-only", f"OUTPUT_DIR={tmp_path / 'third'}", f"MODEL.WEIGHTS={run / 'model_final.safetensors'}"]
    main([*command[:-1], *final])
    assert json.loads((tmp_path / "third/results.json").read_text()) == json.loads((run / "results.json").read_text())


@pytest.mark.parametrize(
    ("values", "best"), [([3.0, 5.0, 4.0], 2), ([math.nan, 1.0, 1.0], 2), ([2.0, 9.0, 10.0], 3), ([math.nan], None)]
)
def test_the_best_weights_are_those_of_the_highest_mask_ap(values, best):
    """The first of equals; NaN is no record."""
    kept = {}
    found = [
        step
        for step, value in enumerate(values, start=1)
        if is_best(kept, {"bbox": {"AP": 100.0 - value}, "segm": {"AP": value}}, step)
    ]
    assert (found[-1] if found else None) == best
    assert kept == ({"best": {"iteration": best, "segm/AP": values[best - 1]}} if best else {})


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_that_was_cut_off_is_made_up(tmp_path, command, monkeypatch):
    """The checkpoint of its step is there; best weights and log rows are those of the unbroken run."""
    words = ["SOLVER.CHECKPOINT_PERIOD=2", "TEST.EVAL_PERIOD=2"]
    main([*command, *words])
    for number, step in ((1, 2), (2, 4)):
        second = [*command[:-1], *words, f"OUTPUT_DIR={tmp_path / str(step)}"]
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["det.evaluation.evaluate"], "predict", failing_at(number, patch))
            with pytest.raises(RuntimeError, match="cut off"):
                main(second)
        assert steps(tmp_path / str(step))[-1] == step
        main([*second, "--resume"])
        assert_same_end(tmp_path / "out", tmp_path / str(step))
        assert rows(tmp_path / str(step)) == rows(tmp_path / "out")
        bests = [read_weights(run / "model_best.safetensors") for run in (tmp_path / "out", tmp_path / str(step))]
        assert bests[0].metadata == bests[1].metadata
        assert all(torch.equal(tensor, bests[1].tensors[name]) for name, tensor in bests[0].tensors.items())


def failing_at(number, _):
    """detection of evaluation `number` is cut off."""
    original, calls = sys.modules["det.evaluation.evaluate"].predict, []

    def predict(*args):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("cut off")
        return original(*args)

    return predict


@pytest.mark.usefixtures("no_pictures")
def test_a_complete_run_is_not_run_again(tmp_path, command, caplog):
    caplog.set_level("INFO")
    run = tmp_path / "out"
    main([*command, "SOLVER.MAX_ITER=2"])
    before = (run / "log.jsonl").read_bytes()
    main([*command, "SOLVER.MAX_ITER=2", "--resume"])
    assert "the run is complete" in caplog.text
    assert (run / "log.jsonl").read_bytes() == before
    main([*command, "SOLVER.MAX_ITER=3", "--resume"])
    assert final_state(run).metadata["step"] == "3"
    assert "2 steps of 2 images" in (run / "log.txt").read_text()  # logged before there is a folder


@pytest.mark.usefixtures("no_pictures")
def test_a_run_is_shortened_and_continues_exactly(tmp_path, command, caplog):
    """4 steps of 2 of 5 images end after 3, which are 1.2 epochs; a rate that was to fall falls earlier."""
    caplog.set_level("INFO")
    run, other = tmp_path / "out", tmp_path / "other"
    words = [*command[:-1], "SOLVER.CHECKPOINT_PERIOD=1", "SOLVER.CHECKPOINTS_KEPT=0", "SOLVER.STEPS=(3,)"]
    main([*words, f"OUTPUT_DIR={run}"])
    planned = [row["lr"] for row in rows(run) if "lr" in row]
    interrupt(run, 1)
    with pytest.raises(UserError, match=r"^SOLVER.SHORTEN_TO: 0.4 would end the run at step 1, but it has done 1 of"):
        main([*words, f"OUTPUT_DIR={run}", "SOLVER.SHORTEN_TO=0.4", "--resume"])
    main([*words, f"OUTPUT_DIR={run}", "SOLVER.SHORTEN_TO=1.2", "--resume"])
    assert "SOLVER.SHORTEN_TO: the run ends after step 3, not 4. From step 1 on" in caplog.text
    assert "3 steps of 2 images: 1.2 epochs of 5 images" in (run / "log.txt").read_text()
    assert final_state(run).metadata["step"] == "3"
    # Steps 0, 1 and 2 have the rates of 0, 1 and 2.5.
    assert [row["lr"] for row in rows(run) if "lr" in row] == [planned[0], planned[1], planned[2]]
    shutil.copytree(run, other)
    interrupt(other, 2)
    main([*words, f"OUTPUT_DIR={other}", "--resume"])
    assert_same_end(run, other)
    assert rows(run) == rows(other)
    interrupt(other, 2)
    with pytest.raises(UserError, match=r"a run of 4 steps that was shortened, and the settings are for 9\. Repeat"):
        main([*words, f"OUTPUT_DIR={other}", "SOLVER.MAX_ITER=9", "--resume"])


@pytest.mark.usefixtures("no_pictures")
def test_a_signal_stops_a_run_and_its_evaluation(tmp_path, command, monkeypatch, request):
    """The run saves between two steps, or before the evaluation, and goes on bit for bit."""
    main([*command, "TEST.EVAL_PERIOD=2"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have told to ignore Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for number, end, module, name, step in (
        (signal.SIGINT, KeyboardInterrupt, "crossmae.training.state", "scaled_step", 3),
        (signal.SIGTERM, SystemExit, "crossmae.training.state", "scaled_step", 3),
        (signal.SIGTERM, SystemExit, "det.evaluation.evaluate", "coco_results", 2),
    ):
        run = tmp_path / f"{number}-{name}"
        second = [*command[:-1], "TEST.EVAL_PERIOD=2", f"OUTPUT_DIR={run}"]
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[module], name, signalling(getattr(sys.modules[module], name), number, step))
            with pytest.raises(end):
                main(second)
        assert steps(run)[-1] == step
        assert not (run / "model_final.safetensors").exists()
        main([*second, "--resume"])
        assert_same_end(tmp_path / "out", run)
        assert rows(run) == rows(tmp_path / "out")


def signalling(original, number, call):
    """Send a signal to this process in one call of a function."""
    calls = []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    return signalled


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
            "SOLVER.IMS_PER_BATCH: 2 images cannot be divided over 1 process and SOLVER.ACCUMULATE 4",
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


def test_a_run_that_diverges_ends_with_one_line(tmp_path, command, capsys, monkeypatch):
    """It is not evaluated then. The images of the step are named."""
    line = fails_with_one_line([*command, "SOLVER.BASE_LR=1e30", "SOLVER.MAX_ITER=2"], capsys, monkeypatch)
    assert line.startswith("error: SOLVER.BASE_LR: training diverged after step 1 (learning rate 1e+30): ")
    assert "Lower SOLVER.BASE_LR" in line
    assert len(re.findall(r"images/\d+\.png", line)) == 2
    assert not (tmp_path / "out/results.json").exists()
    assert not (tmp_path / "out/model_final.safetensors").exists()


@pytest.mark.usefixtures("no_pictures")
def test_resuming_with_other_settings_is_refused(tmp_path, command, capsys, monkeypatch):
    """What only says where and how long to train may change."""
    main([*command, "SOLVER.MAX_ITER=1"])
    run = tmp_path / "out"
    before = (run / "run.json").read_bytes()
    longer = [*command, "--resume", "SOLVER.MAX_ITER=2", "SOLVER.CHECKPOINT_PERIOD=1", "TEST.DETECTIONS_PER_IMAGE=4"]
    for word, change in [
        ("SEED=1", "SEED was 0, is 1"),
        ("SOLVER.IMS_PER_BATCH=1", "SOLVER.IMS_PER_BATCH was 2, is 1"),
        ("MODEL.VIT.DEPTH=3", "MODEL.VIT.DEPTH was 2, is 3"),
    ]:
        line = fails_with_one_line([*longer, word], capsys, monkeypatch)
        assert f"is of a run with other settings: {change}. Repeat those settings" in line
        assert line.endswith("or name another OUTPUT_DIR.")
    path, images, _ = write_coco(tmp_path / "other", images=4)
    line = fails_with_one_line([*longer, "--train-json", str(path), "--train-images", str(images)], capsys, monkeypatch)
    assert "SHA-256 of the json of own_coco_train was " in line
    assert "number of training images was 5, is 4" in line
    assert (run / "run.json").read_bytes() == before
    main(longer)
    assert final_state(run).metadata["step"] == "2"


@pytest.mark.usefixtures("no_pictures")
def test_the_folder_of_a_pretraining_is_refused_by_its_kind(tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".claim.json").write_text('{"kind": "pretraining"}')
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match=r"OUTPUT_DIR: .* is the folder of a pretraining run, not of detection\."):
            main([*command, *more])


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(tmp_path, command, caplog):
    """Torn or with a flipped bit; the end is that of the unbroken run."""
    words = ["SOLVER.CHECKPOINT_PERIOD=1", "SOLVER.CHECKPOINTS_KEPT=0"]
    main([*command, *words])
    second = [*command[:-1], *words, f"OUTPUT_DIR={tmp_path / 'second'}"]
    main(second)
    run = tmp_path / "second"
    (run / "model_final.safetensors").unlink()
    torn, flipped = run / "checkpoints/step-00000004/state.pt", run / "checkpoints/step-00000003/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 1
    flipped.write_bytes(data)
    main([*second, "--resume"])
    assert "step-00000004: state.pt has" in caplog.text
    assert "step-00000003: model.safetensors has another SHA-256" in caplog.text
    assert_same_end(tmp_path / "out", run)
    assert rows(run) == rows(tmp_path / "out")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.usefixtures("no_pictures")
def test_resuming_runs_nothing_that_is_in_a_folder(tmp_path, command, capsys, monkeypatch):
    """detectron2's loader and its `last_checkpoint` are never used."""
    run, sentinel = tmp_path / "out", tmp_path / "sentinel"

    def never(*_, **__):
        raise AssertionError("detectron2's checkpointer is reached")

    monkeypatch.setattr(sys.modules["fvcore.common.checkpoint"].Checkpointer, "load", never)
    monkeypatch.setattr(sys.modules["fvcore.common.checkpoint"].Checkpointer, "_load_file", never)
    run.mkdir()
    for name in ("payload.pkl", "model_final.pkl", "../payload.pkl", "model_0000007.pth"):
        (run / name).write_bytes(pickle.dumps({"model": Payload(sentinel), "__author__": "x"}))
        (run / "last_checkpoint").write_text(name)
        line = fails_with_one_line([*command, "--resume"], capsys, monkeypatch)
        assert "has weights of detectron2 or of an earlier version, which cannot be continued. Start a new" in line
    shutil.rmtree(run)
    main([*command, "SOLVER.MAX_ITER=1"])
    path = run / "checkpoints/step-00000001/state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"extra": Payload(sentinel)}, path)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"]["state.pt"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest.write_text(json.dumps(content))
    line = fails_with_one_line([*command, "SOLVER.MAX_ITER=2", "--resume"], capsys, monkeypatch)
    assert line.startswith(f"error: {path}: ")
    assert not sentinel.exists()


WEIGHT = "roi_heads.mask_head.predictor.weight"


@pytest.mark.usefixtures("no_pictures")
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, command, capsys, monkeypatch):
    """Neither to train on from, nor to evaluate."""
    run = tmp_path / "out"
    main([*command, "SOLVER.MAX_ITER=1"])
    path = run / "model_final.safetensors"
    weights = read_weights(path)
    message = f"{path}: 1 of {len(weights.tensors)} tensors hold NaN or infinity: {WEIGHT}"
    broken = weights.tensors[WEIGHT].clone()
    broken[0, 0] = math.nan
    save_weights(path, weights.tensors | {WEIGHT: broken}, weights.metadata, force=True)
    words = [*command[:-1], f"OUTPUT_DIR={tmp_path / 'new'}", f"MODEL.WEIGHTS={path}"]
    assert message in fails_with_one_line(words, capsys, monkeypatch)
    assert message in fails_with_one_line([*words, "--eval-only"], capsys, monkeypatch)
    assert not (tmp_path / "new").exists()


def spoil(monkeypatch, method, call, change):
    """Change the model of the training state after one call of a method."""
    original, calls = getattr(TrainingState, method), []

    def spoiled(self, *args):
        result = original(self, *args)
        calls.append(1)
        if len(calls) == call:
            change(self.model)
        return result

    monkeypatch.setattr(TrainingState, method, spoiled)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(tmp_path, command, capsys, monkeypatch, parts):
    """In one part of a step already; the checkpoint of before stays the last, and nothing is evaluated."""

    def change(model):
        model.get_parameter(WEIGHT).grad[0, 0] = math.nan

    spoil(monkeypatch, "forward_backward", 3 * parts + 1, change)
    line = fails_with_one_line([*command, f"SOLVER.ACCUMULATE={parts}"], capsys, monkeypatch)
    assert "training diverged after step 3 (learning rate 0.001): the norm of the gradient is nan (1 of " in line
    assert f"tensors hold NaN or infinity: {WEIGHT}), with the images " in line
    run = tmp_path / "out"
    assert steps(run) == [2]
    assert not (run / "results.json").exists()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("tensor", [WEIGHT, "backbone.net.pos_embed"])
def test_no_file_gets_weights_that_are_not_finite(tmp_path, command, capsys, monkeypatch, tensor):
    """The checkpoint of before stays the last; nothing is evaluated or written."""
    spoil(
        monkeypatch,
        "update",
        4,
        lambda model: model.state_dict().get(tensor, model.get_parameter(WEIGHT)).fill_(math.inf),
    )
    line = fails_with_one_line(command, capsys, monkeypatch)
    assert "training diverged after step 4 (learning rate 0.001): a weight is not finite (model: 1 of " in line
    run = tmp_path / "out"
    assert steps(run) == [2]
    assert not list(run.glob("model_*"))


def test_the_command_line_is_frozen():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    assert options == {
        "-h", "--help", "--config-file", "--num-gpus", "--eval-only", "--resume",
        "--train-json", "--train-images", "--val-json", "--val-images",
    }  # fmt: skip
