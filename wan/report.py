"""What a run tells about itself before it starts."""

from collections.abc import Sequence

from dataset.loader import BucketCount, TrainingSet
from wan.config import VAE_STRIDE


def start_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def dataset_rows(training_set: TrainingSet) -> list[tuple[str, str]]:
    """One row per dataset and size."""
    rows = [
        (
            f"dataset {bucket.dataset}",
            f"{bucket.items} items of {_sizes(bucket)} in {bucket.batches} batches, {bucket.frames} frames",
        )
        for bucket in training_set.buckets
    ]
    held_back = len(training_set.validation.items)
    return [*rows, ("validation", f"{held_back} items")] if held_back else rows


def _sizes(bucket: BucketCount) -> str:
    """`64x48`, or where frames differ in size those of all slots."""
    sizes = bucket.frame_sizes or [(bucket.height, bucket.width)]
    return ", ".join(f"{columns * VAE_STRIDE}x{rows * VAE_STRIDE}" for rows, columns in sizes)
