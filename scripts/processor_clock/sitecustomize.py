"""Make Python's clocks count this process' CPU seconds; found by an interpreter with this folder in PYTHONPATH.

For contests on a busy machine: a limit of 30 s then gives every single-threaded contender 30 s of work. Waiting for
input, for the disk or for a child counts nothing.
"""

import time


def _replace_clocks() -> None:
    begun, nanoseconds = time.time(), time.time_ns()
    processor, processor_ns = time.process_time, time.process_time_ns
    time.time, time.time_ns = lambda: begun + processor(), lambda: nanoseconds + processor_ns()
    time.perf_counter = time.monotonic = processor
    time.perf_counter_ns = time.monotonic_ns = processor_ns


_replace_clocks()
