"""Holds forty faults and bad inputs, over all trainers where they apply: each is run here, or held by a named test.

`RUN` has the cases that end a trainer in its first second: one line on stderr with the told parts, exit code 2, and
nothing written. `HELD` names the tests that hold a case for every trainer, or for one. Each case needs every trainer.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from crossmae.errors import USER_ERROR_EXIT_CODE, run_cli
from crossmae.models.crossmae import create_model
from tests.crossmae.classification.labelled import write_classes
from tests.det.coco_files import TINY, write_coco
from tools import finetune, pretrain, train_net

ROOT = Path(__file__).parents[2]
MODEL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
ALL = ("pretrain", "finetune", "detect")

# Number: what happens, and the trainers that it can happen to.
CASES: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("weights do not fit the model", ALL),
    2: ("the number of classes differs", ("finetune", "detect")),
    3: ("a path is missing, or has an unexpanded variable", ALL),
    4: ("not enough memory", ALL),
    5: ("a truncated image", ALL),
    6: ("a loss or gradient that is not finite", ALL),
    7: ("killed while saving", ALL),
    8: ("resumed with other settings", ALL),
    9: ("resumed data, masks or augmentations differ", ALL),
    10: ("the best score is lost on resume", ("finetune", "detect")),
    11: ("SIGTERM, also in an evaluation, with workers", ALL),
    12: ("an official checkpoint with an argparse namespace", ALL),
    13: ("positions of another grid or patch size", ("finetune", "detect")),
    14: ("category ids with gaps, zeros or text", ("detect",)),
    15: ("images without annotations", ("detect",)),
    16: ("masks are missing", ("detect",)),
    17: ("boxes without area, outside, NaN or corners", ("detect",)),
    18: ("degenerate polygons", ("detect",)),
    19: ("the size of an image differs from the json", ("detect",)),
    20: ("grey, palette, alpha, CMYK, 16-bit, animated files", ALL),
    21: ("stray files in class folders", ALL),
    22: ("training and validation have other classes", ("finetune", "detect")),
    23: ("missing images, unknown and repeated ids", ("detect",)),
    24: ("an unknown key, a wrong type, out of range", ALL),
    25: ("fewer images than a batch", ALL),
    26: ("a killed worker", ALL),
    27: ("one process dies while others wait", ALL),
    28: ("a full disk", ALL),
    29: ("a corrupt checkpoint", ALL),
    30: ("AP without predictions or ground truth", ("detect",)),
    31: ("a huge image", ALL),
    32: ("sides that are no multiple of the patch", ALL),
    33: ("ratios that leave no patch", ("pretrain",)),
    34: ("another channel order or range than in pretraining", ("finetune", "detect")),
    35: ("code in a pickle", ALL),
    36: ("weights with NaN", ALL),
    37: ("two runs in one folder", ALL),
    38: ("a folder that cannot be written, odd names", ALL),
    39: ("a parameter without a gradient", ALL),
    40: ("another environment: no GPU, no detectron2", ALL),
}


class Payload:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images for each trainer, their configs, and weights that fit and do not fit."""
    home = tmp_path_factory.mktemp("sound")
    write_coco(home / "data")
    for split in ("train", "val"):
        write_classes(home / split, per_class=2)
    runtime: dict[str, Any] = {"schedule": {"epochs": 1, "warmup_epochs": 0}, "runtime": {"device": "cpu"}}
    runtime |= {"output_dir": "OUT", "optim": {"batch_size": 2}}
    model = {"name": "crossmae_vit_tiny_patch16", "img_size": 32, "patch_size": 8, **MODEL, **DECODER}
    config = {**runtime, "data": {"train": "data/images", "workers": 0}, "model": model}
    (home / "pretrain.yaml").write_text(yaml.safe_dump(config))
    model = {"name": "vit_tiny_patch16", "img_size": 32, "patch_size": 8, **MODEL}
    config = {**runtime, "data": {"train": "train", "val": "val", "workers": 0}, "model": model}
    (home / "finetune.yaml").write_text(yaml.safe_dump(config))
    (home / "detect.yaml").write_text(TINY)
    sizes = {"img_size": 32, "patch_size": 8, **MODEL, **DECODER}
    other = create_model("crossmae_vit_tiny_patch16", **{**sizes, "embed_dim": 32})
    save_file(other.state_dict(), home / "other.safetensors")
    tensors = create_model("crossmae_vit_tiny_patch16", **sizes).state_dict()
    tensors["patch_embed.proj.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, home / "nan.safetensors")
    (home / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (home / "code.pkl").write_bytes(pickle.dumps({"model": Payload()}))
    (home / "file").touch()
    return home


def call(trainer: str, words: list[str]) -> Callable[[], None]:
    if trainer == "detect":
        images = [] if "--train-json" in words else ["--train-json", "data/coco.json"]
        words = ["--config-file", "detect.yaml", *images, "--train-images", "data/images", "OUTPUT_DIR=OUT", *words]
        return lambda: train_net.main(words)
    tool = {"pretrain": pretrain, "finetune": finetune}[trainer]
    return lambda: tool.main(["--config-file", f"{trainer}.yaml", *words])


def truncate(home: Path) -> None:
    for path in (home / "data/images/3.png", home / "train/red/1.png"):
        path.write_bytes(path.read_bytes()[:100])


def enlarge(home: Path) -> None:
    for path in (home / "data/images/3.png", home / "train/red/1.png"):
        Image.new("RGB", (80, 80)).save(path)


def nothing(home: Path) -> None:
    pass


INIT = {"pretrain": "model.init", "finetune": "model.init", "detect": "MODEL.WEIGHTS"}
IMAGE = {"pretrain": "data/images/3.png", "finetune": "train/red/1.png", "detect": "data/images/3.png"}


def start_from(file: str, *told: str) -> dict[str, tuple[Any, list[str], list[str]]]:
    return {trainer: (nothing, [f"{key}={file}"], [file, *told]) for trainer, key in INIT.items()}


Run = tuple[Callable[[Path], None], list[str], list[str]]  # what is spoilt, the words, what the error must tell
RUN: dict[int, dict[str, Run]] = {
    1: {
        "pretrain": (nothing, ["model.init=other.safetensors"], ["other.safetensors", "embed_dim", "32"]),
        "finetune": (nothing, ["model.init=other.safetensors"], ["other.safetensors", "embed_dim", "32"]),
        "detect": (nothing, ["MODEL.WEIGHTS=other.safetensors"], ["other.safetensors", "MODEL.VIT.EMBED_DIM", "32"]),
    },
    3: {
        "pretrain": (nothing, ["data.train='${UNSET}/x'"], ["data.train", "${UNSET} was not expanded"]),
        "finetune": (nothing, ["data.val=nowhere"], ["data.val", "nowhere", "nearest folder"]),
        "detect": (nothing, ["--train-json", "${UNSET}/x.json"], ["${UNSET}/x.json", "${UNSET} was not expanded"]),
    },
    5: {trainer: (truncate, [], [path]) for trainer, path in IMAGE.items()},
    24: {
        "pretrain": (nothing, ["optim.learning_rate=1"], ["optim.learning_rate"]),
        "finetune": (nothing, ["optim.lr=-1"], ["optim.lr", "greater than 0"]),
        "detect": (nothing, ["MODEL.VIT.DEPHT=3"], ["MODEL.VIT.DEPHT", "MODEL.VIT.DEPTH"]),
    },
    25: {
        "pretrain": (nothing, ["optim.batch_size=9"], ["optim.batch_size", "9", "5"]),
        "finetune": (nothing, ["optim.batch_size=9"], ["optim.batch_size", "9", "6"]),
        "detect": (nothing, ["SOLVER.IMS_PER_BATCH=9"], ["SOLVER.IMS_PER_BATCH", "9", "5"]),
    },
    29: start_from("page.pth", "web page"),
    31: {
        "pretrain": (enlarge, ["data.max_pixels=5000"], ["data/images/3.png", "80 x 80", "data.max_pixels"]),
        "finetune": (enlarge, ["data.max_pixels=5000"], ["train/red/1.png", "80 x 80", "data.max_pixels"]),
        "detect": (enlarge, ["INPUT.MAX_PIXELS=5000"], ["data/images/3.png", "80 x 80", "INPUT.MAX_PIXELS"]),
    },
    32: {
        "pretrain": (nothing, ["model.img_size=30"], ["img_size", "30", "8"]),
        "finetune": (nothing, ["model.img_size=30"], ["img_size", "30", "8"]),
        "detect": (nothing, ["MODEL.VIT.SQUARE_PAD=70"], ["MODEL.VIT.SQUARE_PAD", "70", "8"]),
    },
    33: {"pretrain": (nothing, ["model.mask_ratio=75"], ["mask_ratio", "75"])},
    35: start_from("code.pkl", "mkdir"),
    36: start_from("nan.safetensors", "patch_embed.proj.weight"),
    38: {
        "pretrain": (nothing, ["output_dir=file/run"], ["output_dir", "file"]),
        "finetune": (nothing, ["output_dir=file/run"], ["output_dir", "file"]),
        "detect": (nothing, ["OUTPUT_DIR=file/run"], ["OUTPUT_DIR", "file"]),
    },
    40: {
        "pretrain": (nothing, ["runtime.device=cuda:77"], ["runtime.device", "cuda"]),
        "finetune": (nothing, ["runtime.device=cuda:77"], ["runtime.device", "cuda"]),
        "detect": (nothing, ["MODEL.DEVICE=cuda:77"], ["MODEL.DEVICE", "cuda"]),
    },
}

DET, CORE, DATA, READ = "det/", "crossmae/training/", "crossmae/data/", "crossmae/checkpoints/reading/"
KILLS, RANKS, SIGNALS = (f"faults/test_{name}.py::test_" for name in ("kills", "ranks", "signals"))
TRAIN, TUNE = f"{DET}training/test_train.py::test_", "crossmae/classification/train/test_train.py::test_"
COCO, CHECKS = f"{DET}data/test_coco.py::test_", f"{DET}data/test_coco_checks.py::test_"
IMAGES, FOUND = f"{DATA}test_images.py::test_", f"{CHECKS}a_fault_is_found_with_its_ids_and_nothing_else"
RECORDS = "crossmae/checkpoints/test_run_checkpoint.py::test_"
# Number: trainer ("all": one mechanism for all of them) and the tests that hold the case.
HELD: dict[int, dict[str, list[str]]] = {
    1: {"all": ["crossmae/checkpoints/test_weights.py::test_nothing_in_common_is_an_error"]},
    2: {
        "finetune": [f"{TUNE}another_set_of_classes_is_not_the_same_run"],
        "detect": [f"{COCO}a_number_of_classes_that_is_not_that_of_the_data_is_refused"],
    },
    4: {"all": ["crossmae/test_errors.py::test_the_users_trouble_is_one_line"]},
    5: {"all": [f"{CORE}test_loop.py::test_broken_images_are_replaced_counted_and_listed_and_the_budget_holds"]},
    6: {
        "all": [f"{CORE}test_state.py::test_a_loss_that_is_not_finite_stops_before_anything_is_saved"],
        "detect": [f"{TRAIN}a_gradient_that_is_not_finite_ends_the_run_before_the_update"],
    },
    7: {"all": [f"{KILLS}a_killed_run_resumes_to_the_unbroken_one"]},
    8: {
        "pretrain": [f"{CORE}test_resume.py::test_a_used_folder_needs_resume_and_the_same_settings"],
        "finetune": [f"{TUNE}what_does_not_decide_may_change_on_resume_and_what_does_may_not"],
        "detect": [f"{TRAIN}resuming_with_other_settings_is_refused"],
    },
    9: {
        "pretrain": [f"{CORE}test_loop.py::test_resume_is_exact_to_the_bit"],
        "finetune": [f"{TUNE}resume_is_exact_to_the_bit_and_knows_the_best_score"],
        "detect": [f"{TRAIN}a_run_repeats_and_resumes_bit_for_bit"],
    },
    10: {
        "finetune": [f"{TUNE}best_and_last_weights_are_kept_and_the_best_score_survives_a_restart"],
        "detect": [f"{TRAIN}an_evaluation_that_was_cut_off_is_made_up"],
    },
    11: {"all": [f"{SIGNALS}a_signal_saves_the_run_and_nothing_is_lost"]},
    12: {"all": [f"{READ}test_unpickle.py::test_settings_of_a_run_are_skipped"]},
    13: {"all": ["crossmae/checkpoints/test_resample.py::test_sizes_that_do_not_go"]},
    14: {"detect": [f"{COCO}zero_ids_work", f"{COCO}ids_that_are_text_are_known_by_their_numbers"]},
    15: {"detect": [f"{COCO}no_annotations_are_nothing_to_train_on_but_can_be_evaluated",
                    f"{DET}data/test_loader.py::test_an_image_without_objects_has_no_targets"]},
    16: {"detect": [f"{COCO}mask_training_needs_masks"]},
    17: {"detect": [FOUND, f"{DET}data/test_coco_fit.py::test_boxes_of_another_frame_are_explained_by_their_masks"]},
    18: {"detect": [FOUND, f"{COCO}the_last_polygon_takes_the_annotation_with_it"]},
    19: {"detect": [f"{CHECKS}notes_say_which_size_is_whose"]},
    20: {"all": [f"{IMAGES}modes_become_rgb_by_the_stated_rules"]},
    21: {"all": [f"{DATA}test_found_names.py"], "finetune": ["cases/test_folders.py::test_labels_of_a_data_set"]},
    22: {"finetune": ["crossmae/classification/test_data.py::test_labels_meet_by_name_and_not_by_position"],
         "detect": [f"{DET}test_classes.py::test_categories_are_found_by_name"]},
    23: {"detect": [FOUND, f"{COCO}many_missing_images_are_counted_and_five_named"]},
    26: {"all": [f"{DATA}test_workers.py"]},
    27: {"all": [f"{RANKS}processes_end_together_and_the_cause_is_the_last_line"]},
    28: {"all": ["crossmae/files/test_writing.py::test_a_full_disk_is_one_line_from_any_library"]},
    29: {"all": [f"{RECORDS}latest_complete_wins_over_a_zoo_of_bad_entries",
                 f"{READ}test_corruption.py::test_corruptions"]},
    30: {"detect": [f"{DET}evaluation/test_scoring.py::test_finding_nothing_is_zero_where_there_is_something_to_find",
                    f"{DET}evaluation/test_evaluate.py::test_without_annotations_false_alarms_are_counted"]},
    34: {"finetune": ["crossmae/classification/probe/test_features.py"],
         "detect": [f"{DET}backbone/test_weights.py::test_other_pixels_than_in_pretraining_are_refused"]},
    35: {"all": [f"{READ}test_unpickle.py::test_payloads_never_run", f"{RECORDS}state_is_read_without_running_code"],
         "detect": [f"{TRAIN}resuming_runs_nothing_that_is_in_a_folder"]},
    36: {"all": [f"{CORE}test_state.py::test_weights_that_are_not_finite_are_never_saved"]},
    37: {"all": ["crossmae/files/test_claim.py::test_a_second_run_is_refused_at_once_by_name"]},
    38: {"all": ["tools/test_odd_names.py::test_detection"]},
    39: {
        "pretrain": ["crossmae/models/test_crossmae.py::test_every_trainable_parameter_gets_a_finite_gradient"],
        "finetune": ["crossmae/classification/test_vit.py::test_groups_are_those_of_timm"],
        "detect": [f"{DET}backbone/test_parity.py::test_losses_and_all_gradients_are_equal"],
    },
    40: {"all": ["crossmae/test_doctor.py::test_runs_where_nothing_is_installed"]},
}  # fmt: skip


def test_every_case_is_held_for_every_trainer() -> None:
    assert list(CASES) == list(range(1, 41))
    for number, (title, trainers) in CASES.items():
        held = {*RUN.get(number, {}), *HELD.get(number, {})}
        lacking = [trainer for trainer in trainers if trainer not in held and "all" not in held]
        assert not lacking, f"{number} {title}: {lacking}"


@pytest.mark.parametrize("node", sorted({node for held in HELD.values() for nodes in held.values() for node in nodes}))
def test_a_named_test_exists(node: str) -> None:
    file, _, name = node.partition("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), node


@pytest.mark.parametrize(("number", "trainer"), [(number, trainer) for number, runs in RUN.items() for trainer in runs])
def test_a_case_is_one_line(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    number: int, trainer: str,
) -> None:  # fmt: skip
    prepare, words, told = RUN[number][trainer]
    home = shutil.copytree(sound, tmp_path / "home")
    monkeypatch.chdir(home)
    monkeypatch.delenv("UNSET", raising=False)
    prepare(home)
    before = sorted(home.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        run_cli(call(trainer, words))
    assert exit_info.value.code == USER_ERROR_EXIT_CODE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert [part for part in told if part not in lines[0]] == [], lines[0]
    assert sorted(home.rglob("*")) == before
