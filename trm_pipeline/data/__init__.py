"""Data sets of the pipeline, each as it is published, the drawn VOC, and published partial labels."""
