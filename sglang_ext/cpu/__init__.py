"""Serving on an x86 or arm CPU without AMX, and the row-invariant attention of canonical passes there."""
