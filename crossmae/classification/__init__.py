"""What a pretrained encoder is worth for telling classes apart: fine-tuning, linear probes, nearest neighbours."""
