"""Memory of a GPU and of the host beside it, a stream, graphs: what a session needs of CUDA, through either binding."""

import ctypes
import itertools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emoexport.errors import CheckFailed, MissingRuntime, UsageError

__all__ = ["BINDINGS", "Captured", "CudaBindings", "DeviceMemory", "PyCuda", "open_device_memory"]

_CHOICE = "EMOEXPORT_CUDA"
"""The environment's variable that names a binding."""


class Captured(Protocol):
    """Work that was recorded on a stream."""

    def launch(self) -> None:
        """Begin all of it at once."""

    def destroy(self) -> None:
        """Give back what it holds; it must not be running."""


class DeviceMemory(Protocol):
    """One stream of one device, and memory for it. Whoever uses it from several threads locks it."""

    name: str
    has_graphs: bool
    """Whether calls on the stream can be captured and launched again."""
    stream: int
    """The handle that runtimes take."""

    def current(self) -> AbstractContextManager[None]:
        """A block in which the calling thread uses the device."""

    def allocate(self, size: int) -> int:
        """Reserve bytes on the device, and give their address."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in host memory that the device copies from and to by itself."""

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Begin to copy a contiguous pinned array to the device."""

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Begin to copy from the device to a contiguous pinned array."""

    def synchronize(self) -> None:
        """Wait for all that was begun."""

    def capture(self, work: Callable[[], object]) -> Captured:
        """Record what `work` begins on the stream, without doing it."""

    def time(self, *works: Callable[[], object]) -> list[float]:
        """Begin works one after the other and wait; how long each took on the device, in milliseconds."""

    def close(self) -> None:
        """Give everything back."""


