"""Which CUDA devices are here, asked of the driver alone: no package is needed, and without a driver nothing ends.

Runtimes are asked afterwards: where there is no device, some of them end the process and others use the CPU unasked.
"""

import ctypes
import functools
import sys
from dataclasses import dataclass

from emoexport.errors import MissingRuntime

__all__ = ["Cuda", "Device", "find_cuda", "require_device"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""`CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*` of the driver's interface, which does not change."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU."""

    index: int
    name: str
    compute_capability: str
    """As in `9.0`."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """What the driver says."""

    devices: tuple[Device, ...] = ()
    version: str | None = None
    """The newest CUDA that the driver runs, as in `13.0`; None without a driver."""
    problem: str = ""
    """Why there is no device, in a sentence without its stop; empty if there is one."""


@functools.cache
def find_cuda() -> Cuda:
    """Ask the driver for its devices. The answer is kept: devices do not come and go.

    Source: CUDA Driver API, sections 6.2 to 6.5 (`cuInit`, `cuDriverGetVersion`, `cuDeviceGet*`).
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return Cuda(problem=f"there is no NVIDIA driver here ({_LIBRARY} cannot be loaded)")
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    status = driver.cuInit(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(number))
    if status != 0:
        return Cuda(version=version, problem=f"the NVIDIA driver finds no device (its error {status})")
    if number.value == 0:
        return Cuda(version=version, problem="the NVIDIA driver lists no device")
    return Cuda(version=version, devices=tuple(_device(driver, index) for index in range(number.value)))


def require_device() -> Device:
    """The first device, which is the one that runtimes use unless told otherwise.

    Raises:
        MissingRuntime: if there is none.
    """
    found = find_cuda()
    if not found.devices:
        raise MissingRuntime(
            f"{found.problem[0].upper()}{found.problem[1:]}; a CUDA device is needed.",
            hint="emoexport doctor says what this machine can do",
        )
    return found.devices[0]


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(str(value.value))
    return Device(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(capability),
        memory_bytes=memory.value,
    )
