"""Data sets of the pipeline: VOC as it is published, and the drawn VOC."""
