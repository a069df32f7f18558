"""Training: one loop for every trainer, with its schedule, log, optimizer, devices, processes and signals."""
