"""Image files, sizes, resizing, normalisation and training views."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import golden_names, load_golden, load_golden_json
from PIL import Image, ImageOps
from torch.testing import assert_close

from pixelllm import images


def encode(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return image.getpixel((x, y))


# Files


def test_path_bytes_and_open_image_agree(tmp_path: Path):
    image = Image.effect_noise((9, 7), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    expected = np.array(image)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(image, "PNG"), image):
        assert np.array_equal(np.array(images.open_image(source)), expected)


def test_a_turned_photo_may_have_other_tags_of_any_kind():
    """A resolution that is text, which Pillow could not write anew."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = bytearray(encode(Image.new("RGB", (6, 8)), "JPEG", exif=exif))
    place = data.index(b"\x01\x1a\x00\x05")
    data[place + 2 : place + 8] = b"\x00\x02\x00\x00\x00\x03"  # the type, three characters
    data[place + 8 : place + 12] = b"72\x00\x00"
    assert images.open_image(bytes(data)).size == (8, 6)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WebP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_what_was_opened_is_not_turned_again(orientation: int, form: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.effect_noise((24, 20), 60).convert("RGB")
    data = encode(picture, form, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened)
        once = images.open_image(opened)
    for found in (once, images.open_image(once), images.open_image(data)):
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_pillows_limit_may_be_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.open_image(Image.new("RGB", (6, 8))).size == (6, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int):
    """A sideways photograph would put every point in the wrong place."""
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # top left
    # How a camera of that orientation stores the picture that should be shown upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.array(images.open_image(data)), upright)


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert pixel(images.open_image(encode(clear, "PNG"))) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert pixel(images.open_image(encode(half, "PNG"))) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    opaque = images.open_image(encode(palette, "PNG"))
    keyed = images.open_image(encode(palette, "PNG", transparency=1))
    assert (pixel(opaque), pixel(keyed)) == ((10, 20, 30), (255, 255, 255))


def test_greyscale_binary_and_cmyk_become_rgb():
    assert pixel(images.open_image(encode(Image.new("L", (4, 4), 77), "PNG"))) == (77, 77, 77)
    assert pixel(images.open_image(encode(Image.new("1", (4, 4), 1), "PNG"))) == (255, 255, 255)
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = pixel(images.open_image(encode(cyan, "JPEG", quality=95)))
    assert red < 10 and green > 245 and blue > 245


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str):
    """Pillow's own conversion turns everything above 255 white."""
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = images.open_image(encode(Image.fromarray(values), form))
    assert np.array(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_wide_integers_and_floats_are_scaled():
    wide = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.int32))
    assert np.array(images.open_image(wide))[0, :, 0].tolist() == [0, 128, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, np.nan]], dtype=np.float32))
    assert np.array(images.open_image(encode(unit, "TIFF")))[0, :, 0].tolist() == [0, 128, 0]
    larger = Image.fromarray(np.array([[0.0, 100.0, 200.0]], dtype=np.float32))
    assert np.array(images.open_image(larger))[0, :, 2].tolist() == [0, 128, 255]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(form: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    red, green, blue = pixel(images.open_image(data))
    assert red > 250 and green < 5 and blue < 5


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="absent.jpg: no such image"):
        images.open_image(tmp_path / "absent.jpg")


def test_truncated_file_is_named(tmp_path: Path):
    data = encode(Image.effect_noise((64, 64), 60), "JPEG")
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half.jpg: .*truncated"):
        images.open_image(tmp_path / "half.jpg")


def test_something_else_is_named(tmp_path: Path):
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(ValueError, match="notes.jpg: not an image"):
        images.open_image(tmp_path / "notes.jpg")
    with pytest.raises(ValueError, match="unreadable"):
        images.open_image(tmp_path)  # a folder
    with pytest.raises(ValueError, match="bytes in memory"):
        images.open_image(b"")


