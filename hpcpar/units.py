"""Bytes, counts and seconds as people read them."""

from __future__ import annotations

from types import MappingProxyType

COUNTS = MappingProxyType({"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12})


def format_bytes(num_bytes: float) -> str:
    """Format bytes in binary units: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_count(count: float) -> str:
    """Format a count in decimal units: 245735000000 -> '245.74B'."""
    for unit in ("", "K", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if unit == "" else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


def format_seconds(seconds: float) -> str:
    """Format a duration: 0.0123 -> '12 ms', 75 -> '1m15s', 90000 -> '1d01h'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole_seconds:02d}s"
