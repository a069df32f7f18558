"""Backbone: CrossMAE's encoder in ViTDet's form, its feature pyramid and its weights."""