@pytest.mark.parametrize("factor", [1.5, 10])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as outside the suite
def test_decompression_bomb_is_refused_before_decoding(factor: float, monkeypatch):
    """Pillow only warns up to twice its limit, and training must not die of memory."""
    data = encode(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / factor))
    with pytest.raises(ValueError, match="bomb"):
        images.open_image(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_damaged_bytes_never_raise_anything_else(form: str):
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(Image.effect_noise((24, 20), 60).convert("RGB"), form, exif=exif)
    num_refused = 0
    for _ in range(60):
        data = np.frombuffer(whole, dtype=np.uint8).copy()
        data[generator.integers(len(data), size=4)] = generator.integers(256, size=4)
        try:
            images.open_image(data.tobytes()[: generator.integers(1, len(data) * 2)])
        except ValueError:
            num_refused += 1
    assert num_refused > 10


# Sizes and frames


def test_golden_resize_sizes():
    for row in load_golden_json("resize_sizes.json")["rows"]:
        size = images.resize_size((row["height"], row["width"]), row["size"], row["max_size"])
        assert list(size) == row["out"], row


def test_longer_side_may_come_out_one_short():
    assert images.resize_size((427, 640), 384, 384) == (256, 383)


def test_extreme_shapes_keep_a_pixel():
    assert images.resize_size((1, 5000), 384, 384) == (1, 384)
    frame, size = images.to_frame(Image.new("RGB", (5000, 1), "red"), 32)
    assert size[0] == 1 and frame[0, 0, size[1] - 1] == 255


def test_frame_is_padded_with_zeros_at_bottom_and_right():
    frame, (height, width) = images.to_frame(Image.new("RGB", (40, 20), "white"), 16)
    assert (frame.dtype, frame.shape, height, width) == (torch.uint8, (3, 16, 16), 8, 16)
    assert frame[:, :8].eq(255).all() and frame[:, 8:].eq(0).all()


def test_frame_of_an_image_that_fits_is_the_image():
    image = Image.effect_noise((16, 12), 60).convert("RGB")
    frame, size = images.to_frame(image, 16)
    assert size == (12, 16)
    assert torch.equal(frame[:, :12], images.to_tensor(image))


@pytest.mark.parametrize("name", golden_names("data_transforms"))
def test_golden_data_transforms_of_pixels(name: str):
    case = load_golden(name)
    image = case.tensor("in.inputs").movedim(-1, 0)
    masks = case.tensor("in.masks")[..., 0]
    for variant, rule in case.hparams.items():
        if "size" in rule:
            size = images.resize_size(tuple(image.shape[1:]), rule["size"], rule["max_size"])
            ours, our_masks = images.resize_frame(image, size), images.resize_masks(masks, size)
        else:
            rows = slice(rule["top"], rule["top"] + rule["height"])
            columns = slice(rule["left"], rule["left"] + rule["width"])
            ours, our_masks = image[:, rows, columns], masks[:, rows, columns]
            _, keep = images.crop_boxes(case.tensor("in.boxes"), window_of(rule))
            our_masks = our_masks[keep]
        if variant.endswith("hflip"):
            ours, our_masks = ours.flip(-1), our_masks.flip(-1)
        assert list(ours.shape[1:]) == case.arrays[f"out.{variant}.size"].tolist()
        assert_close(ours.movedim(0, -1), case.tensor(f"out.{variant}.inputs"), **case.tolerance)
        assert torch.equal(our_masks, case.tensor(f"out.{variant}.masks")[..., 0]), variant
    padded = case.tensor("out.resize20_pad24.inputs").movedim(-1, 0)
    height, width = images.resize_size(tuple(image.shape[1:]), 20, 20)
    ours = images.pad_frame(images.resize_frame(image, (height, width)), padded.shape[-1])
    assert_close(ours, padded, **case.tolerance)
    assert case.arrays["out.resize20_pad24.padding_mask"].sum() == height * width


def window_of(rule: dict) -> torch.Tensor:
    left, top = rule["left"], rule["top"]
    return torch.tensor([left, top, left + rule["width"], top + rule["height"]]).float()


@pytest.mark.parametrize("name", golden_names("data_transforms"))
def test_golden_data_transforms_of_coordinates(name: str):
    """Ours are in [0, 1]: a resize leaves them alone, a crop and a flip do what the golden do."""
    case = load_golden(name)
    height, width = case.arrays["in.inputs"].shape[:2]
    unit = torch.tensor([width, height]).float()
    for variant, rule in case.hparams.items():
        points, boxes = case.tensor("in.points") / unit, case.tensor("in.boxes") / unit.repeat(2)
        if "size" not in rule:
            window = window_of(rule) / unit.repeat(2)
            points = images.crop_points(points, window)
            boxes, keep = images.crop_boxes(boxes, window)
            boxes = boxes[keep]
            labels = case.tensor("in.labels")[keep]
            assert torch.equal(labels, case.tensor(f"out.{variant}.labels"))
        if variant.endswith("hflip"):
            points, boxes = images.flip_points(points), images.flip_boxes(boxes)
        out = case.tensor(f"out.{variant}.size").flip(0).float()
        assert_close(points * out, case.tensor(f"out.{variant}.points"), **case.tolerance)
        assert_close(boxes * out.repeat(2), case.tensor(f"out.{variant}.boxes"), **case.tolerance)


def test_random_frame_shows_its_window(generator: torch.Generator):
    """The window must map labels to where their pixels went."""
    ramp = np.zeros((60, 90, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(90)[None] * 2  # red says x, green says y
    ramp[..., 1] = np.arange(60)[:, None] * 4
    sizes = set()
    for _ in range(20):
        frame, (h, w), window = images.random_frame(
            Image.fromarray(ramp), 48, (0.5, 2.0), generator
        )
        sizes.add((h, w))
        assert frame.shape == (3, 48, 48) and frame[:, h:].sum() + frame[:, :, w:].sum() == 0
        place = torch.tensor([0.5 * (window[0] + window[2]), 0.5 * (window[1] + window[3])])
        x, y = (images.crop_points(place, window) * torch.tensor([w, h])).tolist()
        red, green = frame[:2, int(y), int(x)].float() / torch.tensor([180, 240])
        assert abs(red - place[0]) < 0.04 and abs(green - place[1]) < 0.04
    assert len(sizes) > 5


# Encoder input


@pytest.mark.parametrize("name", golden_names("image_resize"))
def test_golden_image_resize(name: str):
    case = load_golden(name)
    maps = case.tensor("in.x").movedim(-1, 1)
    for key in case.arrays:
        if key.startswith("out."):
            expected = case.tensor(key).movedim(-1, 1)
            mode = key.removeprefix("out.").split("_")[0]
            ours = images.resize(maps, expected.shape[-2:], mode)
            assert_close(ours, expected, **case.tolerance)


@pytest.mark.parametrize("name", golden_names("preprocess_"))
def test_golden_preprocess(name: str):
    case = load_golden(name)
    hparams, sizes = case.hparams, None
    if "in.padding_mask" in case.arrays:
        mask = case.tensor("in.padding_mask")
        sizes = torch.stack([mask.amax(2).sum(1), mask.amax(1).sum(1)], dim=1)
    ours = images.normalise(
        case.tensor("in.images").movedim(-1, 1),
        sizes,
        hparams["pixel_mean"],
        hparams["pixel_std"],
        tuple(hparams["image_size"]),
    )
    assert_close(ours, case.tensor("out.images").movedim(-1, 1), **case.tolerance)


def test_what_lies_in_the_padding_changes_nothing():
    frame = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    other = frame.clone()
    other[..., 10:, :], other[..., 7:] = 9, 200
    sizes = torch.tensor([[10, 7]])
    ours, theirs = (
        images.normalise(x, sizes, (120, 110, 100), (50, 60, 70), (8, 8)) for x in (frame, other)
    )
    assert torch.equal(ours, theirs)


# Masks


def test_golden_masks_of_the_original_image():
    """Catches a mask cut at the frame instead of the image, and cells of another alignment."""
    case = load_golden_json("eval_refcoco.json")
    areas = [
        int(
            images.restore_mask(
                torch.tensor(logits),
                example["size_hw"],
                example["padded_size_hw"][0],
                tuple(example["orig_size_hw"]),
            ).sum()
        )
        for example in case["examples"]
        for logits, expression in zip(
            example["detection_masks"], example["refexp_ids"], strict=True
        )
        if expression > 0
    ]
    assert areas == case["expected"]["prediction_mask_area"]


def test_a_restored_mask_covers_the_image_and_not_its_padding():
    logits = torch.full((8, 8), -1.0)
    logits[:, :3] = 1.0  # left half of an image of 32 x 24 in a frame of 32
    mask = images.restore_mask(logits, (32, 24), 32, (640, 480))
    assert mask.shape == (640, 480)
    assert mask[:, :239].all() and not mask[:, 241:].any()
    logits[:, 6:] = 99.0  # on the padding
    assert torch.equal(images.restore_mask(logits, (32, 24), 32, (640, 480)), mask)


def test_an_image_thinner_than_a_cell_keeps_one():
    assert images.restore_mask(torch.ones(8, 8), (1, 32), 32, (3, 96)).all()
