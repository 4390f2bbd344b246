"""Opening, resizing and normalising pictures, against Pillow, OpenCV and exact answers."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from utils.errors import ConfigError
from utils.images import (
    check_image,
    floor16,
    from_pixels,
    open_image,
    open_masked,
    resize_to_fill,
    size_for_area,
    to_pixels,
)
from utils.logs import Once


def noise(width, height, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def opened(image, path, **save):
    image.save(path, **save)
    return np.asarray(open_image(path, "--image_path"))


# Opening


UPRIGHT = {  # EXIF orientation -> the picture as it is to be seen, [height, width, channels]
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


def test_long_texts_and_colour_profiles_keep_no_png_from_being_read(tmp_path):
    for name, save in {
        "profile": {"icc_profile": bytes(2 << 20)},
        "text": {"pnginfo": texts(("zTXt", "x" * (3 << 20)))},
        "unicode": {"pnginfo": texts(("iTXt", "猫" * (2 << 20)))},
        "many": {"pnginfo": texts(*[("zTXt", "x" * (1 << 20))] * 70)},
    }.items():
        pixels = noise(8, 8)
        assert np.array_equal(opened(Image.fromarray(pixels), tmp_path / f"{name}.png", **save), pixels)


def texts(*chunks: tuple[str, str]) -> PngInfo:
    """Compressed text of these kinds of chunks."""
    info = PngInfo()
    for kind, text in chunks:
        info.add_itxt("a", text, zip=True) if kind == "iTXt" else info.add_text("a", text, zip=True)
    return info


@pytest.mark.parametrize("kind", ["jpg", "webp", "avif", "png", "gif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_whose_end_was_not_downloaded_is_an_error(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(noise(256, 256)).save(path)
    data = path.read_bytes()
    for rest in (b"", bytes(len(data) - int(len(data) * share))):
        path.write_bytes(data[: int(len(data) * share)] + rest)
        with pytest.raises(ConfigError, match=f"--image_path .*a.{kind}: cannot be read as an image"):
            open_image(path, "--image_path")


@pytest.mark.parametrize("kind", ["jpg", "webp", "avif"])
def test_a_picture_of_one_colour_and_zeros_after_the_end_are_no_cut_download(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (4096, 4096), (200, 30, 70)).save(path)
    assert open_image(path, "x").size == (4096, 4096)
    if kind == "jpg":
        path.write_bytes(path.read_bytes() + bytes(4096))
        assert open_image(path, "x").size == (4096, 4096)


def test_a_pointer_and_a_web_page_in_the_place_of_a_picture_are_called_that(tmp_path):
    path = tmp_path / "a.png"
    for content, words in {
        "version https://git-lfs.github.com/spec/v1\n": "a.png: is a Git LFS pointer, not the file itself; run",
        "<!DOCTYPE html>": "a.png: is a web page, not the file itself",
    }.items():
        path.write_text(content)
        for read in (open_image, check_image):
            with pytest.raises(ConfigError, match=words):
                read(path, "x")


def test_floating_point_grey_is_scaled_where_its_scale_is_known(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(opened(Image.fromarray(ramp), tmp_path / "a.tiff"), expected)
    assert np.array_equal(opened(Image.fromarray(expected[..., 0].astype(np.float32)), tmp_path / "a.tiff"), expected)
    for values in (ramp * 65535, ramp - 0.5, ramp * 1.5, np.full_like(ramp, np.nan)):
        with pytest.raises(ConfigError, match=r"floating-point numbers of .* have no scale; save it with 8 or 16 bits"):
            opened(Image.fromarray(values), tmp_path / "a.tiff")


@pytest.mark.parametrize("read", [open_image, open_masked, check_image])
def test_an_eps_under_another_name_is_refused_and_ghostscript_never_starts(tmp_path, monkeypatch, read):
    path = tmp_path / "photo.png"
    Image.fromarray(noise(8, 8)).save(path, "EPS")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *how, **more: started.append(how))
    with pytest.raises(ConfigError, match=r"photo.png: cannot be read as an image \(not an image, or of an unknown"):
        read(path, "--image_path")
    assert not started


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "AVIF", "GIF", "TIFF", "PPM", "MPO"])
def test_formats_of_photographs_are_read_whatever_the_name(tmp_path, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    path = tmp_path / "photo.png"
    Image.fromarray(noise(8, 6)).save(path, kind)
    assert check_image(path, "--image_path") == open_image(path, "--image_path").size == (8, 6)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path, suffix, orientation):
    path = tmp_path / f"photo.{suffix}"
    picture = Image.fromarray(np.kron(noise(3, 2), np.ones((16, 16, 1), np.uint8)))
    picture.save(path, exif=turned(orientation), quality=95)
    stored = picture if suffix == "tiff" else Image.open(path)  # Pillow turns a TIFF by itself
    np.testing.assert_array_equal(open_image(path, "x"), UPRIGHT[orientation](np.asarray(stored)))
    assert check_image(path, "x") == ((48, 32) if orientation < 5 else (32, 48))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_transparent_picture_is_turned_with_its_alpha_channel(tmp_path, orientation):
    levels = noise(7, 5, channels=4)
    Image.fromarray(levels).save(tmp_path / "photo.png", exif=turned(orientation))
    rgb, alpha = open_masked(tmp_path / "photo.png", "x")
    np.testing.assert_array_equal(np.dstack([rgb, alpha]), UPRIGHT[orientation](levels))


def test_exif_data_behind_the_pixels_of_a_png_change_neither_size_nor_pixels(tmp_path):
    path, levels = tmp_path / "late.png", noise(7, 5)
    Image.fromarray(levels).save(path, exif=turned(6))
    content = path.read_bytes()
    start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert ImageOps.exif_transpose(Image.open(path)).size == (5, 7)
    assert check_image(path, "x") == (7, 5)
    np.testing.assert_array_equal(open_image(path, "x"), levels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    picture = Image.fromarray(noise(20, 18)).convert(mode)
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    result = opened(picture, path)
    assert result.shape == (18, 20, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(Image.open(path).convert("RGB")))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    result = opened(Image.fromarray(levels), tmp_path / "deep.png")
    np.testing.assert_array_equal(result, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_pixels_keep_their_colour_and_the_first_such_picture_is_named_once(tmp_path, caplog, mode):
    if mode == "RGBA":
        picture, save = Image.new("RGBA", (16, 16), (10, 200, 30, 0)), {}
    else:
        picture, save = Image.new("P", (16, 16), 3), {"transparency": 3}
        picture.putpalette([0] * 9 + [10, 200, 30])
    caplog.handler.addFilter(once := Once())
    for name in ("first.png", "second.png"):
        assert (opened(picture, tmp_path / name, **save) == (10, 200, 30)).all()
    warnings = [record.getMessage() for record in caplog.records]
    caplog.handler.removeFilter(once)
    assert len(warnings) == 1 and "first.png" in warnings[0]


def test_an_opaque_alpha_channel_is_not_reported(tmp_path, caplog):
    opened(Image.new("RGBA", (16, 16), (1, 2, 3, 255)), tmp_path / "opaque.png")
    assert not caplog.records


def png_with_size(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(size=(64, 64)):
    file = io.BytesIO()
    Image.fromarray(noise(*size)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"this is text", "not an image"),
        (b"", "not an image"),
        (jpeg()[:1500], "truncated"),
        (png_with_size(30_000, 30_000), "decompression bomb"),
    ],
)
def test_a_broken_picture_is_one_line_naming_flag_and_file(tmp_path, content, word):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_image(path, "--image_path")
    message = str(caught.value)
    assert message.startswith(f"--image_path {path}: ") and word in message and "\n" not in message
    if word != "truncated":  # the header of that one is fine
        with pytest.raises(ConfigError, match=word):
            check_image(path, "--image_path")


@pytest.mark.parametrize("read", [open_image, check_image])
def test_a_missing_picture_is_one_line_naming_flag_and_file(tmp_path, read):
    with pytest.raises(ConfigError, match=r"^--control_image_path .*none\.png: does not exist; "):
        read(tmp_path / "none.png", "--control_image_path")


def test_checking_a_size_does_not_decode_the_picture(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(noise(300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert check_image(path, "x") == (300, 200)
    with pytest.raises(ConfigError):
        open_image(path, "x")


# Resizing


SHRINKING = [
    ((1920, 1080), (960, 544)),
    ((640, 640), (320, 320)),  # 2 x 2 pixels into one
    ((768, 512), (256, 160)),  # 3 x 3, then a crop
    ((131, 97), (96, 64)),
    ((100, 100), (99, 96)),
    ((100, 300), (100, 16)),  # only cropped
]


@pytest.mark.parametrize(("size", "target"), SHRINKING)
@pytest.mark.parametrize("kind", ["noise", "steps"])
def test_shrinking_is_within_one_level_of_opencv_area_averaging(size, target, kind):
    picture = noise(*size)
    if kind == "steps":
        picture = np.where(picture[:1] > 127, 255, 0).astype(np.uint8).repeat(size[1], axis=0)
    result = resize_to_fill(picture, target)
    scale = max(target[0] / size[0], target[1] / size[1])
    whole = cv2.resize(picture, (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), interpolation=cv2.INTER_AREA)
    left, top = (whole.shape[1] - target[0]) // 2, (whole.shape[0] - target[1]) // 2
    expected = whole[top : top + target[1], left : left + target[0]]
    assert result.shape == (target[1], target[0], 3) and result.dtype == np.uint8
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(("size", "target"), [((333, 500), (352, 512)), ((64, 48), (128, 112)), ((20, 20), (32, 16))])
def test_enlarging_is_pillows_lanczos_and_a_centre_crop(size, target):
    picture = noise(*size)
    scale = max(target[0] / size[0], target[1] / size[1])
    whole = Image.fromarray(picture).resize(
        (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), Image.Resampling.LANCZOS
    )
    left, top = (whole.width - target[0]) // 2, (whole.height - target[1]) // 2
    expected = whole.crop((left, top, left + target[0], top + target[1]))
    np.testing.assert_array_equal(resize_to_fill(picture, target), np.asarray(expected))


def test_the_cut_is_from_the_centre_along_either_axis():
    columns = np.arange(100, dtype=np.uint8)[None, :, None].repeat(32, axis=0).repeat(3, axis=2)
    np.testing.assert_array_equal(resize_to_fill(columns, (33, 32)), columns[:, 33:66])
    np.testing.assert_array_equal(
        resize_to_fill(columns.transpose(1, 0, 2), (32, 33)), columns[:, 33:66].transpose(1, 0, 2)
    )


def test_an_image_of_the_right_size_is_untouched():
    picture = noise(48, 32)
    assert resize_to_fill(picture, (48, 32)) is picture


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_a_flat_image_stays_flat_when_it_shrinks(level):
    assert (resize_to_fill(np.full((321, 457, 3), level, np.uint8), (112, 64)) == level).all()


# Pixels


def test_pixels_run_from_minus_one_to_one_with_channels_first():
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[1, 2] = 255, 127, 51
    pixels = to_pixels(picture)
    assert pixels.shape == (3, 2, 3) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == [-1, -1, -1]
    torch.testing.assert_close(pixels[:, 1, 2], torch.tensor([1, 127 / 127.5 - 1, 51 / 127.5 - 1]))


def test_a_pillow_image_and_its_array_give_equal_pixels():
    picture = noise(20, 10)
    assert torch.equal(to_pixels(Image.fromarray(picture)), to_pixels(picture))


def test_levels_are_clamped_and_truncated():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0])
    image = from_pixels(values.expand(3, 1, -1))
    assert image.mode == "RGB" and image.size == (7, 1)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 63, 127, 254, 255, 255]


def test_a_picture_survives_pixels_and_back_within_the_one_level_that_truncation_costs():
    picture = noise(64, 48)
    difference = picture.astype(int) - np.asarray(from_pixels(to_pixels(picture)))
    assert difference.min() >= 0 and difference.max() <= 1


# Output sizes


@pytest.mark.parametrize(("pixels", "expected"), [(15, 0), (16, 16), (31, 16), (544, 544), (0, 0)])
def test_floor16(pixels, expected):
    assert floor16(pixels) == expected


@pytest.mark.parametrize(
    ("request_", "image", "expected"),
    [
        ((960, 544), (1000, 1000), (720, 720)),  # sqrt(522240) = 722.7
        ((544, 960), (1000, 1000), (720, 720)),
        ((1024, 1024), (2000, 1000), (1440, 720)),  # 1448.2 x 724.1
        ((1024, 1024), (1000, 2000), (720, 1440)),
        ((256, 256), (256, 256), (256, 256)),
        ((832, 480), (832, 480), (832, 480)),  # in floats 479.99..., so 464
        ((832, 480), (1664, 480), (1168, 336)),  # 1176.6 x 339.4
    ],
)
def test_the_output_keeps_the_area_asked_for_and_the_shape_of_the_image(request_, image, expected):
    assert size_for_area(*request_, *image) == expected


@pytest.mark.parametrize(
    ("request_", "image"), [((256, 256), (10_000, 10)), ((256, 256), (10, 10_000)), ((8, 512), (9, 9))]
)
def test_an_output_side_below_16_is_refused(request_, image):
    with pytest.raises(ConfigError, match="16"):
        size_for_area(*request_, *image)
