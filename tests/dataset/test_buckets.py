"""Bucket lists and choices, against the tables of the dataset spec."""

import math

import pytest

from dataset.buckets import Buckets
from utils.errors import ConfigError


def mirrored(*half):
    """The full list from its members up to the square or nearest-to-square one."""
    return tuple(sorted({*half, *((h, w) for w, h in half)}))


@pytest.mark.parametrize(
    ("resolution", "count", "members"),
    [
        ((960, 544), 47, [(352, 1472), (368, 1408), (384, 1360), (704, 736), (720, 720), (736, 704), (960, 544)]),
        ((512, 512), 33, [(256, 1024), (272, 960), (288, 896), (304, 848), (320, 816), (496, 528), (512, 512)]),
        (
            (384, 576),
            31,
            [(224, 976), (240, 912), (256, 864), (272, 800), (288, 768), (384, 576), (448, 480), (464, 464)],
        ),
    ],
)
def test_bucket_lists_match_the_table(resolution, count, members):
    sizes = Buckets(resolution, enabled=True).sizes
    assert len(sizes) == count
    assert sizes == tuple(sorted(sizes))
    assert sizes[0] == members[0] and sizes[-1] == members[0][::-1]
    assert set(mirrored(*members)) <= set(sizes)


def test_the_whole_list_of_256_is_as_in_the_table():
    half = [(128, 512), (144, 448), (160, 400), (176, 368), (192, 336), (208, 304), (224, 288), (240, 272), (256, 256)]
    assert Buckets((256, 256), enabled=True).sizes == mirrored(*half)


def test_only_the_area_of_the_resolution_matters_with_buckets():
    assert Buckets((960, 544), enabled=True).sizes == Buckets((544, 960), enabled=True).sizes


@pytest.mark.parametrize("side", [*range(16, 80), 333, 1000])
def test_every_size_of_every_resolution_is_a_usable_multiple_of_16(side):
    sizes = Buckets((side, side), enabled=True).sizes
    assert sizes
    for width, height in sizes:
        assert width >= 16 and height >= 16 and width % 16 == 0 and height % 16 == 0
        assert width * height <= side * side


@pytest.mark.parametrize(
    ("image", "bucket", "without_upscale"),
    [
        ((1920, 1080), (960, 544), (960, 544)),
        ((1080, 1920), (544, 960), (544, 960)),
        ((1000, 1000), (720, 720), (720, 720)),
        ((512, 768), (592, 880), (512, 768)),
        ((3000, 500), (1472, 352), (1472, 352)),
        ((640, 480), (832, 624), (640, 480)),
        ((500, 333), None, (496, 320)),
    ],
)
def test_choices_match_the_table(image, bucket, without_upscale):
    if bucket is not None:
        assert Buckets((960, 544), enabled=True).choose(image) == bucket
    assert Buckets((960, 544), enabled=True, no_upscale=True).choose(image) == without_upscale


def test_no_choice_is_nearer_in_aspect_ratio():
    buckets = Buckets((384, 576), enabled=True)
    for image in [(100, 77), (31, 200), (1234, 567), (64, 64)]:
        width, height = buckets.choose(image)
        errors = [abs(w / h - image[0] / image[1]) for w, h in buckets.sizes]
        assert math.isclose(abs(width / height - image[0] / image[1]), min(errors))


def test_an_image_of_exactly_the_area_keeps_its_size_without_upscaling():
    buckets = Buckets((512, 512), enabled=True, no_upscale=True)
    assert buckets.choose((128, 2048)) == (128, 2048)
    assert buckets.choose((128, 2049)) == (256, 1024)


def test_no_upscale_has_no_effect_without_buckets():
    assert Buckets((512, 512), enabled=False, no_upscale=True).choose((64, 64)) == (512, 512)


def test_without_buckets_every_image_gets_the_resolution():
    buckets = Buckets((320, 480))
    assert buckets.sizes == ((320, 480),)
    assert {buckets.choose(size) for size in [(20, 900), (900, 20), (320, 480)]} == {(320, 480)}


def test_without_buckets_the_resolution_is_cut_to_multiples_of_16_with_one_warning(caplog):
    buckets = Buckets((1000, 540))
    assert {buckets.choose(size) for size in [(20, 900), (900, 20)]} == {(992, 528)}
    assert [record.getMessage() for record in caplog.records] == [
        "resolution 1000x540 is cut to 992x528, multiples of 16"
    ]


@pytest.mark.parametrize("size", [(15, 100), (100, 15), (1, 1)])
@pytest.mark.parametrize("flags", [{}, {"enabled": True}, {"enabled": True, "no_upscale": True}])
def test_an_image_with_a_side_below_16_is_refused(size, flags):
    with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]} .* 16"):
        Buckets((512, 512), **flags).choose(size)
