"""Classification training: fine-tuning and linear probing of an encoder."""
