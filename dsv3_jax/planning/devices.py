"""Peak arithmetic and memory bandwidth of known devices, for MFU and rooflines."""

# Dense BF16 FLOP/s of the vendor's data sheet (half of the number quoted with sparsity), by a part of JAX's
# ``device_kind``. The first match counts, so a narrower name stands before a wider one.
_PEAK_BF16 = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H800 PCIe", 756e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
)

# Bytes/s of memory, of the same sheets.
_BANDWIDTH = (
    ("H100 PCIe", 2.0e12),
    ("H100 NVL", 3.9e12),
    ("H800 PCIe", 2.0e12),
    ("GH200", 4.0e12),
    ("H200", 4.8e12),
    ("H100", 3.35e12),
    ("H800", 3.35e12),
    ("H20", 4.0e12),
    ("GB200", 8.0e12),
    ("B200", 8.0e12),
)

FP8_OVER_BF16 = 2
"""Dense FP8 FLOP/s of Hopper and Blackwell over their BF16."""


def peak_bandwidth(device_kind: str) -> float | None:
    """Bytes/s of one device's memory, or None where it is not known; ``device_kind`` as in :func:`peak_flops`."""
    return next((peak for part, peak in _BANDWIDTH if part.lower() in device_kind.lower()), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense BF16 FLOP/s of one device, or None where it is not known.

    Args:
        device_kind: as ``jax.devices()[0].device_kind`` says it, such as ``"NVIDIA H200"``.
    """
    for part, peak in _PEAK_BF16:
        if part.lower() in device_kind.lower():
            return peak
    return None
