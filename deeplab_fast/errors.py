"""The one exception for what a user can put right.

The commands print its text as a single sentence on stderr and exit with status 2; nothing else is caught.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. The text names the file, the value and what was expected."""
