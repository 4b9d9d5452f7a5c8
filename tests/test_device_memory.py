"""Both bindings of CUDA against fakes that have the names of the real ones, and one session's worth of work."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from emoexport.engines import device_memory
from emoexport.engines.cuda import find_cuda
from emoexport.engines.device_memory import BINDINGS, CudaBindings, open_device_memory
from emoexport.errors import CheckFailed, MissingRuntime, UsageError

STREAM = 11


class FakeCuda:
    """CUDA's runtime as `cuda.bindings.runtime` shows it: statuses first, memory of the host, a stream that waits."""

    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray] = {}
        self.begun: list = []
        self.recorded: list | None = None
        self.live = {"stream": 0, "event": 0, "graph": 0, "executable": 0}
        self.fails: str | None = None

    def answer(self, name: str, *arguments):
        status = _Status(9 if self.fails == name else 0)
        if status:
            return (status,)
        results = getattr(self, f"do_{name}")(*arguments)
        return (status, *results) if isinstance(results, tuple) else (status,)

    def begin(self, work) -> None:
        (self.begun if self.recorded is None else self.recorded).append(work)

    def do_cudaSetDevice(self, index) -> None:
        assert index == 0

    def do_cudaStreamCreateWithFlags(self, _):
        self.live["stream"] += 1
        return (STREAM,)

    def do_cudaMalloc(self, size):
        buffer = np.full(size, 255, np.uint8)
        self.buffers[buffer.ctypes.data] = buffer
        return (buffer.ctypes.data,)

    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, address) -> None:
        del self.buffers[address]

    do_cudaFreeHost = do_cudaFree

    def do_cudaStreamDestroy(self, _) -> None:
        self.live["stream"] -= 1

    def do_cudaMemcpyAsync(self, target, source, size, direction, stream) -> None:
        assert stream == STREAM
        assert (target if direction == "in" else source) in self.buffers
        self.begin(lambda: ctypes.memmove(target, source, size))

    def do_cudaStreamSynchronize(self, stream) -> None:
        assert stream == STREAM
        begun, self.begun = self.begun, []
        for work in begun:
            work()

    def do_cudaStreamBeginCapture(self, stream, mode) -> None:
        assert mode == "thread"
        self.recorded = []

    def do_cudaStreamEndCapture(self, _):
        recorded, self.recorded = self.recorded, None
        self.live["graph"] += 1
        return (recorded,)

    def do_cudaGraphInstantiate(self, graph, _):
        self.live["executable"] += 1
        return (graph,)

    def do_cudaGraphDestroy(self, _) -> None:
        self.live["graph"] -= 1

    def do_cudaGraphExecDestroy(self, _) -> None:
        self.live["executable"] -= 1

    def do_cudaGraphLaunch(self, graph, stream) -> None:
        self.begun += graph

    def do_cudaEventCreate(self):
        self.live["event"] += 1
        return (SimpleNamespace(at=None),)

    def do_cudaEventRecord(self, event, stream) -> None:
        def record() -> None:
            event.at = 1.5 * sum(other is not event for other in self.events)
            self.events.append(event)

        self.events = getattr(self, "events", [])
        self.begin(record)

    def do_cudaEventElapsedTime(self, first, second):
        return (second.at - first.at,)

    def do_cudaEventDestroy(self, _) -> None:
        self.live["event"] -= 1


class _Status(int):
    name = "cudaErrorFake"


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    """`cuda.bindings.runtime`, which has the names that the real one has and no other."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    cuda = FakeCuda()
    module = ModuleType("cuda.bindings.runtime")
    for name in [name.removeprefix("do_") for name in dir(cuda) if name.startswith("do_")]:
        assert hasattr(real, name), name
        setattr(module, name, lambda *arguments, name=name: cuda.answer(name, *arguments))
    module.cudaStreamNonBlocking = int(real.cudaStreamNonBlocking)
    assert hasattr(real.cudaMemcpyKind, "cudaMemcpyHostToDevice")
    assert hasattr(real.cudaMemcpyKind, "cudaMemcpyDeviceToHost")
    assert hasattr(real.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    module.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
    module.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    import cuda.bindings as package

    monkeypatch.setattr(package, "runtime", module, raising=False)
    return cuda


class FakePyCuda(ModuleType):
    """`pycuda.driver`, as its documentation has it."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.pushed = 0
        self.begun: list = []
        self.freed = 0
        fake = self

        class Context:
            def push(self) -> None:
                fake.pushed += 1

            def pop(self) -> None:
                fake.pushed -= 1

            def detach(self) -> None:
                assert fake.pushed == 0

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0

            def retain_primary_context(self) -> Context:
                return Context()

        class Stream:
            handle = STREAM

            def __init__(self) -> None:
                assert fake.pushed == 1, "no context is current"

            def synchronize(self) -> None:
                begun, fake.begun = fake.begun, []
                for work in begun:
                    work()

        class Event:
            def record(self, stream) -> None:
                fake.begun.append(lambda: setattr(self, "at", len(fake.marks)) or fake.marks.append(self))

            def time_till(self, other) -> float:
                return 1.5 * (other.at - self.at)

        class Allocation:
            def __init__(self, size: int) -> None:
                self.bytes = np.zeros(size, np.uint8)

            def __int__(self) -> int:
                return self.bytes.ctypes.data

            def free(self) -> None:
                fake.freed += 1

        self.marks: list = []
        self.Device, self.Stream, self.Event, self.mem_alloc = Device, Stream, Event, Allocation

    def init(self) -> None:
        """Nothing to do."""

    def pagelocked_empty(self, shape, dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream) -> None:
        self.begun.append(lambda: ctypes.memmove(target, source.ctypes.data, source.nbytes))

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream) -> None:
        self.begun.append(lambda: ctypes.memmove(target.ctypes.data, source, target.nbytes))


