"""The batches that `det.train` makes of records, for the tests of `det`."""

from det.data.loader import build_train_loader, training_samples


def train_batches(cfg, records, first=0, workers=0, rank=0, world_size=1):
    """The batches of `det.train` from step `first` on."""
    steps = range(first, cfg.SOLVER.MAX_ITER)
    samples = training_samples(cfg, records)
    batch = cfg.SOLVER.IMS_PER_BATCH
    return build_train_loader(samples, batch, steps, workers=workers, rank=rank, world_size=world_size)
