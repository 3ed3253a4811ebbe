"""How the answers for operators show the stop of a process."""

from typing import Annotated

import msgspec
from msgspec import Meta

from service.settings import Settings
from service.supervisor import Service


class StopShown(msgspec.Struct, frozen=True, kw_only=True):
    """The stop of the process: its phase, and the settings' bounds.

    ``{"phase": "draining", "reason": "SIGTERM", "entered": {"draining": 812.9}, "bounds_s": {"lame_duck": 0.0,
    "draining": 2.0, "interrupting": 1.0, "releasing": 1.0, "total": 5.0}}``
    """

    phase: str
    reason: str
    entered: Annotated[dict[str, float], Meta(description="When each phase was entered, on `clock`.")]
    bounds_s: dict[str, float]


def stop_of(service: Service) -> StopShown:
    """The stop of this process, as it is now."""
    stop = service.shutdown
    return StopShown(
        phase=str(stop.phase),
        reason=stop.reason,
        entered={str(phase): service.tree.moment(at) for phase, at in stop.entered_at.items()},
        bounds_s=bounds_of(service.settings),
    )


def bounds_of(settings: Settings) -> dict[str, float]:
    """How long each phase of the report may take, in seconds, and all of them."""
    return {
        "lame_duck": settings.lame_duck_timeout_s,
        "draining": settings.drain_timeout_s,
        "interrupting": settings.cleanup_timeout_s,
        "releasing": settings.release_timeout_s,
        "total": settings.shutdown_total_s,
    }
