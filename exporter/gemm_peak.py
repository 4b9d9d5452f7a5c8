"""What a machine can do at most: the operations a second of a large matrix product, measured."""

import time
from collections.abc import Callable

import torch

__all__ = ["gemm_peaks"]

_SIZE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices: large enough that nothing but the product takes time."""

_SECONDS = 1.0
"""Of trying, for each type of number."""

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_FAST = {"cpu": ("fp32", "bf16"), "cuda": tuple(_TYPES)}
"""Types that PyTorch has a product worth the name for."""


def gemm_peaks(device: str, numbers: tuple[str, ...] = tuple(_TYPES)) -> dict[str, float]:
    """Measure the product of two square matrices, by PyTorch's own library for it, without TF32.

    Args:
        device: `cpu` or `cuda`.
        numbers: types, as in `Precision.number`.

    Returns:
        By type of number, 10^12 operations a second, 2 a multiply-add, the best of a second's tries. Types that PyTorch
        has no fast product for, as INT8 on CPUs, are left out.
    """
    return {number: float(f"{_peak(device, _TYPES[number]):.4g}") for number in numbers if number in _FAST[device]}


def _peak(device: str, dtype: torch.dtype) -> float:
    size = _SIZE[device]
    # Of random numbers: with equal ones a GPU draws less power, and its clock is higher than in any real work.
    if dtype is torch.int8:
        one, rows = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
        other = rows.t()  # by columns, as cuBLASLt has its fast kernels for
        seconds = _least(device, lambda: torch._int_mm(one, other))
    else:
        one, other = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))
        seconds = _least(device, lambda: one @ other)
    return 2 * size**3 / seconds / 1e12


def _least(device: str, product: Callable[[], object]) -> float:
    """Seconds of the quickest call, once the first has passed."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    product()
    wait()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        start = time.perf_counter()
        product()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
