"""Peak arithmetic of known devices, for MFU."""

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


def peak_flops(device_kind: str) -> float | None:
    """Dense BF16 FLOP/s of one device, or None where it is not known.

    Args:
        device_kind: as ``jax.devices()[0].device_kind`` says it, such as ``"NVIDIA H200"``.
    """
    for part, peak in _PEAK_BF16:
        if part.lower() in device_kind.lower():
            return peak
    return None
