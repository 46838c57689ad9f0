"""The exceptions that commands end by.

The commands print a UserError's text as a single sentence on stderr and exit with status 2; nothing else is caught.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. The text names the file, the value and what was expected."""


class Stopped(Exception):
    """The user or the system asked the run to end; the state is saved."""
