"""A run that stands still says where every thread stands, once each time, and goes on."""

import io
import threading

from resattn_jax.watchdog import Watchdog


class Lines(io.StringIO):
    """Says when something was printed."""

    def __init__(self):
        super().__init__()
        self.printed = threading.Semaphore(0)

    def write(self, text):
        result = super().write(text)
        self.printed.release()
        return result


def wait_for_a_disk(released):
    released.wait()


def test_it_names_every_thread_and_where_it_stands_once_each_time():
    out, released = Lines(), threading.Event()
    stuck = threading.Thread(target=wait_for_a_disk, args=(released,), name="transfer", daemon=True)
    stuck.start()
    with Watchdog(0.05, out) as watchdog:
        assert out.printed.acquire(timeout=20)
        assert not out.printed.acquire(timeout=0.5)  # once
        said = out.getvalue()
        watchdog.alive()
        assert out.printed.acquire(timeout=20)  # it stands still again
    released.set()
    assert said.startswith("nothing was done for 0.000833 minutes, and it goes on waiting; its threads stand at\n")
    assert "thread transfer:" in said
    assert "in wait_for_a_disk\n    released.wait()" in said
    assert "thread MainThread:" in said
    assert "in test_it_names_every_thread_and_where_it_stands_once_each_time" in said
    assert "thread watchdog:" not in said


def test_never_is_0_and_a_run_that_moves_is_left_alone():
    out = Lines()
    with Watchdog(0, out), Watchdog(60, out) as watchdog:
        watchdog.alive()
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert out.getvalue() == ""
