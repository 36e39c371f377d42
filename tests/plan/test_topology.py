"""TPU names: what they stand for, and what is refused (spec/tpu.md section 10)."""

import math

import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.plan import topology


@pytest.mark.parametrize(
    ("name", "string", "chips", "devices"),
    [
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4-128", "v4:4x4x4", 64, 64),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-64", "v5p:2x4x4", 32, 32),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-256", "v5p:4x4x8", 128, 128),
        ("v5p-384", "v5p:4x4x12", 192, 192),
        ("v5p-768", "v5p:4x8x12", 384, 384),
        ("v5p-2048", "v5p:8x8x16", 1024, 1024),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144),
        ("v5p-17920", "v5p:16x20x28", 8960, 8960),
        ("v6e-128", "v6e:8x16", 128, 128),
        ("tpu7x-2", "tpu7x:1x1x1", 1, 2),
        ("tpu7x-512", "tpu7x:4x8x8", 256, 512),
        ("v5p-128x2", "v5p:4x4x4", 128, 128),
        ("tpu7x-8x3", "tpu7x:2x2x1", 12, 24),
    ],
)
def test_names(name, string, chips, devices):
    tpu = topology.parse(name)
    assert (tpu.string, tpu.chips, tpu.num_devices) == (string, chips, devices)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5p-100", ["no v5p-100", "cores", "v5p-64 and v5p-128"]),
        ("v5e-512", ["no v5e-512", "chips", "v5e-256"]),
        ("v5e-2", ["no v5e-2", "v5e-1 and v5e-4"]),
        ("v5p-99999", ["v5p-17920"]),
        ("v5-8", ["unknown TPU 'v5'", "did you mean v5"]),
        ("v5p128", ["not a TPU's name", "v5p-128"]),
        ("v5p:4x4x4", ["not a TPU's name"]),
        ("", ["not a TPU's name"]),
        ("v5p-128x0", ["no slice", "v5p-128x2"]),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest(name, words):
    with pytest.raises(InputError) as error:
        topology.parse(name)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("chip", topology.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_size_is_a_torus_of_that_many_chips(chip):
    sold = topology.shapes(chip)
    assert list(sold) == sorted(sold)
    assert max(sold) == chip.largest
    for chips, shape in sold.items():
        assert math.prod(shape) == chips
        assert len(shape) == chip.torus


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5p-128", 4, 2), ("v5p-128", 8, 4), ("v5p-128", 16, 4), ("v5p-128", 64, 6), ("v5p-16", 8, 3), ("v5p-8", 4, 2),
        ("v5e-256", 16, 2), ("v5e-256", 256, 4), ("v5e-1", 1, 1),
    ],
)  # fmt: skip
def test_links_of_a_group(name, group, links):
    assert topology.parse(name).axis_links(group) == links
