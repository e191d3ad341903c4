"""Has the workers wait for seconds where a day or an hour would be right: `fleet work tasks tests.chaos.haste`.

Nothing else is changed by it. A run of minutes sees what happens to a delivery that is given up after a day, to a
receiver that rests, and to an order that was cancelled before anything was known of its charge.
"""

from __future__ import annotations

from tasks import refunds
from tasks.webhooks import announcing, deliveries, health, sending

#: For how long a delivery is tried.
TRIED_MS = 15_000

# Longer than a gateway hangs.
refunds.LATE_MS = 15_000  # type: ignore[misc]
refunds.LOOK_MS = 2_000  # type: ignore[misc]
for module in (announcing, deliveries, sending):
    module.TRIED_MS = TRIED_MS  # type: ignore[attr-defined]
sending.PAUSES_SECONDS = (0.2, 0.5, 1)  # type: ignore[misc, assignment]
health.REST_MS = 500  # type: ignore[misc]
health.MAX_REST_MS = 2_000  # type: ignore[misc]
