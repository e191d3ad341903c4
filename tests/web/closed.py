"""A service that asks who comes: with an OpenID provider, and a key for each kind of caller."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from tests.support.provider import AUDIENCE, CLIENT_ID, CLIENT_SECRET, Provider
from tests.web.stack import Stack, order_body

PAGE = {"Accept": "text/html"}


def somewhere() -> str:
    """Return the address of a client that was not seen before."""
    return f"10.{secrets.randbelow(256)}.{secrets.randbelow(256)}.{secrets.randbelow(256)}"


class TrustsThisMachine(HTTPAdapter):
    """Keeps a browser's habit that requests has not: a Secure cookie is sent to this machine without TLS."""

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        headers = resp._original_response.msg
        cookies = headers.get_all("Set-Cookie") or []
        del headers["Set-Cookie"]
        for cookie in cookies:
            headers["Set-Cookie"] = cookie.replace("; Secure", "").replace("Secure; ", "")
        return super().build_response(req, resp)


class Closed:
    """A service that asks who comes, with its provider and a key for each kind of caller."""

    def __init__(self, stack: Stack, provider: Provider) -> None:
        self.stack = stack
        self.provider = provider
        self.keys = {
            "alice": self.key("alice-shop", "--scope", "order", "--customer", "alice"),
            "bob": self.key("bob-shop", "--scope", "order", "--customer", "bob"),
            "shop": self.key("shop", "--scope", "order"),
            "reader": self.key("reader", "--scope", "read"),
            "operator": self.key("operator", "--scope", "operate"),
        }

    def run(self, module: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.stack.command(f"tasks.{module}", *arguments, stdin=stdin)

    def key(self, *arguments: str) -> str:
        made = self.run("keys", "add", *arguments)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def ask(self, who: str | None, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request as one of the callers, None for a stranger."""
        headers = dict(options.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {self.keys.get(who, who)}"
        return requests.request(
            method, self.stack.url + path, headers=headers, timeout=60, allow_redirects=False, **options
        )

    def get(self, who: str | None, path: str, **options: Any) -> requests.Response:
        return self.ask(who, "GET", path, **options)

    def order(self, who: str | None, customer: str, **options: Any) -> requests.Response:
        return self.ask(who, "POST", "/api/orders", json=order_body(customer_id=customer), **options)

    def browser(self) -> requests.Session:
        """Return a browser's session; it sends Secure cookies to this machine, as browsers do."""
        session = requests.Session()
        session.headers.update(PAGE)
        session.mount("http://", TrustsThisMachine())
        session.headers["X-Forwarded-For"] = somewhere()
        return session


@contextmanager
def closed_service(directory: Path, **env: str) -> Iterator[Closed]:
    """Start such a service; the environment is added to."""
    with Provider() as provider:
        settings = {
            "ACCESS": "required",
            "SECRET_KEY": secrets.token_urlsafe(32),
            "OIDC_ISSUER": provider.url,
            "OIDC_AUDIENCE": AUDIENCE,
            "OIDC_CLIENT_ID": CLIENT_ID,
            "OIDC_CLIENT_SECRET": CLIENT_SECRET,
            "OIDC_ROLES_CLAIM": "realm_access.roles",
            "PROXIES": "1",
            **env,
        }
        stack = Stack(directory, web_processes=2, env=settings)
        # The port is known once the stack is made.
        stack.env["PUBLIC_URL"] = stack.url
        with stack:
            yield Closed(stack, provider)
