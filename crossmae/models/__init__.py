"""The models: the CrossMAE and MAE networks, their layers, masking, positions and named sizes; torch and timm only."""
