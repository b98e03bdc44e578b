"""Transforms of images and texts, each by what it is for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vlpjax.data import transforms as T
from vlpjax.data.bad import BadExample
from vlpjax.data.transforms.appearance import RANDAUGMENT_OPS, adjust_color
from vlpjax.data.transforms.images import WHITE, draw_crop, swap_directions
from vlpjax.errors import UserError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(rng().integers(60, 180, (height, width, 3), np.uint8))


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def decode(encoded: object, **options) -> Image.Image:
    return T.Decode(**options).map({"image": encoded})["image"]


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "GIF", "BMP"])
def test_all_usual_formats_become_rgb(form):
    image = decode(encode(noise(), form))
    assert (image.mode, image.size) == ("RGB", (32, 24))


def test_transparency_is_composited_on_white():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 0, 0))
    pixels = np.asarray(decode(encode(half)))[0].tolist()
    assert pixels == [[255, 127, 127], [255, 255, 255]]
    palette = half.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert decode(encode(palette)).getpixel((1, 0)) == WHITE


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    grey = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(decode(encode(grey)))[0, :, 0].tolist() == [0, 128, 255]


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    encoded = encode(noise(), "JPEG", exif=exif)
    assert decode(encoded).size == (24, 32)
    assert decode(encoded, orient=False).size == (32, 24)


def test_large_jpegs_can_be_decoded_at_a_fraction_of_their_size():
    encoded = encode(noise(320, 240), "JPEG")
    assert decode(encoded, jpeg_side=60).size == (80, 60)


def test_unusable_images_are_bad_examples():
    whole = encode(noise(), "JPEG")
    with pytest.raises(BadExample, match="no known image format"):
        decode(b"not an image")
    with pytest.raises(BadExample, match="Truncated"):
        decode(whole[: len(whole) // 2])
    with pytest.raises(BadExample, match=r"32 x 24 pixels, more than max_pixels=700"):
        decode(whole, max_pixels=700)
    with pytest.raises(BadExample, match="of type int, not bytes"):
        decode(17)
    with pytest.raises(BadExample, match="field 'image' is missing; the example has 'label'"):
        T.Decode().map({"label": 1})


# --- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "size"),
    [
        (T.Resize((8, 16)), (16, 8)),
        (T.Resize(12, mode="shorter"), (16, 12)),
        (T.Resize(16, mode="pad"), (16, 16)),
        (T.CenterCrop(20), (20, 20)),
        (T.CenterCrop(40), (40, 40)),
        (T.Pad(3), (38, 30)),
    ],
)
def test_sizes(transform, size):
    assert transform.map({"image": noise()})["image"].size == size


def test_padding_and_crops_beyond_the_image_are_white():
    for transform in (T.Resize(16, mode="pad"), T.CenterCrop((28, 32)), T.Pad(2)):
        pixels = np.asarray(transform.map({"image": noise()})["image"])
        assert (pixels[0] == 255).all()
        assert not (pixels[pixels.shape[0] // 2] == 255).all()


def test_random_crops_lie_inside_and_have_the_asked_area_and_ratio():
    generator = rng()
    for _ in range(200):
        left, top, right, bottom = draw_crop(100, 80, (0.2, 0.6), (0.5, 2.0), generator)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        assert 0.18 <= (right - left) * (bottom - top) / 8000 <= 0.62
        assert 0.48 <= (right - left) / (bottom - top) <= 2.1
    # No box of this ratio has half of the area: the largest central one is taken.
    assert draw_crop(100, 10, (0.5, 1.0), (0.5, 2.0), generator) == (40, 0, 60, 10)


def test_a_random_resized_crop_is_the_crop_resized():
    image = noise()
    cropped = T.RandomResizedCrop(24, scale=(1.0, 1.0), ratio=(1.0, 1.0)).random_map({"image": image}, rng())[
        "image"
    ]
    expected = image.resize((24, 24), Image.Resampling.BILINEAR, box=(4, 0, 28, 24))
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(expected))


def test_affine_without_amounts_is_the_identity_and_half_a_turn_turns():
    image = noise(24, 24)
    same = T.RandomAffine().random_map({"image": image}, rng())["image"]
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))

    class HalfTurn:
        def random(self, count: int) -> np.ndarray:
            return np.array([0.0, 1.0, 0.5, 0.5, 0.5, 0.5])

    turned = T.RandomAffine(rotate=180).random_map({"image": image}, HalfTurn())["image"]
    np.testing.assert_allclose(np.asarray(turned).astype(int), np.asarray(image)[::-1, ::-1], atol=1)


def test_affine_moves_and_scales_about_the_centre_and_fills_with_white():
    dot = Image.new("RGB", (21, 21), (0, 0, 0))
    dot.putpixel((10, 10), (200, 200, 200))

    class Right:
        def random(self, count: int) -> np.ndarray:
            return np.array([0.0, 0.5, 1.0, 0.5, 0.5, 0.5])

    moved = np.asarray(T.RandomAffine(translate=5 / 21).random_map({"image": dot}, Right())["image"])
    assert moved[10, 15].tolist() == [200, 200, 200]
    assert (moved[:, :5] == 255).all()
    grown = T.RandomAffine(scale=(3.0, 3.0)).random_map({"image": dot}, Right())["image"]
    assert grown.getpixel((10, 10)) == (200, 200, 200)
    assert grown.getpixel((11, 10))[0] > 100


# --- mirroring and its words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("left arrow", "right arrow"),
        ("Right-pointing hand, LEFT side", "Left-pointing hand, RIGHT side"),
        ("facing leftwards and rightward", "facing rightwards and leftward"),
        ("copyright, bright, cleft, alright", "copyright, bright, cleft, alright"),
        ("left|right|up", "right|left|up"),
    ],
)
def test_left_and_right_change_places_as_whole_words(text, swapped):
    assert swap_directions(text) == swapped
    assert swap_directions(swapped) == text


def test_a_mirrored_image_has_a_mirrored_caption_and_an_unmirrored_one_has_not():
    example = {"image": noise(), "caption": "a hand pointing left", "keywords": ["left", "hand"], "label": 3}
    flipped = T.RandomFlip(probability=1.0, captions=("caption", "keywords")).random_map(example, rng())
    np.testing.assert_array_equal(np.asarray(flipped["image"]), np.asarray(example["image"])[:, ::-1])
    assert flipped["caption"] == "a hand pointing right"
    assert flipped["keywords"] == ["right", "hand"]
    assert T.RandomFlip(probability=0.0).random_map(example, rng()) == example
    assert example["caption"] == "a hand pointing left"
    both = {T.RandomFlip().random_map(example, rng(seed))["caption"] for seed in range(20)}
    assert len(both) == 2


# --- colour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "enhancer"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
@pytest.mark.parametrize("amount", [-0.4, 0.3])
def test_single_color_changes_agree_with_pillow(op, enhancer, amount):
    ours = np.asarray(adjust_color(noise(), [(op, amount)])).astype(int)
    np.testing.assert_allclose(ours, np.asarray(enhancer(noise()).enhance(1 + amount)), atol=1)


def test_composed_color_changes_agree_with_one_after_the_other():
    ops = [(2, 0.3), (0, -0.2), (3, 0.05), (1, -0.4)]
    image = noise()
    for op in ops:
        image = adjust_color(image, [op])
    np.testing.assert_allclose(np.asarray(adjust_color(noise(), ops)).astype(int), np.asarray(image), atol=3)


def test_hue_turns_colors_and_keeps_luma():
    turned = adjust_color(noise(), [(3, 0.2)])
    luma = np.asarray(turned.convert("L")).astype(int) - np.asarray(noise().convert("L"))
    assert abs(luma).max() <= 3  # except where a channel was clipped
    assert abs(np.asarray(turned).astype(int) - np.asarray(noise())).mean() > 10
    np.testing.assert_allclose(np.asarray(adjust_color(noise(), [(3, 1.0)])), np.asarray(noise()), atol=1)


def test_jitter_draws_within_its_range_and_with_its_probability():
    transform = T.ColorJitter(brightness=0.2)
    flat = {"image": Image.new("RGB", (4, 4), (100, 100, 100))}
    values = [transform.random_map(flat, rng(seed))["image"].getpixel((0, 0))[0] for seed in range(50)]
    assert min(values) in range(80, 86)
    assert max(values) in range(115, 121)
    assert T.ColorJitter(1, 1, 1, 0.5, probability=0.0).random_map(flat, rng()) is flat
    assert T.ColorJitter(1, 1, 1, 0.5, op_probability=0.0).random_map(flat, rng()) is flat


def test_operations_with_a_probability():
    example = {"image": noise()}
    pixels = np.asarray(example["image"])
    for kind in (T.Grayscale, T.Invert, T.Solarize, T.GaussianBlur, T.RandomErasing):
        assert kind(probability=0.0).random_map(example, rng()) is example
        changed = kind(probability=1.0).random_map(example, rng())["image"]
        assert (changed.mode, changed.size) == ("RGB", example["image"].size)
        assert not np.array_equal(np.asarray(changed), pixels)
    np.testing.assert_array_equal(np.asarray(example["image"]), pixels)  # the input is left as it was
    inverted = np.asarray(T.Invert(probability=1.0).random_map(example, rng())["image"])
    np.testing.assert_array_equal(inverted, 255 - pixels)
    solarized = np.asarray(T.Solarize(probability=1.0, threshold=100).random_map(example, rng())["image"])
    np.testing.assert_array_equal(solarized, np.where(pixels < 100, pixels, 255 - pixels))


def test_erasing_covers_the_asked_area():
    erase = T.RandomErasing(probability=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0), fill=(1, 2, 3))
    pixels = np.asarray(erase.random_map({"image": noise(40, 40)}, rng())["image"])
    assert (pixels == (1, 2, 3)).all(axis=-1).sum() == 400


@pytest.mark.parametrize("name", RANDAUGMENT_OPS)
def test_every_randaugment_operation_keeps_size_and_mode(name):
    changed = T.RandAugment(layers=1, magnitude=8, ops=(name,)).random_map({"image": noise()}, rng())["image"]
    assert (changed.mode, changed.size) == ("RGB", (32, 24))
    assert (name == "identity") == np.array_equal(np.asarray(changed), np.asarray(noise()))


def test_randaugment_of_magnitude_zero_bends_and_moves_nothing():
    geometric = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    same = T.RandAugment(layers=4, magnitude=0, ops=geometric).random_map({"image": noise()}, rng())["image"]
    np.testing.assert_array_equal(np.asarray(same), np.asarray(noise()))


# --- to numbers ---------------------------------------------------------------------------------------------------


def test_normalize_ranges_and_channel_statistics():
    pixels = np.asarray(noise()).astype(np.float64)
    example = {"image": noise()}
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    for transform, expected in [
        (T.Normalize(), pixels / 127.5 - 1),
        (T.Normalize(range="0..1"), pixels / 255),
        (T.Normalize(mean=mean, std=std), (pixels / 255 - mean) / std),
    ]:
        values = transform.map(example)["image"]
        assert (values.dtype, values.shape) == (np.float32, (24, 32, 3))
        np.testing.assert_allclose(values, expected, atol=1e-5)


# --- captions -----------------------------------------------------------------------------------------------------


def test_captions_are_drawn_from_fields_parts_and_templates():
    transform = T.DrawCaption(templates=("{}", "a picture of {}"), max_parts=2)
    example = {"name": "duck", "keywords": "bird|water|animal"}
    drawn = {transform.random_map(example, rng(seed))["caption"] for seed in range(300)}
    words = ("bird", "water", "animal")
    texts = {"duck", *words, *(f"{a}, {b}" for a in words for b in words if a != b)}
    assert drawn == texts | {f"a picture of {text}" for text in texts}


def test_weights_choose_fields_and_missing_fields_are_passed_over():
    only_name = T.DrawCaption(weights=(1.0, 0.0))
    assert {
        only_name.random_map({"name": "duck", "keywords": "x"}, rng(s))["caption"] for s in range(30)
    } == {"duck"}
    assert only_name.random_map({"keywords": "x", "name": ""}, rng())["caption"] == "x"
    with pytest.raises(BadExample, match="none of the fields name, keywords holds a text"):
        only_name.random_map({"keywords": "|"}, rng())


def test_an_outline_is_drawn_where_the_colour_changes_and_nowhere_else():
    image = Image.new("RGB", (32, 32), WHITE)
    image.paste((250, 200, 40), (8, 8, 24, 24))
    outline = T.Outline(thick=0.0, probability=1.0)
    inked = np.asarray(outline.random_map({"image": image}, np.random.default_rng(0))["image"])
    changed = np.argwhere((inked != np.asarray(image)).any(-1))
    assert set(changed[:, 0]) | set(changed[:, 1]) == set(range(7, 24))
    assert (inked[7, 8:24].max(axis=-1) < 60).all()  # the upper edge is dark
    assert (inked[9:22, 9:22] == (250, 200, 40)).all()
    assert T.Outline(probability=0.0).random_map({"image": image}, np.random.default_rng(0))["image"] is image


def test_trimming_leaves_the_same_margin_whatever_margin_there_was():
    def drawing(margin: int) -> Image.Image:
        image = Image.new("RGB", (64, 64), WHITE)
        image.paste((200, 30, 30), (margin, margin, 64 - margin, 64 - margin))
        return image

    wide, narrow = (np.asarray(T.Trim(margin=0.1).map({"image": drawing(m)})["image"]) for m in (20, 4))
    rows = [np.flatnonzero(image.min(axis=(1, 2)) < 128) for image in (wide, narrow)]
    assert abs(rows[0][0] - rows[1][0]) <= 1
    assert 4 <= rows[1][0] <= 6  # a tenth of the drawing on each side of it: 64 / 12
    blank = Image.new("RGB", (64, 64), WHITE)
    assert T.Trim().map({"image": blank})["image"] is blank
    with pytest.raises(UserError, match="threshold=0"):
        T.Trim(threshold=0)


def test_a_name_is_drawn_from_the_languages_asked_for():
    duck, rng = {"codepoints": "1f986", "name": "duck"}, np.random.default_rng(0)
    drawn = {T.TranslatedName(("de", "pt")).random_map(duck, rng)["name"] for _ in range(40)}
    assert drawn == {"Ente", "pato"}
    with pytest.raises(UserError, match="'xx'"):
        T.TranslatedName(("xx",))
    with pytest.raises(BadExample, match="ffff"):
        T.TranslatedName(("en",)).random_map({"codepoints": "ffff"}, rng)


def test_the_evaluation_caption_is_fixed():
    assert T.FixedCaption("an emoji of {}").map({"name": "duck {x}"})["caption"] == "an emoji of duck {x}"


# --- fields and settings ------------------------------------------------------------------------------------------


def test_keep_drop_rename():
    example = {"a": 1, "b": 2}
    assert T.Keep(("b",)).map(example) == {"b": 2}
    assert T.Drop(("b", "z")).map(example) == {"a": 1}
    assert T.Rename({"a": "c"}).map(example) == {"c": 1, "b": 2}
    with pytest.raises(BadExample, match="'z' is missing"):
        T.Keep(("z",)).map(example)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: T.RandomFlip(probability=2.0),
            "RandomFlip.probability is 2.0; a probability is between 0 and 1",
        ),
        (lambda: T.Resize(8, resample="cubic"), "Resize.resample is 'cubic'; it is one of nearest"),
        (lambda: T.RandomResizedCrop(8, scale=(1.0, 0.5)), "scale is .* lowest <= highest"),
        (lambda: T.ColorJitter(hue=0.7), "ColorJitter.hue is 0.7"),
        (lambda: T.RandAugment(ops=("twist",)), "ops has 'twist'; the operations are identity"),
        (lambda: T.RandAugment(magnitude=30), "magnitude is 30; it is between 0 and 10"),
        (lambda: T.Normalize(range="0..255"), "Normalize.range is '0..255'"),
        (lambda: T.Normalize(mean=(0, 0, 0)), "both or neither"),
        (lambda: T.DrawCaption(templates=("{} and {}",)), "exactly one"),
        (lambda: T.DrawCaption(weights=(1.0,)), "it takes 2 weights"),
        (lambda: T.Tokenize(tokenizer=None, length=1), "Tokenize.length is 1"),
    ],
)
def test_wrong_settings_are_told_when_the_transform_is_built(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
