import threading
import time

import pytest

from retinaface.progress import in_parallel


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_in_the_order_of_the_items_and_threads_share_them(threads):
    together = threading.Barrier(threads, timeout=20)  # passes when all threads are there

    def work(item):
        together.wait()
        return item, threading.current_thread()

    results = list(in_parallel(work, range(6), "working", threads))
    assert [item for item, _ in results] == list(range(6))
    assert (threading.main_thread() in {thread for _, thread in results}) == (threads == 1)


def test_an_interrupt_while_items_are_handed_out_leaves_them():
    begun = []

    def items():
        yield from range(100)
        raise KeyboardInterrupt

    def work(item):
        begun.append(item)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        list(in_parallel(work, items(), "working", 2))
    assert len(begun) < 50


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_not_begun_when_it_fails_is_left(threads):
    begun = []

    def work(item):
        begun.append(item)
        if item == 1:
            raise ValueError(item)
        if item > 1:
            time.sleep(0.02)
        return item

    results = in_parallel(work, range(1000), "working", threads)
    assert next(results) == 0
    with pytest.raises(ValueError, match="1"):
        list(results)
    assert len(begun) < 1000
