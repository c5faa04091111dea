"""Kernels that are compiled before they are launched. They and Triton's own mode are made up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
import triton
from triton.runtime._async_compile import active_mode
from triton.tools.tensor_descriptor import TensorDescriptor

from vitgraph import launch
from vitgraph.attention.select import select_attention
from vitgraph.launch import compiling, launch_kernel, meanwhile, only_compiles

DEVICE = torch.device("cpu")


class Compiled:
    """As Triton has it: asking for `run` loads it."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.loaded_by = fails, ""

    @property
    def run(self) -> object:
        self.loaded_by = threading.current_thread().name
        if self.fails:
            raise RuntimeError("out of shared memory")
        return self


def compiled_by_triton(compile_kernel: Callable[[], Compiled]) -> Future[Compiled]:
    """As Triton compiles while its mode is active."""
    return active_mode.get().executor.submit(compile_kernel)


class Kernel:
    """Notes its launches, and what was compiled for which options."""

    def __init__(self, fails: bool = False) -> None:
        self.launched: list[tuple] = []
        self.compiled: dict[object, Compiled] = {}
        self.fails, self.asked = fails, 0

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> None:
        self.asked += 1
        form = tuple(options.items())
        if form not in self.compiled:
            compiled = self.compiled[form] = Compiled(self.fails)
            compiled_by_triton(lambda: compiled)


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Current:
        def __init__(self, device: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Current)


def test_a_launch_passes_everything_on() -> None:
    kernel = Kernel()
    launch_kernel(kernel, (2, 3), 1, 2.0, BLOCK=64)
    assert kernel.launched == [((2, 3), (1, 2.0), {"BLOCK": 64})]
    assert not kernel.compiled


def test_in_a_block_each_kernel_is_compiled_and_loaded_in_a_thread_and_none_runs() -> None:
    one, two = Kernel(), Kernel()
    with compiling(DEVICE):
        assert only_compiles()
        for _ in range(3):
            launch_kernel(one, (1,), 5, BLOCK=64)
        launch_kernel(one, (1,), 5, BLOCK=128)
        launch_kernel(two, (1,))
    assert not only_compiles()
    assert not one.launched and not two.launched
    assert (len(one.compiled), len(two.compiled)) == (2, 1)
    compiled = [*one.compiled.values(), *two.compiled.values()]
    assert all(own.loaded_by.startswith("vitgraph-compile") for own in compiled)
    launch_kernel(one, (1,))
    assert len(one.launched) == 1


def test_triton_is_asked_once_for_each_form_of_the_arguments() -> None:
    x, wide = torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.float64)
    descriptors = [TensorDescriptor(x, [64, 64], [64, 1], block) for block in ([16, 16], [16, 16], [32, 16])]
    forms = [
        [(x, 1, 2.0), (torch.zeros(64, 64), 1, 2.0)],
        [(wide, 1, 2.0)], [(x.view(-1)[1:], 1, 2.0)], [(x, 16, 2.0)], [(x, 1, 3.0)], [(x, True, 2.0)], [(x, 1.0, 2.0)],
        [(descriptors[0], 1, 2.0), (descriptors[1], 1, 2.0)], [(descriptors[2], 1, 2.0)],
    ]  # fmt: skip
    kernel = Kernel()
    for asked in (1, 2):
        with compiling(DEVICE):
            for _ in range(2):
                for own in forms:
                    for args in own:
                        launch_kernel(kernel, (1,), *args, BLOCK=64)
        assert kernel.asked == asked * len(forms), "in each block, for options may have changed"
    other = Kernel()
    with compiling(DEVICE):
        launch_kernel(kernel, (1,), x, BLOCK=64)
        launch_kernel(kernel, (2,), x, BLOCK=64)
        launch_kernel(kernel, (1,), x, BLOCK=128)
        launch_kernel(kernel, (1,), x, OTHER=64)
        launch_kernel(other, (1,), x, BLOCK=64)
    assert (kernel.asked, other.asked) == (2 * len(forms) + 3, 1)


def test_a_kernel_that_compiles_slowly_is_waited_for() -> None:
    compiled, end = Compiled(False), threading.Event()

    class Slow(Kernel):
        def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> None:
            compiled_by_triton(lambda: compiled if end.wait(10) else Compiled(False))

    with compiling(DEVICE):
        launch_kernel(Slow(), (1,))
        threading.Timer(0.1, end.set).start()
    assert compiled.loaded_by


