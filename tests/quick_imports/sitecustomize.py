"""Servers that tests start, started faster; on the path of all their processes.

Garbage is collected more rarely: with Python's own thresholds a fifth of a start goes to collections that
walk the modules imported so far and find nothing. SGLang's ``--gc-threshold`` sets such thresholds too, but
after the imports.

Schedulers and detokenizers are forked from the server and the doctor's ranks from the doctor, where they are
spawned otherwise: each would import the same modules again, which takes most of a start. Data-parallel
schedulers are started by threads, which must not fork, and stay as they are; so does what starts with
``SPAWN`` in its environment.
"""

import gc
import multiprocessing
import os
import signal
import sys

gc.set_threshold(50_000, 20, 100)

#: Handlers that SGLang's server has by then, and spawned processes have not.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD)


def forking(original):
    """``original`` with the start method "fork" for "spawn"."""

    def called(method=None, *args, **kwargs):
        return original("fork" if method == "spawn" else method, *args, **kwargs)

    return called


def default_handlers():
    """Signals of a forked process do what they do in a spawned one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


ours = {"sglang_ext.launch_server", "sglang_ext.doctor"}.intersection(sys.orig_argv)
if ours and "--dp-size" not in sys.orig_argv and "SPAWN" not in os.environ:
    multiprocessing.set_start_method = forking(multiprocessing.set_start_method)
    multiprocessing.get_context = forking(multiprocessing.get_context)
    os.register_at_fork(after_in_child=default_handlers)
