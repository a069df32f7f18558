"""Pretrain a ViT with CrossMAE or MAE on a folder of images.

A laptop, to see it work (2 steps):
    python tools/pretrain.py --config-file pretrain/demo.yaml data.train=IMAGES output_dir=OUT \\
        schedule.max_steps=2
One GPU:
    python tools/pretrain.py --config-file pretrain/crossmae_vitb16.yaml data.train=IMAGES output_dir=OUT
The same command with --resume goes on from the last complete checkpoint.
"""

from __future__ import annotations

import argparse
import logging

from crossmae.config import load_config
from crossmae.errors import run_cli


def main(argv: list[str] | None = None) -> None:
    """Parse, build, call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="NAME", help="a YAML file, or its name under configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in output_dir")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file"
    )
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(arguments.config_file, arguments.overrides)

    from crossmae.train import pretrain  # after the config is known to be good: this import takes seconds

    pretrain(config, resume=arguments.resume)


if __name__ == "__main__":
    run_cli(main)
