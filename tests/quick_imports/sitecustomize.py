"""Rarer garbage collections in all processes of servers that tests start.

With Python's own thresholds a fifth of a server's start goes to collections that walk the modules imported so
far and find nothing. SGLang's ``--gc-threshold`` sets such thresholds too, but after the imports.
"""

import gc

gc.set_threshold(50_000, 20, 100)
