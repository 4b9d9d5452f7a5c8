"""When something was made."""

import datetime as dt

__all__ = ["timestamp"]


def timestamp() -> str:
    """Now, UTC, ISO 8601."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0).isoformat()
