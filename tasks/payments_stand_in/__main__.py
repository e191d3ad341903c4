"""The command; see the package."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from .knobs import Knobs
from .server import StandIn


def main() -> int:
    parser = argparse.ArgumentParser(description="A payment gateway for development and tests.")
    parser.add_argument("--host", default=os.environ.get("HOST") or "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT") or 8001))
    parser.add_argument("--database", default=".data/payments.sqlite", help="where the charges are kept")
    options = parser.parse_args()
    Path(options.database).parent.mkdir(parents=True, exist_ok=True)
    url, secret = os.environ.get("PAYMENTS_WEBHOOK_URL"), os.environ.get("PAYMENTS_WEBHOOK_SECRET")
    webhook = (url, secret) if url and secret else None
    try:
        server = StandIn(options.host, options.port, options.database, Knobs.from_environment(), webhook)
    except OSError as error:
        print(f"Cannot listen on {options.host}:{options.port} ({error.strerror}): choose another --port.")
        return 1

    def stop(*_: object) -> None:
        # From a thread of its own: shutdown waits for the loop, which this very thread is running.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(
        f"payments stand-in on http://{options.host}:{server.server_port}, charges in {options.database}",
        flush=True,
    )
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    server.charges.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
