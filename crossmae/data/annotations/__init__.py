"""Annotations of any tool, read into COCO form: COCO, YOLO, Pascal VOC, LabelMe and masks as PNG files."""
