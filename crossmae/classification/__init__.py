"""Classification with a pretrained encoder: fine-tuning, linear probes, nearest neighbours."""
