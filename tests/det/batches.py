"""The training set and the batches that `det.train` makes of records, for the tests of `det`."""

from det.data.copy_paste import build_copy_paste
from det.data.loader import KeyedSamples, NamingMapper, build_train_loader


def train_samples(cfg, records):
    """The training set that `det.train` makes of some records."""
    paste = cfg.INPUT.COPY_PASTE
    copy_paste = build_copy_paste(paste.ENABLED, paste.PROB, cfg.MODEL.PIXEL_MEAN)
    return KeyedSamples(records, NamingMapper(cfg, True), cfg.SEED, copy_paste)


def train_batches(cfg, records, first=0, workers=0, rank=0, world_size=1):
    """The batches of `det.train` from step `first` on."""
    steps = range(first, cfg.SOLVER.MAX_ITER)
    samples = train_samples(cfg, records)
    batch = cfg.SOLVER.IMS_PER_BATCH
    return build_train_loader(samples, batch, steps, workers=workers, rank=rank, world_size=world_size)
