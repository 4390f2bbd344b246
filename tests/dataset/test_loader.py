import pytest
import torch

from dataset import cache, text_cache
from dataset.cache import LatentCache
from dataset.config import read_config
from dataset.loader import BatchItems, BatchLoader, TrainingBatch, TrainingSet, clip_for, load_batch, rank_slice
from utils.errors import ConfigError
from wan.frames.condition import stack_condition
from wan.frames.layout import OneFrameLayout
from wan.nets.conditioning import Conditioning

LAYOUT = OneFrameLayout((0,), 1)


def frame(name, height=2, width=4):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(16, 1, height, width, generator=generator).bfloat16()


def cached(layout, height=2, width=4):
    """An item whose control images are called 0, 1, ..."""
    controls = [frame(f"control {i}", height, width) for i in range(len(layout.control_indices))]
    return LatentCache(
        latents=layout.clip.stack([*controls, frame("target", height, width)]),
        conditioning=Conditioning(
            stack_condition(layout.clip, controls, frame("blank", height, width)),
            torch.stack([torch.full((257, 6), float(i)).half() for i in range(len(controls))]),
        ),
        layout=layout,
    )


def write(folder, stem, made=None, size=(32, 16), text=True):
    folder.mkdir(exist_ok=True)
    path = cache.latent_cache_path(folder, stem, size)
    cache.write_latent_cache(path, made or cached(LAYOUT))
    if text:
        text_cache.write_text_cache(text_cache.text_cache_path(folder, stem), torch.full((len(stem), 3), 0.5), stem)
    return path


def config(tmp_path, *datasets, general="resolution = [32, 16]"):
    """Datasets whose caches lie in folders 0, 1, ...; each is given as further TOML lines."""
    tables = [
        f'[[datasets]]\nimage_directory = "missing"\ncache_directory = "{(tmp_path / str(i)).as_posix()}"\n{lines}'
        for i, lines in enumerate(datasets)
    ]
    path = tmp_path / "train.toml"
    path.write_text("\n".join([f"[general]\n{general}", *tables]), encoding="utf-8")
    return read_config(path)


@pytest.fixture
def mixed(tmp_path):
    """Two datasets with two sizes and two numbers of control images: 5 x 2 + 4 items."""
    for stem in "abc":
        write(tmp_path / "0", stem)
    for stem in "de":
        write(tmp_path / "0", stem, cached(LAYOUT, height=4), size=(32, 32))
    for stem in "fghi":
        write(tmp_path / "1", stem, cached(OneFrameLayout((0, 2), 1)))
    buckets = "enable_bucket = true"
    return config(tmp_path, f"batch_size = 2\nnum_repeats = 2\n{buckets}", f"batch_size = 3\n{buckets}")


def keys(plans):
    return [[item.key for item in plan.items] for plan in plans]


def test_every_item_comes_once_per_repeat_in_batches_of_one_dataset_and_size(mixed):
    plans = TrainingSet(mixed, seed=1).epoch_batches(1)
    seen = sorted(key for batch in keys(plans) for key in batch)
    first = [
        f"0/{stem}_{size}/{i}"
        for stem, size in zip("abcde", ["0032x0016"] * 3 + ["0032x0032"] * 2, strict=True)
        for i in (0, 1)
    ]
    assert seen == sorted(first + [f"1/{stem}_0032x0016/0" for stem in "fghi"])
    assert sorted(map(len, keys(plans))) == [1, 2, 2, 2, 2, 2, 3]
    for plan in plans:
        assert load_batch(plan).latents.shape[0] == len(plan.items)  # stacking refuses mixed shapes
        assert len({item.key[0] for item in plan.items}) == 1


def test_the_order_depends_on_seed_and_epoch_alone(mixed):
    first = TrainingSet(mixed, seed=1)
    torch.manual_seed(5)
    assert keys(first.epoch_batches(2)) == keys(TrainingSet(mixed, seed=1).epoch_batches(2))
    orders = [keys(TrainingSet(mixed, seed).epoch_batches(epoch)) for seed in (1, 2) for epoch in (1, 2)]
    assert len({str(order) for order in orders}) == 4


