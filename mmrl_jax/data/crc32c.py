"""The checksum of TFRecord files, CRC-32C (Castagnoli; RFC 3720, appendix B.4), in numpy.

The register after a message is linear in its bits, so that the message is divided into stripes of
equal length, whose registers are computed side by side and then combined pairwise: appending n
bytes applies a fixed linear map A^n to the register.
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # Reflected.
ONES = 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C of bytes."""
    if len(data) < 64:  # Too short for stripes to pay off.
        values, register = _byte_values(), ONES
        for byte in data:
            register = values[(register ^ byte) & 0xFF] ^ (register >> 8)
        return register ^ ONES
    stripe = 1 << min(max(len(data).bit_length() // 2 - 2, 4), 10)
    # Zeros at the front do not change a register that begins at 0. The initial register of ones is
    # equivalent to inverting the first four bytes.
    stripes = -(-len(data) // stripe)
    padded = np.zeros(stripes * stripe, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    first = len(padded) - len(data)
    padded[first : first + 4] ^= 0xFF
    words = np.ascontiguousarray(padded.view("<u2").reshape(stripes, -1).T)
    table = _word_table()
    registers = np.zeros(stripes, np.uint32)
    for word in words:
        registers = table[(registers ^ word) & 0xFFFF] ^ (registers >> 16)
    return int(_combine(registers, stripe)) ^ ONES


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum that TFRecord stores: rotated, with a constant added."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES


def _combine(registers: np.ndarray, stripe: int) -> np.uint32:
    """Returns the register of a message from those of its stripes, in order.

    Args:
      registers: Registers of the stripes, uint32 [S].
      stripe: Number of bytes of a stripe, a power of two.
    """
    power = stripe.bit_length() - 1
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        tables, front = _append_zeros(power), registers[::2]
        shifted = tables[0][front & 0xFF]
        for i in range(1, 4):
            shifted = shifted ^ tables[i][(front >> (8 * i)) & 0xFF]
        registers, power = shifted ^ registers[1::2], power + 1
    return registers[0]


@functools.cache
def _byte_table() -> np.ndarray:
    """Registers after one byte, uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _byte_values() -> list[int]:
    return _byte_table().tolist()


@functools.cache
def _word_table() -> np.ndarray:
    """Registers after two bytes, uint32 [65536]."""
    table, words = _byte_table(), np.arange(65536, dtype=np.uint32)
    after_one = table[words & 0xFF] ^ (words >> 8)
    return table[after_one & 0xFF] ^ (after_one >> 8)


@functools.cache
def _append_zeros(power: int) -> np.ndarray:
    """The map that appends 2^power zero bytes, as tables of each byte of a register [4, 256]."""
    shifts = np.arange(4, dtype=np.uint32)[:, None] * np.uint32(8)
    registers = np.arange(256, dtype=np.uint32)[None] << shifts
    if power == 0:
        return _byte_table()[registers & 0xFF] ^ (registers >> 8)
    half = _append_zeros(power - 1)
    for _ in range(2):
        registers = functools.reduce(
            np.bitwise_xor, (half[i][(registers >> (8 * i)) & 0xFF] for i in range(4))
        )
    return registers
