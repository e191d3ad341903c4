"""The payment gateway's HTTP client: captures an order's payment once, however often it is asked, and gives it back.

`POST {PAYMENT_URL}/charges` with the order id as `Idempotency-Key`. A captured or declined charge is an
answer; everything else (refused, timed out, 5xx, an answer that is none) raises, and the step is tried again
later. Whether such an attempt was charged is not known here, and need not be: the key makes the next one
return the same charge.

`POST {PAYMENT_URL}/refunds` gives back a part of a charge, with a key for each refund. What is not known is looked up:
`GET {PAYMENT_URL}/charges?order_id=` says whether an order was charged, `/refunds?order_id=` which refunds were made,
and `/chargebacks?order_id=` what its customer's bank took back.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import requests
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from .answers import timed, within
from .ledger import Chargeback
from .ports import Charge, Decline

#: Refusals that say "not now": time-out, the same charge is under way, too early, too many.
_FOR_NOW = frozenset({408, 409, 425, 429})


class GatewayUnavailable(Exception):
    """The gateway gave no answer that says whether the payment was captured; trying again is safe.

    `waited` is for how many milliseconds the order has waited for its payment, once that is known.
    """

    waited: int = 0


class UnusableAnswer(GatewayUnavailable):
    """The gateway is there, and its answer about this order is none; waiting alone will not help."""


class HttpGateway:
    """The gateway at an address.

    Parameters:
      url: Its base address.
      timeout: Milliseconds for connecting, and for the whole of an answer: one that comes byte by byte is none.
    """

    def __init__(self, url: str, *, timeout: int) -> None:
        self._url = url
        self._timeout = timeout / 1000
        # Preparing a request costs as much as sending it, so what is the same for all is prepared once.
        self._charge = requests.Request("POST", f"{url}/charges").prepare()
        self._refund = requests.Request("POST", f"{url}/refunds").prepare()
        self._local = threading.local()

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
        """Capture `amount` minor units.

        Raises:
          GatewayUnavailable: When no usable answer came.
        """
        body = {"order_id": order_id, "amount": amount, "currency": currency, "token": token}
        response = self._send(_filled(self._charge, body, order_id))
        answer = _json(response)
        if response.status_code in (200, 201) and answer.get("status") == "captured":
            if (answer.get("amount"), answer.get("currency")) != (amount, currency) or not answer.get("id"):
                raise UnusableAnswer(
                    f"the payment gateway answered for another charge than order {order_id}'s: {answer}"
                )
            return Charge(str(answer["id"]))
        if response.status_code == 402:
            code = str(answer.get("code") or "declined")
            return Decline(code, str(answer.get("message") or code))
        raise _failure(response, answer)

    def find_charge(self, order_id: str) -> Charge | None:
        """Return the captured charge of an order, None when the gateway knows none.

        Raises:
          GatewayUnavailable: When no usable answer came.
        """
        for one in self._look_up("charges", order_id):
            if one.get("status") == "captured":
                return Charge(str(one["id"]), int(one["amount"]))
        return None

    def refund(self, charge_id: str, amount: int, currency: str, key: str) -> str:
        """Give back `amount` minor units of a charge; returns the gateway's id of the refund.

        Raises:
          GatewayUnavailable: When no usable answer came.
        """
        body = {"charge_id": charge_id, "amount": amount, "currency": currency}
        response = self._send(_filled(self._refund, body, key))
        answer = _json(response)
        if response.status_code in (200, 201) and answer.get("status") == "refunded":
            if (answer.get("charge_id"), answer.get("amount")) != (charge_id, amount) or not answer.get("id"):
                raise UnusableAnswer(f"the payment gateway answered for another refund than {key}: {answer}")
            return str(answer["id"])
        raise _failure(response, answer)

    def find_refund(self, order_id: str, key: str) -> str | None:
        """Return the id of the refund that was made with a key, None when the gateway knows none.

        Raises:
          GatewayUnavailable: When no usable answer came.
        """
        made = (one for one in self._look_up("refunds", order_id) if one.get("key") == key)
        return next((str(one["id"]) for one in made), None)

    def find_chargebacks(self, order_id: str) -> list[tuple[str, Chargeback]]:
        """Return what the bank took back of an order's charge, each with the id of the charge; their times are 0.

        Raises:
          GatewayUnavailable: When no usable answer came.
        """
        return [
            (
                str(one["charge_id"]),
                Chargeback(str(one["id"]), int(one["amount"]), 0, str(one.get("reason") or "")),
            )
            for one in self._look_up("chargebacks", order_id)
        ]

    def _look_up(self, what: str, order_id: str) -> list[dict[str, Any]]:
        """Return what the gateway knows of an order; each has an id and an amount."""
        asked = requests.Request("GET", f"{self._url}/{what}", params={"order_id": order_id}).prepare()
        response = self._send(asked)
        answer = _json(response)
        found = answer.get(what)
        if response.status_code != 200 or not isinstance(found, list):
            raise _failure(response, answer)
        for one in found:
            amount = one.get("amount") if isinstance(one, dict) else None
            if not isinstance(amount, int) or not one.get("id"):
                raise UnusableAnswer(f"the payment gateway listed under {what} what is none: {one}")
        return [one for one in found if one.get("order_id") == order_id]

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        # The environment is asked once, not for every charge: proxies, certificates, no .netrc.
        session.proxies.update(requests.utils.get_environ_proxies(self._url))
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        session.trust_env = False
        return timed(session)

    def _send(self, request: requests.PreparedRequest) -> requests.Response:
        # One session, so one kept-open connection, for each thread: sessions are not safe to share.
        session: requests.Session | None = getattr(self._local, "session", None)
        kept_open = session is not None
        if session is None:
            session = self._local.session = self._new_session()
        try:
            with within(self._timeout):
                return session.send(request, timeout=self._timeout, allow_redirects=False)
        except requests.ConnectionError as error:
            reason = error.args[0] if error.args else None
            if isinstance(reason, ReadTimeoutError):
                raise self._too_late() from None
            # A gateway may close a connection that was kept open; that says nothing about its health.
            if kept_open and isinstance(reason, ProtocolError):
                session.close()
                del self._local.session
                return self._send(request)
            raise GatewayUnavailable(f"the payment gateway cannot be reached: {_cause(error)}") from None
        except requests.Timeout:
            raise self._too_late() from None
        except requests.RequestException as error:
            raise GatewayUnavailable(f"the payment gateway's answer could not be read: {error}") from None

    def _too_late(self) -> GatewayUnavailable:
        return GatewayUnavailable(f"the payment gateway did not answer within {self._timeout * 1000:.0f} ms")


def _filled(prepared: requests.PreparedRequest, body: dict[str, Any], key: str) -> requests.PreparedRequest:
    request = prepared.copy()
    request.headers["Idempotency-Key"] = key
    request.prepare_body(data=None, files=None, json=body)
    return request


def _failure(response: requests.Response, answer: dict[str, Any]) -> GatewayUnavailable:
    """Return the error that an answer stands for which is none."""
    message = str(answer.get("message", ""))[:200]
    refused = 400 <= response.status_code < 500 and response.status_code not in _FOR_NOW
    kind = UnusableAnswer if refused else GatewayUnavailable
    return kind(f"the payment gateway answered {response.status_code} {message}".rstrip())


def _json(response: requests.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _cause(error: BaseException) -> str:
    """Return the innermost reason, without the layers of HTTP libraries around it."""
    reason: BaseException = error
    while reason.__context__ is not None:
        reason = reason.__context__
    return str(reason)
