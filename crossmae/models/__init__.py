"""The models: CrossMAE and MAE, with layers, masking, position embeddings and sizes. Needs only torch and timm."""
