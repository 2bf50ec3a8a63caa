"""Processes for calls that may leave them without a working GPU, or end them."""

import multiprocessing
import queue
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool


class Workers:
    """Processes that take one call at a time; one that has had a fault is replaced by a new one."""

    def __init__(self, number: int):
        self._number = number
        self._idle: queue.LifoQueue[ProcessPoolExecutor] = queue.LifoQueue()
        for _ in range(number):
            self._idle.put(self._new())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_):
        while not self._idle.empty():
            self._idle.get().shutdown(wait=False)

    @staticmethod
    def _new() -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
        return ProcessPoolExecutor(1, mp_context=spawn)

    def map(self, call: Callable, items: list) -> list:
        """The first of what call(item) returns, for each item; the second says that it was a
        fault. A call that ends its process is its own reason."""

        def one(item):
            worker = self._idle.get()
            try:
                result, is_fault = worker.submit(call, item).result()
            except BrokenProcessPool:
                result, is_fault = "wrong: it ended its process", True
            if is_fault:
                worker.shutdown(wait=False)
                worker = self._new()
            self._idle.put(worker)
            return result

        with ThreadPoolExecutor(self._number) as threads:
            return list(threads.map(one, items))