def test_items_meet_others_in_other_epochs(mixed):
    training_set = TrainingSet(mixed, seed=1)
    partners = {frozenset(batch) for epoch in range(10) for batch in keys(training_set.epoch_batches(epoch))}
    assert len(partners) > 2 * len(training_set.epoch_batches(1))


def test_batches_of_the_datasets_are_mixed(mixed):
    training_set = TrainingSet(mixed, seed=1)
    firsts = {training_set.epoch_batches(epoch)[0].items[0].key[0] for epoch in range(20)}
    assert firsts == {"0", "1"}


def test_a_batch_holds_the_cached_tensors(tmp_path):
    path = write(tmp_path / "0", "ab", cached(OneFrameLayout((7, 3), 5)))
    (plan,) = TrainingSet(config(tmp_path, ""), seed=1).epoch_batches(1)
    batch, written = load_batch(plan), cache.read_latent_cache(path)
    assert torch.equal(batch.latents[0], written.latents.float())
    assert torch.equal(batch.conditioning.channels[0], written.conditioning.channels.float())
    assert torch.equal(batch.conditioning.clip[0], written.conditioning.clip.float())
    assert batch.layouts == (OneFrameLayout((7, 3), 5),)
    assert batch.frame_indices.tolist() == [[3, 5, 7]] and batch.frame_indices.dtype == torch.int64
    assert torch.equal(batch.text[0], torch.full((2, 3), 0.5))
    assert batch.item_keys == ("0/ab_0032x0016/0",) and batch.uniform is None


@pytest.mark.parametrize(("clean", "target"), [((0, 2), 1), ((2, 0), 1), ((5, 9), 0), ((9, 5), 20)])
def test_indices_of_the_toml_give_what_caching_with_them_would(tmp_path, clean, target):
    write(tmp_path / "0", "a", cached(OneFrameLayout((10, 3), 5)))
    lines = f"fp_1f_clean_indices = {list(clean)}\nfp_1f_target_index = {target}"
    training_set = TrainingSet(config(tmp_path, lines), seed=1)
    batch, wanted = load_batch(training_set.epoch_batches(1)[0]), cached(OneFrameLayout(clean, target))
    assert torch.equal(batch.latents[0], wanted.latents.float())
    assert torch.equal(batch.conditioning.channels[0], wanted.conditioning.channels.float())
    assert batch.layouts == (wanted.layout,) == tuple(training_set.layouts)
    assert batch.frame_indices.tolist() == [sorted((*clean, target))]


def test_another_number_of_indices_than_control_images_is_an_error(tmp_path):
    write(tmp_path / "0", "a")
    with pytest.raises(ConfigError, match=r"train\.toml: datasets\[0\]: 1 control image .*0;2.*a_0032x0016") as caught:
        TrainingSet(config(tmp_path, "fp_1f_clean_indices = [0, 2]\nfp_1f_target_index = 1"), seed=1)
    assert "\n" not in str(caught.value)


def test_layouts_come_most_frequent_first(tmp_path):
    for stem, layout in zip("abc", [OneFrameLayout((0,), 9), LAYOUT, LAYOUT], strict=True):
        write(tmp_path / "0", stem, cached(layout))
    assert TrainingSet(config(tmp_path, ""), seed=1).layouts == [LAYOUT, OneFrameLayout((0,), 9)]


def test_an_item_without_a_text_cache_is_skipped_with_a_warning(tmp_path, caplog):
    write(tmp_path / "0", "a")
    write(tmp_path / "0", "b", text=False)
    assert [item.key for item in TrainingSet(config(tmp_path, ""), seed=1).items] == ["0/a_0032x0016/0"]
    assert "1 cached items have no text cache" in caplog.text and "b_0032x0016" in caplog.text


