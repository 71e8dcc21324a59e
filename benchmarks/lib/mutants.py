"""Damaged files: the bytes of a valid file with random changes."""

import numpy as np


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Return the bytes with up to five random changes, insertions or deletions."""
    body = bytearray(content)
    for _ in range(random.integers(1, 6)):
        if not body:
            break
        at, length = random.integers(len(body)), int(random.integers(1, 40))
        match random.integers(5):
            case 0:
                body[at] = random.integers(256)
            case 1:
                body[at : at + length] = random.bytes(length)
            case 2:
                body[at:at] = random.bytes(length)
            case 3:
                del body[at : at + length]
            case 4:
                del body[max(at, 20) :]
    return bytes(body)
