"""An OpenID provider in this process: real HTTP, real signatures, and whatever claims a test asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

AUDIENCE = "orders-api"
CLIENT_ID = "orders-pages"
CLIENT_SECRET = "the secret of the pages at the provider"


class Provider:
    """A provider at `url`. `person` is who signs in next; `token` makes a bearer token."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "first", "use": "sig", "alg": "RS256"})
        self.person: dict[str, Any] = {"sub": "c-42"}
        self.fetched = 0
        self.online = True
        self._codes: dict[str, dict[str, str]] = {}
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider._get(self)

            def do_POST(self) -> None:
                provider._post(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Provider:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def claims(self, **claims: Any) -> dict[str, Any]:
        """Return the claims of a token that is valid, changed by `claims`; None leaves one out."""
        now = int(time.time())
        all_of_them = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "c-42",
            "iat": now,
            "exp": now + 300,
            **claims,
        }
        return {name: value for name, value in all_of_them.items() if value is not None}

    def token(self, *, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """Return a signed token."""
        given = {"alg": "RS256", "kid": "first", **(header or {})}
        return jwt.encode(given, self.claims(**claims), key or self.key, algorithms=[given["alg"]])

    def rotate(self) -> None:
        """Sign with a new key from now on, and forget the old one."""
        self.key = RSAKey.generate_key(2048, {"kid": secrets.token_hex(4), "use": "sig", "alg": "RS256"})

    def _get(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if not self.online:
            self._answer(request, 503, {})
        elif parts.path == "/.well-known/openid-configuration":
            self._answer(request, 200, self._metadata())
        elif parts.path == "/jwks":
            self.fetched += 1
            self._answer(request, 200, {"keys": [self.key.as_dict(private=False)]})
        elif parts.path == "/authorize":
            assert asked["client_id"] == CLIENT_ID
            assert asked["code_challenge_method"] == "S256"
            code = secrets.token_urlsafe(16)
            self._codes[code] = asked
            back = f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"
            request.send_response(302)
            request.send_header("Location", back)
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            self._answer(request, 404, {})

    def _post(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        given = {name: values[0] for name, values in parse_qs(body).items()}
        asked = self._codes.pop(given.get("code", ""), None)
        proof = base64.urlsafe_b64encode(hashlib.sha256(given.get("code_verifier", "").encode()).digest())
        if asked is None or proof.rstrip(b"=").decode() != asked["code_challenge"]:
            self._answer(request, 400, {"error": "invalid_grant"})
            return
        id_token = self.token(aud=CLIENT_ID, nonce=asked["nonce"], **self.person)
        self._answer(request, 200, {"access_token": "x", "token_type": "Bearer", "id_token": id_token})

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    @staticmethod
    def _answer(request: BaseHTTPRequestHandler, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)
