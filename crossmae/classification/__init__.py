"""Classification with a pretrained encoder: fine-tuning, linear probes, nearest neighbours."""

# Defaults of predictions. They are here, because a command line shows them before torch is imported.
TOP_K, BATCH_SIZE = 5, 32
LABEL_THRESHOLD = 0.5  # if an image can have several labels: smallest score of a predicted class
STDOUT = "-"  # stands for the terminal
