"""Packing is the inverse of unpacking, agrees with its slow twin, and holds k bits a code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.pack import WIDTHS, pack, pack_bits, pack_slowly, unpack, unpack_bits

SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=4)


def codes(shape: list[int], bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(SHAPES, st.sampled_from(WIDTHS), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_pack_equals_its_slow_twin_and_unpack_is_its_inverse(shape: list[int], bits: int, seed: int) -> None:
    values = codes(shape, bits, seed)
    packed = pack(values, bits)
    assert packed.numel() == -(-values.numel() * bits // 8)
    assert torch.equal(packed, pack_slowly(values, bits))
    assert torch.equal(unpack(packed, bits, shape), values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_codes_pack_in_their_logical_order(bits: int) -> None:
    values = codes([3, 5, 4, 6], bits, 0)
    for view in (values.permute(0, 2, 3, 1), values[:, ::2], values.to(memory_format=torch.channels_last)):
        assert torch.equal(unpack(pack(view, bits), bits, view.shape), view)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 5), (2, 3, 4, 5)])
def test_masks_take_one_bit_each(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert unpack_bits(packed, shape).dtype == torch.bool
    assert torch.equal(unpack_bits(packed, shape), mask)


@pytest.mark.parametrize("bits", WIDTHS)
def test_compiles_to_one_graph(bits: int) -> None:
    def there_and_back(values: torch.Tensor) -> torch.Tensor:
        return unpack(pack(values, bits), bits, values.shape)

    values = codes([3, 7, 5], bits, 1)
    assert torch.equal(torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(values), values)


def test_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="accepted: 1, 2, 4, 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(4), 2)
