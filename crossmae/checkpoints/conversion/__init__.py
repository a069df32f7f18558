"""Conversion: write the layout of another library, and check that the written encoder gives the same tokens."""

# Layouts that can be written, and the tolerance of the proof. They are here, because a command line shows them before
# torch is imported. `crossmae.checkpoints.conversion.targets` writes the layouts.
LAYOUTS = {
    "crossmae": "this toolkit's CrossMAE model, encoder or classifier (.pth: the layout of the published files)",
    "mae": "the same for MAE models",
    "timm": "timm's VisionTransformer: a file for checkpoint_path=, or a folder for local-dir:",
    "hf-vit": "transformers' ViTModel or ViTForImageClassification: a folder for from_pretrained",
    "hf-vitmae": "transformers' ViTMAEModel or ViTMAEForPreTraining: a folder for from_pretrained",
    "detectron2": "the backbone of detectron2's ViTDet, for MODEL.WEIGHTS",
}
TOLERANCE = 1e-5