@pytest.mark.parametrize("prepare", [lambda tmp_path: None, lambda tmp_path: write(tmp_path / "0", "a", text=False)])
def test_nothing_to_train_on_names_the_folders_and_both_commands(tmp_path, prepare):
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=r"wan_cache_latents\.py.*wan_cache_text_encoder_outputs\.py") as caught:
        TrainingSet(config(tmp_path, "", ""), seed=1)
    assert str(tmp_path / "0") in str(caught.value) and str(tmp_path / "1") in str(caught.value)


def test_another_size_than_the_toml_asks_for_is_used_with_a_warning(tmp_path, caplog):
    write(tmp_path / "0", "a", cached(LAYOUT, height=4, width=4))
    training_set = TrainingSet(config(tmp_path, ""), seed=1)
    assert load_batch(training_set.epoch_batches(1)[0]).latents.shape == (1, 16, 2, 4, 4)
    assert "a_0032x0016_wan.safetensors (32x32)" in caplog.text


def test_the_right_size_gives_no_warning(mixed, tmp_path, caplog):
    write(tmp_path / "0", "z", size=(64, 32))  # larger than its bucket of the same shape
    TrainingSet(config(tmp_path, ""), seed=1)
    assert "z_" not in caplog.text


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_file_is_found_before_training(tmp_path, kind):
    path = write(tmp_path / "0", "a") if kind == "latents" else None
    write(tmp_path / "0", "a")
    path = path or text_cache.text_cache_path(tmp_path / "0", "a")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=path.name):
        TrainingSet(config(tmp_path, ""), seed=1)


def test_a_cache_without_clip_features_is_refused(tmp_path):
    made = cached(LAYOUT)
    write(tmp_path / "0", "a", LatentCache(made.latents, made.conditioning._replace(clip=None), made.layout))
    with pytest.raises(ConfigError, match=r"a_0032x0016_wan\.safetensors: holds no CLIP features"):
        TrainingSet(config(tmp_path, ""), seed=1)


def test_features_of_another_width_than_the_dit_takes_are_refused(tmp_path):
    write(tmp_path / "0", "a")
    training_set = TrainingSet(config(tmp_path, ""), seed=1)
    training_set.check_widths(clip=6, text=3)
    with pytest.raises(ConfigError, match="its CLIP features are 6 wide, the DiT takes 1280"):
        training_set.check_widths(clip=1280, text=3)
    with pytest.raises(ConfigError, match="its text features are 3 wide, the DiT takes 4096"):
        training_set.check_widths(clip=6, text=4096)