def test_what_cannot_be_loaded_is_left_to_its_launch() -> None:
    broken, good = Kernel(fails=True), Kernel()
    with compiling(DEVICE):
        launch_kernel(broken, (1,))
        launch_kernel(good, (1,))
    assert all(own.loaded_by for kernel in (broken, good) for own in kernel.compiled.values())
    launch_kernel(broken, (1,))
    assert broken.launched


def test_a_kernel_is_loaded_where_it_was_compiled_while_others_still_compile() -> None:
    done, kernel = threading.Event(), Compiled(False)

    class Loaded(Compiled):
        @property
        def run(self) -> object:
            done.set()
            return super().run

    first = Loaded(False)
    with ThreadPoolExecutor(2, "compilers") as pool:
        compilers = launch._LoadingPool(pool, DEVICE)
        slow = compilers.submit(lambda wanted: wanted if done.wait(10) else None, kernel)
        quick = compilers.submit(lambda: first)
        assert slow.result() is kernel and quick.result() is first
    assert first.loaded_by.startswith("compilers") and kernel.loaded_by.startswith("compilers")


def test_a_kernel_that_is_compiled_and_cannot_be_loaded_is_a_kernel() -> None:
    broken = Compiled(True)
    with ThreadPoolExecutor(1) as pool:
        assert launch._LoadingPool(pool, DEVICE).submit(lambda: broken).result() is broken
    assert broken.loaded_by


@pytest.fixture(name="triton_begins")
def _triton_begins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """As in a new process; whether each of the two steps met the other."""
    hashes, builds = threading.Event(), threading.Event()
    met: list[bool] = []

    def triton_key() -> None:
        hashes.set()
        met.append(builds.wait(10))

    class Driver:
        @property
        def active(self) -> None:
            builds.set()
            met.append(hashes.wait(10))

    monkeypatch.setattr(triton.runtime.cache, "triton_key", triton_key)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    launch.begin.cache_clear()
    yield met
    launch.begin.cache_clear()


def test_triton_begins_with_both_steps_at_once_and_once(triton_begins: list[bool]) -> None:
    for _ in range(2):
        with compiling(DEVICE):
            assert triton_begins == [True, True], "before the first launch"


def test_triton_begins_when_an_attention_is_selected_for_a_gpu(triton_begins: list[bool]) -> None:
    select_attention("sdpa", torch.device("cpu"), torch.bfloat16)
    select_attention("sdpa", torch.device("cuda"), torch.float32)
    assert launch.begin.cache_info().currsize == 0
    select_attention("sdpa", torch.device("cuda"), torch.bfloat16)
    assert launch.begin.cache_info().currsize == 1
    for begun in launch.begin():
        begun.result()
    assert triton_begins == [True, True]


def test_what_fails_at_the_beginning_fails_again_at_the_launch(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def triton_key() -> None:
        raise OSError("cannot read libtriton.so")

    monkeypatch.setattr(triton.runtime.cache, "triton_key", triton_key)
    launch.begin.cache_clear()
    kernel = Kernel()
    with caplog.at_level("DEBUG", "vitgraph"), compiling(DEVICE):
        launch_kernel(kernel, (1,))
    assert kernel.compiled and "cannot read libtriton.so" in caplog.text
    launch.begin.cache_clear()


def test_other_work_is_done_when_everything_is_launched() -> None:
    kernel, later, events = Kernel(), Kernel(), []

    def work() -> None:
        events.append(len(kernel.compiled))
        launch_kernel(later, (1,))

    def fail() -> None:
        raise RuntimeError("no such head dim")

    with compiling(DEVICE):
        meanwhile(fail)
        meanwhile(work)
        launch_kernel(kernel, (1,))
        assert not events
    assert events == [1], "one that fails keeps no other from its turn"
    assert later.compiled and not later.launched
    with pytest.raises(AssertionError, match="while kernels are compiled"):
        meanwhile(work)


def test_an_error_in_the_block_ends_it() -> None:
    kernel, events = Kernel(), []
    with pytest.raises(ValueError, match="of the forward"), compiling(DEVICE):
        meanwhile(lambda: events.append("work"))
        raise ValueError("of the forward")
    assert not only_compiles() and not events
    with triton.AsyncCompileMode(None):  # another one may begin
        launch_kernel(kernel, (1,))
    assert kernel.launched


def test_other_threads_launch_meanwhile() -> None:
    kernel = Kernel()
    with compiling(DEVICE):
        thread = threading.Thread(target=launch_kernel, args=(kernel, (1,)))
        thread.start()
        thread.join()
    assert len(kernel.launched) == 1 and not kernel.compiled
