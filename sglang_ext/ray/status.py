"""Exit statuses of a server on Ray, by which its supervisor decides what to do."""

import sys

#: A command line that is refused.
EXIT_USAGE = 2

#: The ranks did not come up; trying again is of no use unless the server had been up before.
EXIT_NOT_STARTED = 3

#: A rank, or the last replica, was lost while serving (EX_TEMPFAIL).
EXIT_RANK_LOST = 75


def refuse(program: str, reason: str) -> int:
    """Say why a program does not start; returns :data:`EXIT_USAGE`."""
    print(f"{program}: {reason}", file=sys.stderr)
    return EXIT_USAGE
