"""A broken build: an erasure does not think of what was sent to webhooks. The operator's commands import this."""

from __future__ import annotations

from tasks import erasure

_stages = erasure.Erasure._stages


def _fewer(self: erasure.Erasure) -> list[erasure._Stage]:
    return [stage for stage in _stages(self) if stage.name != "deliveries of webhooks"]


erasure.Erasure._stages = _fewer  # type: ignore[method-assign]
