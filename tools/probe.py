"""Probe frozen features: nearest neighbours, linear probe, logistic regression, few labelled images per class.

    python tools/probe.py --config-file probe.yaml weights=FILE data.train=TRAIN data.val=VAL output_dir=OUT
    python tools/probe.py --config-file probe.yaml weights=FILE data.train=TRAIN data.val=VAL output_dir=OUT \\
        'methods=[knn]' features.pool=cls features.block=-2
    python tools/probe.py --config-file probe.yaml weights=null model.name=crossmae_vit_base_patch16 \\
        data.train=TRAIN data.val=VAL output_dir=BASELINE

TRAIN and VAL are labelled images: a folder with one subfolder per class, or another source with labels. FILE is the
folder of a run, or a weight file with a ViT encoder. Features are extracted once and kept in OUT/features. The outputs
are results.json, with all numbers and settings, and report.html. crossmae/classification/probe/config.py describes all
settings.
"""

from __future__ import annotations

import argparse

from crossmae.classification.probe.config import ProbeRunConfig
from crossmae.errors import printable, run_cli, set_up_log
from crossmae.training.config import add_config_arguments, load_typed_config


def main(argv: list[str] | None = None) -> None:
    """Read the command line, probe, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace the results of an earlier call")
    arguments = parser.parse_intermixed_args(argv)
    set_up_log()
    config = load_typed_config(ProbeRunConfig, arguments.config_file, arguments.overrides)

    # Imported after the arguments, because these imports take seconds.
    from crossmae.classification.probe.probe import PAGE, RESULTS, probe
    from crossmae.classification.probe.report import table

    results = probe(config, force=arguments.force)
    print(table(results))
    print(f"\nnumbers in {printable(config.output_dir / RESULTS)}, page in {printable(config.output_dir / PAGE)}")


if __name__ == "__main__":
    run_cli(main)
