"""Fine-tune a pretrained encoder for classification, or evaluate a classifier.

CPU, for a short test (2 steps):
    python tools/finetune.py --config-file finetune/small.yaml model.init=WEIGHTS data.train=IMAGES data.val=HELD_OUT \\
        output_dir=OUT schedule.max_steps=2
One GPU:
    python tools/finetune.py --config-file finetune/small.yaml model.init=WEIGHTS data.train=IMAGES data.val=HELD_OUT \\
        output_dir=OUT
Eight GPUs:
    torchrun --standalone --nproc-per-node 8 tools/finetune.py --config-file finetune/vitb.yaml model.init=WEIGHTS \\
        data.train=IMAGES data.val=HELD_OUT output_dir=OUT
Evaluation only, with the best weights of a run or with a file:
    python tools/finetune.py --config-file finetune/small.yaml --eval-only RUN data.val=HELD_OUT output_dir=OUT

IMAGES and HELD_OUT have labels: a folder per class, a list with a label column, or tar shards (docs/classification.md).
WEIGHTS is the folder of a pretraining run, or a file in any format that the toolkit reads. The same command with
--resume continues from the last complete checkpoint. crossmae/classification/train/config.py describes all settings.
"""

from __future__ import annotations

import argparse
import logging
import os

from crossmae.classification.train.config import FinetuneConfig
from crossmae.errors import UserError, run_cli, set_up_log
from crossmae.training.config import add_config_arguments, load_typed_config


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, then train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    parser.add_argument("--eval-only", metavar="WEIGHTS", help="evaluate a classifier's file, or a run, on data.val")
    parser.add_argument("--force", action="store_true", help="replace the results of an earlier --eval-only")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and arguments.eval_only:
        raise UserError("--resume: has no meaning with --eval-only, which does not train. Give one of them.")
    if arguments.force and not arguments.eval_only:
        raise UserError("--force: is for --eval-only, because a run is never replaced. Continue it with --resume.")
    is_main = os.environ.get("RANK", "0") == "0"  # other processes log only problems
    set_up_log(logging.INFO if is_main else logging.WARNING)
    config = load_typed_config(FinetuneConfig, arguments.config_file, arguments.overrides)

    # Imported after the arguments, because these imports take seconds.
    if arguments.eval_only:
        from crossmae.classification.evaluation.evaluate import evaluate_only
        from crossmae.training.log import describe

        images, settings, runtime = config.data, config.evaluation, config.runtime
        how = (config.optim.batch_size, runtime.device, runtime.precision, arguments.force)
        scores = evaluate_only(arguments.eval_only, config.output_dir, images, settings, *how)
        if is_main:
            print(describe(scores.numbers()))
    else:
        from crossmae.classification.train.train import finetune

        finetune(config, resume=arguments.resume)


if __name__ == "__main__":
    run_cli(main)
