"""Moments in rows: microseconds since 1970 in UTC."""

from datetime import UTC, datetime, timedelta

MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(at: datetime) -> int:
    return (at - _EPOCH) // MICROSECOND


def time_of(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
