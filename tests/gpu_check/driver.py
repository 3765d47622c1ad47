"""What the CUDA driver does, without FlexModel: `driver.py facts|CAPTURE cuda|cpu`. Prints one line of JSON.

CAPTURE is one of CAPTURES: whether a graph that is captured in the strictest mode survives it. On a CPU a stand-in
answers, so that what is around the driver runs there too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MB = 1 << 20
RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE."""
REFUSED = 900
"""CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED."""

CAPTURES: dict[str, bool | None] = {
    "register": False,
    "register-relaxed": True,
    "query": False,
    "query-relaxed": True,
    "destroy": None,
    "destroy-relaxed": True,
}
"""What is done while a graph is captured, and whether the capture survives it; None where no documentation says so.

`register` page-locks memory on the capturing thread; `query` asks for an event, and `destroy` destroys one, on another.
With `relaxed` the thread has told the driver before that it knows what it does, as our threads do.
"""


class Gpu:
    """The driver, with what torch has of it."""

    def __init__(self) -> None:
        import torch  # seconds, and only a device needs it

        self._torch = torch
        torch.ones(1, device="cuda")
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def has_context(self) -> bool:
        """Whether this thread has one."""
        at = ctypes.c_void_p()
        self._cuda.cuCtxGetCurrent(ctypes.byref(at))
        return bool(at.value)

    def exchange(self, mode: int) -> int:
        """Sets this thread's capture mode; the driver's code, 0 if it did."""
        value = ctypes.c_int(mode)
        return self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(value))

    def register(self, at: int, size: int) -> int:
        """Page-locks memory; the driver's code."""
        return self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(at), ctypes.c_size_t(size), PORTABLE)

    def pinned(self, size: int) -> int:
        """The address of memory that the driver made itself."""
        self._memory = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        return self._memory.data_ptr()

    def copies(self, at: int, size: int, times: int = 20) -> dict[str, float]:
        """GB/s of copies from the device, and microseconds that a call takes of the host."""
        stream, source = self._torch.cuda.Stream(), self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._torch.cuda.synchronize()
        begin.record(stream)
        start = time.perf_counter()
        for _ in range(times):
            self._copy(at, source, 0, size, stream)
        host = (time.perf_counter() - start) / times * 1e6
        end.record(stream)
        end.synchronize()
        return {"GB/s": round(size * times / begin.elapsed_time(end) / 1e6, 2), "us a call": round(host, 1)}

    def item_behind(self, at: int, size: int, piece: int) -> float:
        """Milliseconds that `.item()` takes while `size` bytes leave the device in pieces."""
        stream, source = self._torch.cuda.Stream(), self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        number, took = self._torch.ones((), device="cuda"), []
        for _ in range(20):
            self._torch.cuda.synchronize()
            for offset in range(0, size, piece):
                self._copy(at, source, offset, piece, stream)
            start = time.perf_counter()
            number.item()
            took.append((time.perf_counter() - start) * 1e3)
        return round(sorted(took)[10], 3)

    def _copy(self, at: int, source: Any, offset: int, size: int, stream: Any) -> None:
        to, origin = ctypes.c_void_p(at + offset), ctypes.c_uint64(source.data_ptr() + offset)
        code = self._cuda.cuMemcpyDtoHAsync_v2(to, origin, ctypes.c_size_t(size), ctypes.c_void_p(stream.cuda_stream))
        if code:
            raise OSError(f"cuMemcpyDtoHAsync: {code}")

    def capture(self, unsafe: Callable[[Callable[[], Any]], None]) -> str:
        """Captures a graph, and calls `unsafe` meanwhile with an event that is busy; what came of the capture."""
        busy, big = self._torch.cuda.Stream(), self._torch.ones(64 * MB, device="cuda")
        events = [self._torch.cuda.Event()]
        graph, ones = self._torch.cuda.CUDAGraph(), self._torch.ones(8, device="cuda")
        try:
            with self._torch.cuda.graph(graph):  # waits for the device first
                ones.add_(1)
                with self._torch.cuda.stream(busy):  # which is not captured
                    for _ in range(200):
                        big.mul_(1.0)
                    events[0].record()
                unsafe(events.pop)
            graph.replay()
            self._torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return "survives" if ones[0].item() == 2 else "computes something else"


