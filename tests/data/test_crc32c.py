"""Tests of the checksum against the published examples and a bitwise definition."""

import numpy as np
import pytest

from mmrl_jax.data.crc32c import crc32c, masked_crc32c


def bitwise(data):
    """Divides by the polynomial bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    "data, expected",
    [
        # RFC 3720, appendix B.4, whose bytes are listed in reverse.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),  # The check value of the catalogues of checksums.
        (b"", 0),
    ],
)
def test_published_examples(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65, 127, 128, 1000, 4097, 33_333])
def test_every_length_is_divided_by_the_polynomial(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bitwise(data)


def test_the_mask_of_tfrecord():
    # Rotated right by 15 bits, plus the constant: 0xE3069283 rotated is 0x2507C60D.
    assert masked_crc32c(b"123456789") == (0x2507C60D + 0xA282EAD8) & 0xFFFFFFFF