class CudaBindings:
    """By NVIDIA's `cuda-bindings`, wheels that need no toolkit.

    Source: CUDA Runtime API 13, sections 6.4 (streams), 6.5 (events), 6.10 (memory), 6.30 (graphs).
    """

    name = "cuda-bindings"
    has_graphs = True

    def __init__(self) -> None:
        from cuda.bindings import runtime  # noqa: PLC0415 (only where there is a device)

        self._cuda = runtime
        self._addresses: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[_CudaGraph] = []
        self._ask("cudaSetDevice", 0)
        self._stream = self._ask("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def current(self) -> AbstractContextManager[None]:
        """The device is the thread's from now on, as the runtime's interface has it."""
        self._ask("cudaSetDevice", 0)
        return nullcontext()

    def allocate(self, size: int) -> int:
        """As the protocol says."""
        self._addresses.append(int(self._ask("cudaMalloc", size)))
        return self._addresses[-1]

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """As the protocol says."""
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self._ask("cudaMallocHost", size))
        self._pinned.append(address)
        return _array_at(address, size).view(dtype).reshape(shape)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """As the protocol says."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """As the protocol says."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def synchronize(self) -> None:
        """As the protocol says."""
        self._ask("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], object]) -> Captured:
        """As the protocol says."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._ask("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        finally:  # or the stream would stay in capture, and nothing could be begun on it again
            graph = self._ask("cudaStreamEndCapture", self._stream)
        executable = self._ask("cudaGraphInstantiate", graph, 0)
        self._ask("cudaGraphDestroy", graph)
        self._graphs.append(_CudaGraph(self._ask, executable, self._stream))
        return self._graphs[-1]

    def time(self, *works: Callable[[], object]) -> list[float]:
        """As the protocol says."""
        events = [self._ask("cudaEventCreate") for _ in range(len(works) + 1)]
        self._ask("cudaEventRecord", events[0], self._stream)
        for work, event in zip(works, events[1:], strict=True):
            work()
            self._ask("cudaEventRecord", event, self._stream)
        self.synchronize()
        found = [float(self._ask("cudaEventElapsedTime", *pair)) for pair in itertools.pairwise(events)]
        for event in events:
            self._ask("cudaEventDestroy", event)
        return found

    def close(self) -> None:
        """As the protocol says."""
        with self.current():
            for graph in self._graphs:
                graph.destroy()
            self._graphs.clear()
            for kind, handles in (
                ("cudaFree", self._addresses),
                ("cudaFreeHost", self._pinned),
                ("cudaStreamDestroy", [self._stream]),
            ):
                for handle in handles:
                    self._ask(kind, handle)
                handles.clear()

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        self._ask("cudaMemcpyAsync", target, source, size, direction, self._stream)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call CUDA, whose first result is always a status."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            raise CheckFailed(f"CUDA refused {name}: {status.name} ({int(status)}).", hint="emoexport doctor")
        return results[0] if results else None


class _CudaGraph:
    """A graph that was instantiated."""

    def __init__(self, ask: Callable[..., Any], executable: Any, stream: Any) -> None:
        self._ask, self._executable, self._stream = ask, executable, stream

    def launch(self) -> None:
        self._ask("cudaGraphLaunch", self._executable, self._stream)

    def destroy(self) -> None:
        if self._executable is not None:
            self._ask("cudaGraphExecDestroy", self._executable)
            self._executable = None


class PyCuda:
    """By `pycuda`, in the device's primary context, which TensorRT and PyTorch use too. It has no graphs."""

    name = "pycuda"
    has_graphs = False

    def __init__(self) -> None:
        import pycuda.driver as cuda  # noqa: PLC0415 (it cannot be imported without a driver)

        cuda.init()
        self._cuda = cuda
        self._context = cuda.Device(0).retain_primary_context()
        self._allocations: list[Any] = []
        with self.current():
            self._stream = cuda.Stream()
        self.stream = int(self._stream.handle)

    @contextmanager
    def current(self) -> Any:
        """Contexts are a thread's own here: it is pushed, and popped after the block."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def allocate(self, size: int) -> int:
        """As the protocol says."""
        self._allocations.append(self._cuda.mem_alloc(size))
        return int(self._allocations[-1])

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """As the protocol says."""
        array: NDArray[Any] = self._cuda.pagelocked_empty(shape, dtype)
        return array

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """As the protocol says."""
        self._cuda.memcpy_htod_async(address, array, self._stream)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """As the protocol says."""
        self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def synchronize(self) -> None:
        """As the protocol says."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], object]) -> Captured:  # noqa: ARG002 (the protocol's)
        """There is none: pycuda has no graphs."""
        raise CheckFailed("pycuda has no CUDA graphs.", hint=f"{_CHOICE}={CudaBindings.name}")

    def time(self, *works: Callable[[], object]) -> list[float]:
        """As the protocol says."""
        events = [self._cuda.Event() for _ in range(len(works) + 1)]
        events[0].record(self._stream)
        for work, event in zip(works, events[1:], strict=True):
            work()
            event.record(self._stream)
        self.synchronize()
        return [float(first.time_till(second)) for first, second in itertools.pairwise(events)]

    def close(self) -> None:
        """As the protocol says."""
        with self.current():
            for allocation in self._allocations:
                allocation.free()
            self._allocations.clear()
        self._context.detach()


BINDINGS: Mapping[str, Callable[[], DeviceMemory]] = {CudaBindings.name: CudaBindings, PyCuda.name: PyCuda}


def open_device_memory(name: str | None = None) -> DeviceMemory:
    """Open the first binding that is installed.

    Args:
        name: of `BINDINGS`; None for what the environment's `EMOEXPORT_CUDA` names, or else any.

    Raises:
        UsageError: if there is no such binding.
        MissingRuntime: if it, or each of them, is not installed.
    """
    name = name or os.environ.get(_CHOICE)
    if name is not None and name not in BINDINGS:
        raise UsageError(f"'{name}' is no binding of CUDA; known are {', '.join(BINDINGS)}.", hint=f"unset {_CHOICE}")
    problems = []
    for each in [name] if name else BINDINGS:
        try:
            return BINDINGS[each]()
        except ImportError as err:
            problems.append(f"{each} cannot be imported: {err}")
    raise MissingRuntime(f"{'; '.join(problems)}.", hint=f"pip install {name or CudaBindings.name}")


def _array_at(address: int, size: int) -> NDArray[np.uint8]:
    """Bytes at an address of the host as an array, which does not own them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
