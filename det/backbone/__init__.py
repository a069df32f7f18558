"""The backbone: CrossMAE's encoder as ViTDet's, its feature pyramid and its weights."""
