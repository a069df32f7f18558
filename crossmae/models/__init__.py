"""The models: CrossMAE and MAE, their layers, masking, positions and sizes. Torch and timm only."""
