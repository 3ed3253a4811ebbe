"""The watchdog where the process can start no more threads. All its other behaviour: ``test_exit_codes.py``."""

import signal
import subprocess
import sys

PROGRAM = """
import ctypes, threading, time
import trio
from service.hosting.process import watchdog

async def main():
    dog = watchdog.Watchdog(total_s=0.5)
    threading.Thread.start = watchdog.faulthandler.dump_traceback_later = refuse
    watchdog._exit_after = lambda *_: False
    dog.start()
    ctypes.PyDLL(None).sleep(20)

def refuse(*_, **__):
    raise RuntimeError("can't start new thread")

trio.run(main)
"""


def test_a_process_that_may_have_no_more_threads_is_ended_all_the_same() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=15, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGALRM, b"")
