"""Pretrain a ViT with CrossMAE or MAE on a folder of images, a list, a COCO json, tar shards, a Hugging Face data set.

CPU, to see it work (2 steps):
    python tools/pretrain.py --config-file pretrain/small.yaml data.train=IMAGES output_dir=OUT schedule.max_steps=2
One GPU:
    python tools/pretrain.py --config-file pretrain/small.yaml data.train=IMAGES output_dir=OUT
Eight GPUs:
    torchrun --standalone --nproc-per-node 8 tools/pretrain.py --config-file pretrain/crossmae_vitb.yaml \\
        data.train=IMAGES output_dir=OUT
Two nodes, the same on both:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 tools/pretrain.py \\
        --config-file pretrain/crossmae_vitb.yaml data.train=IMAGES output_dir=OUT optim.batch_size=256
The same command with --resume continues from the last complete checkpoint.
All settings: crossmae/pretraining/config.py and crossmae/training/config.py.
"""

from __future__ import annotations

import argparse
import logging
import os

from crossmae.errors import run_cli, set_up_log
from crossmae.pretraining.config import load_config
from crossmae.training.config import add_config_arguments


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, load the config and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    arguments = parser.parse_intermixed_args(argv)
    is_main = os.environ.get("RANK", "0") == "0"  # other processes log only warnings
    set_up_log(logging.INFO if is_main else logging.WARNING)
    config = load_config(arguments.config_file, arguments.overrides)

    # Imported after the arguments, because these imports take seconds.
    from crossmae.pretraining.train import pretrain

    pretrain(config, resume=arguments.resume)


if __name__ == "__main__":
    run_cli(main)
