"""Run a command on one core and write what it used as JSON; the launcher of ``contenders``.

    python -I -S child_usage.py CORE SECONDS REPORT COMMAND…

A process of its own, without torch: a child inherits the peak memory of the process that starts it, so that beneath
the benchmark no child would use less than the benchmark itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import NoReturn

POLL = 0.005  # seconds between looks at the child


def main() -> None:
    core, seconds, report, *command = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    started = time.monotonic()
    child = os.posix_spawn(command[0], command, os.environ, setsid=True)

    def end(number: int, frame: object) -> NoReturn:
        os.killpg(child, signal.SIGKILL)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ended = False
    while True:
        number, status, usage = os.wait4(child, os.WNOHANG)
        if number:
            break
        if not ended and time.monotonic() - started > float(seconds):
            os.killpg(child, signal.SIGKILL)
            ended = True
        time.sleep(POLL)
    found = {
        "wall": time.monotonic() - started, "processor": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024, "code": os.waitstatus_to_exitcode(status), "ended": ended,
    }  # fmt: skip
    with open(report, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
