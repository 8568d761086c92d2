"""Who may read which changes by HTTP: nobody, unless the configuration says so.

A `Gate` makes a `Reader` of a token. A reader has a `Sight` of each table that its role covers:
which columns, and which rows. PyJWT is not imported before tokens are to be verified: it comes with
the extra ``http``.
"""

from __future__ import annotations

from walstream.access.gate import Gate
from walstream.access.readers import Grant, Reader, Sight
from walstream.access.refusals import Cause, ReaderRefused

__all__ = ["Cause", "Gate", "Grant", "Reader", "ReaderRefused", "Sight"]
