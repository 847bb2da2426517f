"""Small runs of the pipeline: sizes of the drawn scenes, and what a row holds."""

SIZES = {"train": 40, "val": 30, "test": 30}

COLUMNS = {
    "method",
    "known",
    "seed",
    "mAP",
    "mAP_interpolated",
    "OF1",
    "CF1",
    "CF1_per_class",
    "best_epoch_mAP",
    "expected_positives",
}