def test_stratified_numbers_spread_over_the_intervals_of_each_dataset(mixed):
    training_set = TrainingSet(mixed, seed=1, timestep_buckets=4)
    plans = training_set.epoch_batches(1)
    assert all(len(plan.uniform) == len(plan.items) for plan in plans)
    # Dataset 0: 6 items of one size and 4 of the other in batches of 2, all full, so that no number is left over.
    values = sorted(value for plan in plans if plan.items[0].key[0] == "0" for value in plan.uniform)
    counts = [sum(i / 4 <= value < (i + 1) / 4 for value in values) for i in range(4)]
    assert len(values) == 10 and sum(counts) == 10 and min(counts) >= 1 and max(counts) <= 3
    assert plans == TrainingSet(mixed, seed=1, timestep_buckets=4).epoch_batches(1)
    assert load_batch(plans[0]).uniform.tolist() == list(plans[0].uniform)
    assert TrainingSet(mixed, seed=1, timestep_buckets=1).epoch_batches(1)[0].uniform is None


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (8, 4), (3, 4), (1, 3)])
def test_processes_share_all_plans_evenly(count, processes):
    plans = [BatchItems((), (float(i),)) for i in range(count)]
    shares = [rank_slice(plans, i, processes) for i in range(processes)]
    assert {len(part) for part in shares} == {-(-count // processes)}
    assert {plan for part in shares for plan in part} == set(plans)
    assert sum(len(part) for part in shares) - count < processes


def same(first: TrainingBatch, second: TrainingBatch) -> bool:
    tensors = [(getattr(first, name), getattr(second, name)) for name in ("latents", "frame_indices")]
    tensors += zip(first.conditioning, second.conditioning, strict=True)
    tensors += zip(first.text, second.text, strict=True)
    return first.item_keys == second.item_keys and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize(("workers", "persistent", "context"), [(0, True, None), (1, True, "spawn"), (2, False, None)])
def test_workers_change_nothing(mixed, workers, persistent, context):
    training_set = TrainingSet(mixed, seed=1)
    loader = BatchLoader(workers, persistent, context)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for epoch in (1, 2):
        plans = training_set.epoch_batches(epoch)
        loaded = list(loader.load(plans))
        assert len(loaded) == len(plans)
        assert all(same(batch, load_batch(plan)) for batch, plan in zip(loaded, plans, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_persistent_workers_start_afresh_after_an_epoch_was_left_early(mixed):
    training_set, loader = TrainingSet(mixed, seed=1), BatchLoader(1, persistent=True)
    next(loader.load(training_set.epoch_batches(1)))
    plans = training_set.epoch_batches(2)
    assert [list(batch.item_keys) for batch in loader.load(plans)] == keys(plans)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_during_training_is_named_in_one_line(tmp_path, workers):
    path = write(tmp_path / "0", "a")
    plans = TrainingSet(config(tmp_path, ""), seed=1).epoch_batches(1)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a_0032x0016_wan\.safetensors: cannot be read") as caught:
        list(BatchLoader(workers).load(plans))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "images", "chosen"),
    [
        (OneFrameLayout((0,), 1), 1, [0]),
        (OneFrameLayout((0,), 1), 2, [0, 0]),
        (OneFrameLayout((0, 2), 1), 1, [0]),
        (OneFrameLayout((0, 2), 1), 2, [0, 1]),
        (OneFrameLayout((2, 0), 1), 1, [1]),
        (OneFrameLayout((2, 0), 1), 2, [1, 0]),
        (OneFrameLayout((4, 8, 2), 1), 2, [2, 1]),
    ],
)
def test_the_model_gets_the_features_of_the_earliest_and_latest_control(tmp_path, layout, images, chosen):
    write(tmp_path / "0", "a", cached(layout))
    batch = load_batch(TrainingSet(config(tmp_path, ""), seed=1).epoch_batches(1)[0])
    assert torch.equal(clip_for(batch, images), torch.tensor(chosen)[None, :, None, None].expand(1, -1, 257, 6))


def test_items_of_one_batch_may_have_different_layouts(tmp_path):
    for stem, layout in (("a", OneFrameLayout((0, 2), 1)), ("b", OneFrameLayout((8, 3), 9))):
        write(tmp_path / "0", stem, cached(layout))
    batch = load_batch(TrainingSet(config(tmp_path, "batch_size = 2"), seed=1).epoch_batches(1)[0])
    rows = dict(
        zip(
            batch.item_keys,
            zip(batch.frame_indices.tolist(), clip_for(batch, 1)[:, 0, 0, 0].tolist(), strict=True),
            strict=True,
        )
    )
    assert rows == {"0/a_0032x0016/0": ([0, 1, 2], 0.0), "0/b_0032x0016/0": ([3, 8, 9], 1.0)}


def test_as_many_features_as_wanted_are_taken_as_they_are_and_any_other_number_is_an_error(tmp_path):
    made = cached(LAYOUT)
    features = torch.stack([torch.full((257, 6), float(i)) for i in (5, 7)])
    write(tmp_path / "0", "a", LatentCache(made.latents, made.conditioning._replace(clip=features), made.layout))
    batch = load_batch(TrainingSet(config(tmp_path, ""), seed=1).epoch_batches(1)[0])
    assert clip_for(batch, 2)[0, :, :, 0].tolist() == [[5.0] * 257, [7.0] * 257]
    with pytest.raises(ConfigError, match="0/a_0032x0016/0: its cache holds CLIP features of 2 images for 1 control"):
        clip_for(batch, 1)


def names(items):
    return sorted(item.key for item in items)


def test_a_validation_dataset_is_kept_from_training_and_each_of_its_items_counts_once(tmp_path):
    for folder, stems in (("0", "ab"), ("1", "cd")):
        for stem in stems:
            write(tmp_path / folder, stem)
    general = "resolution = [32, 16]\nnum_repeats = 3"
    training_set = TrainingSet(config(tmp_path, "", "validation = true", general=general), seed=1)
    assert {item.key[:3] for item in training_set.items} == {"0/a", "0/b"} and len(training_set.items) == 6
    trained = [key for epoch in (1, 2) for batch in keys(training_set.epoch_batches(epoch)) for key in batch]
    assert {key[0] for key in trained} == {"0"}
    assert names(training_set.validation.items) == ["1/c_0032x0016/0", "1/d_0032x0016/0"]


@pytest.mark.parametrize(
    ("split", "held_back"), [(0, ""), (1, "j"), (3, "dfj"), (0.1, "j"), (0.3, "dfj"), (0.5, "bcdfj"), (0.01, "j")]
)
def test_a_share_or_number_of_the_items_is_held_back_the_same_ones_in_every_run(tmp_path, split, held_back):
    """The letters have the lowest SHA-256 of a to j; `printf e | sha256sum` shows one."""
    for stem in "abcdefghij":
        write(tmp_path / "0", stem)
    for seed in (1, 2):
        training_set = TrainingSet(config(tmp_path, "num_repeats = 2"), seed, validation_split=split)
        assert names(training_set.validation.items) == [f"0/{stem}_0032x0016/0" for stem in held_back]
        trained = [stem for stem in "abcdefghij" if stem not in held_back]
        assert names(training_set.items) == [f"0/{stem}_0032x0016/{i}" for stem in trained for i in (0, 1)]


def test_the_sizes_of_a_stem_stay_on_one_side_in_all_datasets(tmp_path):
    for stem in "abcdefghij":
        write(tmp_path / "0", stem)
        write(tmp_path / "0", stem, cached(LAYOUT, height=4), size=(32, 32))
        write(tmp_path / "1", stem)
    training_set = TrainingSet(config(tmp_path, "enable_bucket = true", ""), seed=1, validation_split=0.3)
    sides = [[item.latents.name[0] for item in part] for part in (training_set.validation.items, training_set.items)]
    assert sorted(sides[0]) == sorted("dfj" * 3)
    assert not set(sides[0]) & set(sides[1]) and len(sides[1]) == 7 * 3


@pytest.mark.parametrize(("stems", "split"), [("ab", 2), ("abc", 7), ("a", 0.5)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, stems, split):
    for stem in stems:
        write(tmp_path / "0", stem)
    with pytest.raises(ConfigError, match=rf"^--validation_split {split}: leaves none of {len(stems)} items"):
        TrainingSet(config(tmp_path, ""), seed=1, validation_split=split)


def test_validation_datasets_alone_or_without_caches_are_refused(tmp_path):
    write(tmp_path / "0", "a")
    with pytest.raises(ConfigError, match=r"train\.toml: every dataset has validation = true"):
        TrainingSet(config(tmp_path, "validation = true"), seed=1)
    with pytest.raises(ConfigError, match=r"no cached items in .*1; run wan_cache_latents"):
        TrainingSet(config(tmp_path, "", "validation = true"), seed=1)


def test_features_of_held_back_items_must_fit_the_dit_too(tmp_path):
    write(tmp_path / "0", "a")
    made = cached(LAYOUT)
    narrow = made.conditioning._replace(clip=made.conditioning.clip[..., :5])
    write(tmp_path / "1", "b", LatentCache(made.latents, narrow, made.layout))
    with pytest.raises(ConfigError, match="its CLIP features are 5 wide, the DiT takes 6"):
        TrainingSet(config(tmp_path, "", "validation = true"), seed=1).check_widths(clip=6, text=3)
