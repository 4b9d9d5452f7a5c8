"""When something was made."""

import datetime as dt

__all__ = ["timestamp"]


def timestamp(seconds: float | None = None) -> str:
    """A time in seconds since the epoch, or now: UTC, ISO 8601."""
    time = dt.datetime.now(dt.UTC) if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)
    return time.replace(microsecond=0).isoformat()