class _Busy:
    """An event of the stand-in's; what is unsafe goes through it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def query(self) -> bool:
        self._host.unsafe()
        return False

    def __del__(self) -> None:
        self._host.unsafe()


class Host:
    """Stands for the driver: page-locks nothing, copies by the processor, and has the documented rule of captures."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._broken: bool | None = None
        """Of the capture under way."""

    def has_context(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    def exchange(self, mode: int) -> int:
        self._of_thread.mode = mode
        return 0

    def unsafe(self) -> int:
        """A call that breaks a capture, unless this thread's mode is relaxed; the driver's code."""
        if self._broken is None or getattr(self._of_thread, "mode", 0) == RELAXED:
            return 0
        self._broken = True
        return REFUSED

    def register(self, _at: int, _size: int) -> int:
        return self.unsafe()

    def pinned(self, size: int) -> int:
        self._memory, at = slab(size)
        return at

    def copies(self, at: int, size: int) -> dict[str, float]:
        source = bytes(size)
        start = time.perf_counter()
        ctypes.memmove(at, source, size)
        took = time.perf_counter() - start
        return {"GB/s": round(size / took / 1e9, 2), "us a call": round(took * 1e6, 1)}

    def item_behind(self, at: int, size: int, piece: int) -> float:
        return self.copies(at, min(size, piece))["us a call"] / 1e3

    def capture(self, unsafe: Callable[[Callable[[], Any]], None]) -> str:
        self._broken, events = False, [_Busy(self)]
        unsafe(events.pop)
        broken, self._broken = self._broken, None
        return "operation not permitted when stream is capturing" if broken else "survives"


def slab(size: int) -> tuple[mmap.mmap, int]:
    """Shared memory as a rank's slab is (wire/src/slab/map.rs), and its address."""
    file = os.memfd_create("probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(file, 0, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    memory = mmap.mmap(file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def on_thread(function: Callable[[], Any]) -> Any:
    """What `function` returns on a fresh thread."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


def facts(driver: Gpu | Host) -> dict[str, Any]:
    """What threads have, and what memory is good for."""
    found: dict[str, Any] = {
        "context of a fresh thread": on_thread(driver.has_context),
        "exchange on a fresh thread": on_thread(lambda: driver.exchange(RELAXED)),
    }
    size = 256 * MB if isinstance(driver, Gpu) else 64 * MB
    _memory, at = slab(size)
    found["pageable, 16 MB"] = driver.copies(at, 16 * MB)
    start = time.perf_counter()
    found["register"] = driver.register(at, size)
    found["register ms"] = round((time.perf_counter() - start) * 1e3, 1)
    for each in (1, 16, 64):
        found[f"registered, {each} MB"] = driver.copies(at, each * MB)
    pinned = driver.pinned(64 * MB)
    for each in (16, 64):
        found[f"the driver's, {each} MB"] = driver.copies(pinned, each * MB)
    for piece in (64, 16, 4, 1):
        found[f".item() ms behind 64 MB in pieces of {piece} MB"] = driver.item_behind(at, 64 * MB, piece * MB)
    return found


def capture(driver: Gpu | Host, name: str) -> dict[str, Any]:
    """What came of a capture, and what the unsafe call returned."""
    what, _, relaxed = name.partition("-")
    _memory, at = slab(16 * MB)
    found: dict[str, Any] = {"name": name}

    def call(take: Callable[[], Any]) -> None:
        if relaxed:
            found["exchange"] = driver.exchange(RELAXED)
        if what == "register":
            found["code"] = driver.register(at, 16 * MB)
        elif what == "query":
            with contextlib.suppress(RuntimeError):
                found["has come"] = take().query()
        else:
            take()  # and drops it

    def unsafe(take: Callable[[], Any]) -> None:
        call(take) if what == "register" else on_thread(lambda: call(take))

    found["capture"] = driver.capture(unsafe)
    return found


if __name__ == "__main__":
    there = Gpu() if sys.argv[2] == "cuda" else Host()
    print(json.dumps(facts(there) if sys.argv[1] == "facts" else capture(there, sys.argv[1])), flush=True)
    os._exit(0)  # a context that a failed capture left is not taken down
