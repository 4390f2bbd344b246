"""What a run tells about itself before it starts."""

from collections.abc import Sequence

from dataset.loader import TrainingSet
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
            f"{bucket.items} items of {bucket.width * VAE_STRIDE}x{bucket.height * VAE_STRIDE} in {bucket.batches} "
            f"batches, {bucket.frames} frames",
        )
        for bucket in training_set.buckets
    ]
    held_back = len(training_set.validation.items)
    return [*rows, ("validation", f"{held_back} items")] if held_back else rows
