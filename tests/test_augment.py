"""Fast functions against their slow twins, and randomness that depends on nothing but its arguments."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data.augment import (
    Augment,
    Draw,
    Normalise,
    crop_boxes,
    crop_flip,
    crop_flip_slow,
    cutout_,
    cutout_slow,
    resize,
    resize_slow,
    resized_crop,
    resized_crop_slow,
    splitmix64,
)

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def images(n: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def splitmix64_slow(key: int, counter: int) -> int:
    bits = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs for state 1234567, as the test vectors of the Rosetta Code task state them.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [bits & MASK for bits in splitmix64(1234567, torch.arange(5)).tolist()] == expected


@given(key=st.integers(-(2**63), 2**63 - 1), counter=st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_int64_arithmetic_is_that_of_whole_numbers(key: int, counter: int) -> None:
    assert int(splitmix64(key, torch.tensor([counter]))) & MASK == splitmix64_slow(key & MASK, counter)


def test_randomness_does_not_depend_on_the_batch() -> None:
    draw, samples = Draw(seed=3, epoch=7), torch.arange(1000)
    together = draw.uniform("x", samples)
    chosen = torch.tensor([999, 3, 500])
    assert torch.equal(draw.uniform("x", chosen), together[chosen])
    assert torch.equal(draw.integers("x", chosen, 9), draw.integers("x", samples, 9)[chosen])


@pytest.mark.parametrize("other", [Draw(4, 7), Draw(3, 8)])
def test_seed_epoch_and_purpose_each_change_everything(other: Draw) -> None:
    draw, samples = Draw(3, 7), torch.arange(10_000)
    for a, b in (
        (draw.bits("x", samples), other.bits("x", samples)),
        (draw.bits("x", samples), draw.bits("y", samples)),
    ):
        assert not (a == b).any()
    x, y = draw.uniform("x", samples), other.uniform("x", samples)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.05


def test_numbers_are_uniform() -> None:
    samples = torch.arange(90_000)
    x = Draw(0, 0).uniform("x", samples)
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 4 / math.sqrt(12 * 90_000)
    counts = torch.bincount(Draw(0, 0).integers("crop", samples, 9), minlength=9)
    assert len(counts) == 9
    chi_squared = float(((counts - 10_000.0) ** 2 / 10_000).sum())
    assert chi_squared < 26.1  # 0.1 % of fair draws exceed this with 8 degrees of freedom


def test_orders_are_permutations_that_change_with_the_epoch() -> None:
    first, second = Draw(0, 0).order(1000), Draw(0, 1).order(1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, Draw(0, 0).order(1000))


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (28, 28, 2), (5, 7, 3), (8, 8, 0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_equal_their_slow_twin(height: int, width: int, padding: int, channels: int) -> None:
    n = 2 * (2 * padding + 1) ** 2  # every crop, mirrored and not
    pixels = images(n, channels, height, width)
    which = torch.arange(n)
    flip, top, left = which % 2, which // 2 // (2 * padding + 1), which // 2 % (2 * padding + 1)
    fast = crop_flip(pixels, top, left, flip, padding)
    assert fast.dtype == torch.uint8
    assert fast.is_contiguous()
    assert torch.equal(fast, crop_flip_slow(pixels, top, left, flip, padding))


def test_the_middle_crop_is_the_image() -> None:
    pixels, four, none = images(3, 3, 32, 32), torch.full((3,), 4), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(crop_flip(pixels, four, four, none, 4), pixels)
    assert torch.equal(crop_flip(pixels, four, four, none + 1, 4), pixels.flip(3))


def test_normalise_equals_its_slow_twin_to_the_bit_and_the_formula_closely() -> None:
    pixels, mean, std = images(8, 3, 32, 32), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    normalise = Normalise.of(mean, std, CPU)
    x = normalise(pixels)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(x, normalise.slow(pixels))
    exact = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", [1, 4, 7, 40])
def test_cutout_equals_its_slow_twin(side: int) -> None:
    x = torch.randn(36, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    y_centre, x_centre = torch.arange(36) // 6, torch.arange(36) % 6
    expected = cutout_slow(x, y_centre, x_centre, side)
    assert (expected == 0).any()
    assert torch.equal(cutout_(x.clone(), y_centre, x_centre, side), expected)


@pytest.mark.parametrize("size", [8, 16, 28])
def test_resize_equals_its_slow_twin(size: int) -> None:
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(x, size), resize_slow(x, size))
    assert resize(x, size).shape == (5, 3, size, size)


@pytest.mark.parametrize("size", [6, 16, 33])
def test_resized_crops_equal_their_slow_twin(size: int) -> None:
    pixels = images(200, 3, 20, 26)
    boxes = crop_boxes(Draw(0, 0), torch.arange(200), 20, 26, (0.08, 1.0))
    fast, slow = resized_crop(pixels, boxes, size), resized_crop_slow(pixels, boxes, size)
    difference = (fast.int() - slow.int()).abs()
    assert int(difference.max()) <= 1, "sums in another order round differently where they end in a half"
    assert float(difference.float().mean()) < 5e-3


def test_boxes_lie_inside_and_follow_the_recipe() -> None:
    height, width = 48, 64
    boxes = crop_boxes(Draw(0, 0), torch.arange(20_000), height, width, (0.08, 1.0))
    top, left, box_height, box_width = boxes.T
    assert int(boxes[:, :2].min()) == 0
    assert int((top + box_height).max()) == height
    assert int((left + box_width).max()) == width
    share = (box_height * box_width) / (height * width)
    assert 0.07 < float(share.min()) < 0.1
    assert float(share.max()) > 0.95


def test_boxes_are_as_often_wide_as_high() -> None:
    boxes = crop_boxes(Draw(0, 0), torch.arange(20_000), 64, 64, (0.08, 1.0))
    aspect = boxes[:, 3] / boxes[:, 2]
    assert 0.65 < float(aspect.min()) < 0.75
    assert 1.33 < float(aspect.max()) < 1.5
    assert abs(float(aspect.log().mean())) < 0.03


def test_a_box_that_never_fits_is_the_centre() -> None:
    box = crop_boxes(Draw(0, 0), torch.tensor([5]), 10, 100, (1.0, 1.0))
    assert box.tolist() == [[0, (100 - 13) // 2, 10, 13]]


def test_a_sample_is_augmented_alike_in_every_batch() -> None:
    pixels, samples, draw = images(64, 3, 32, 32), torch.arange(64), Draw(1, 2)
    augment = Augment(crop=4, flip=True, cutout=8)
    x = augment.erase_(augment.pixels(pixels, samples, draw).float(), samples, draw)
    few = torch.tensor([40, 2, 63])
    y = augment.erase_(augment.pixels(pixels[few], few, draw).float(), few, draw)
    assert torch.equal(x[few], y)
    assert not torch.equal(x, pixels.float())


def test_no_augmentation_is_the_identity() -> None:
    pixels, samples, draw = images(4, 1, 8, 8), torch.arange(4), Draw(0, 0)
    assert torch.equal(Augment().pixels(pixels, samples, draw), pixels)
    assert torch.equal(Augment().erase_(pixels.float(), samples, draw), pixels.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers() -> None:
    samples, draw, gpu = torch.arange(5000), Draw(1, 2), torch.device("cuda")
    pixels, augment = images(5000, 3, 32, 32), Augment(crop=4, flip=True, cutout=8)
    assert torch.equal(draw.bits("x", samples), draw.bits("x", samples.cuda()).cpu())
    assert torch.equal(draw.uniform("x", samples), draw.uniform("x", samples.cuda()).cpu())
    there = augment.pixels(pixels.cuda(), samples.cuda(), draw)
    here = augment.pixels(pixels, samples, draw)
    assert torch.equal(here, there.cpu())
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    torch.testing.assert_close(Normalise.of(mean, std, CPU)(here), Normalise.of(mean, std, gpu)(there).cpu())


def test_whole_batches_are_fast() -> None:
    """CPU time, so that a busy machine does not matter much; some 200,000 CIFAR images a second, 5,500 through Pillow."""
    pixels, samples = images(128, 3, 32, 32), torch.arange(128)
    augment, normalise = Augment(crop=4, flip=True), Normalise.of([0.5] * 3, [0.25] * 3, CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for epoch in range(20):
        started = time.thread_time()
        normalise(augment.pixels(pixels, samples, Draw(0, epoch)))
        seconds.append(time.thread_time() - started)
    torch.set_num_threads(threads)
    assert 128 / min(seconds) > 30_000
