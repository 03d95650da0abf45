"""Seeds that depend on what they are for, so that no two uses share a stream."""

from __future__ import annotations

import hashlib


def derive(seed: int, role: str) -> int:
    """Return a seed for ``role`` (``agent``, ``training``, ``evaluation``, ...).

    It lies below 2**31, which every simulator takes.

    Equal seeds give different streams in different roles; with the same number for training and
    evaluation, say, the evaluation's start states would be those of training.
    """
    digest = hashlib.sha256(f"{role}:{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