@pytest.fixture
def pycuda(monkeypatch) -> FakePyCuda:
    package, driver = ModuleType("pycuda"), FakePyCuda()
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    return driver


@pytest.mark.parametrize("name", BINDINGS)
def test_what_goes_to_the_device_comes_back(name, fake, pycuda):
    memory = open_device_memory(name)
    with memory.current():
        there, back = memory.pinned((3, 4), np.dtype(np.float32)), memory.pinned((3, 4), np.dtype(np.float32))
        address = memory.allocate(there.nbytes)
        there[...] = np.arange(12).reshape(3, 4)
        back[...] = 0
        memory.copy_in(address, there)
        memory.copy_out(back[:2], address)
        assert not back.any(), "a copy is begun, not made"
        memory.synchronize()
        assert np.array_equal(back[:2], there[:2])
        assert not back[2].any()
        took = memory.time(lambda: memory.copy_in(address, there), lambda: memory.copy_out(back, address))
    assert took == [1.5, 1.5]
    assert np.array_equal(back, there)
    assert memory.stream == STREAM
    memory.close()
    assert not fake.buffers
    assert set(fake.live.values()) == {0}
    assert pycuda.pushed == 0
    assert pycuda.freed == (name == "pycuda")


def test_a_captured_call_reads_what_is_there_when_it_is_launched(fake):
    memory = CudaBindings()
    there, back = memory.pinned((4,), np.dtype(np.uint8)), memory.pinned((4,), np.dtype(np.uint8))
    address = memory.allocate(4)
    back[...] = 0

    def work() -> None:
        memory.copy_in(address, there)
        memory.copy_out(back, address)

    graph = memory.capture(work)
    memory.synchronize()
    assert not back.any(), "what is captured is not done"
    for value in (1, 2):
        there[...] = value
        graph.launch()
        memory.synchronize()
        assert (back == value).all()
    graph.destroy()
    assert fake.live["executable"] == 0
    memory.close()
    assert set(fake.live.values()) == {0}


def test_a_capture_that_fails_leaves_the_stream_usable(fake):
    memory = CudaBindings()

    def fail() -> None:
        raise CheckFailed("no")

    with pytest.raises(CheckFailed):
        memory.capture(fail)
    assert fake.recorded is None
    assert fake.live["executable"] == 0


def test_cuda_says_what_it_refused(fake):
    memory = CudaBindings()
    fake.fails = "cudaMalloc"
    with pytest.raises(CheckFailed, match=r"CUDA refused cudaMalloc: cudaErrorFake \(9\)"):
        memory.allocate(1 << 40)


def test_the_environment_names_a_binding(fake, pycuda, monkeypatch):
    assert open_device_memory().name == "cuda-bindings"
    monkeypatch.setenv("EMOEXPORT_CUDA", "pycuda")
    assert open_device_memory().name == "pycuda"
    monkeypatch.setenv("EMOEXPORT_CUDA", "cupy")
    with pytest.raises(UsageError, match="'cupy' is no binding of CUDA; known are cuda-bindings, pycuda"):
        open_device_memory()


def test_a_binding_that_is_not_there(pycuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert open_device_memory().name == "pycuda"
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.delitem(sys.modules, "pycuda")
    with pytest.raises(
        MissingRuntime, match=r"cuda-bindings cannot be imported: .*; pycuda cannot be imported"
    ) as caught:
        open_device_memory()
    assert caught.value.exit_code == 3
    assert caught.value.hint == "pip install cuda-bindings"


@pytest.mark.gpu
@pytest.mark.parametrize("name", BINDINGS)
def test_a_real_device(name):
    if not find_cuda().devices:
        pytest.skip("there is no CUDA device")
    try:
        memory = device_memory.open_device_memory(name)
    except MissingRuntime as err:
        pytest.skip(str(err))
    with memory.current():
        there, back = memory.pinned((1000,), np.dtype(np.float32)), memory.pinned((1000,), np.dtype(np.float32))
        address = memory.allocate(there.nbytes)
        there[...], back[...] = np.arange(1000), 0
        memory.copy_in(address, there)
        memory.copy_out(back, address)
        memory.synchronize()
        assert np.array_equal(there, back)
        assert all(took >= 0 for took in memory.time(lambda: memory.copy_in(address, there)))
    memory.close()
