"""The fleet's dashboard as a part of the service: for operators, under the service's own sign-in."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import pytest
import requests

from tests.web.closed import PAGE, Closed, closed_service


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    with closed_service(tmp_path_factory.mktemp("closed")) as closed:
        yield closed


def _get(closed: Closed, path: str, key: str | None = None, **options: object) -> requests.Response:
    headers = {**PAGE, **({"Authorization": f"Bearer {closed.keys[key]}"} if key else {})}
    return requests.get(
        f"{closed.stack.url}/admin/fleet{path}", headers=headers, allow_redirects=False, timeout=60, **options
    )


def test_only_operators_see_the_fleet(closed: Closed) -> None:
    """A stranger is sent to sign in and back; customers, programs and a key that is none are refused."""
    sent = _get(closed, "/dead?queue=default")
    assert sent.status_code == 303
    assert sent.headers["Location"] == "/sign-in?next=%2Fadmin%2Ffleet%2Fdead%3Fqueue%3Ddefault"
    for key in ("alice", "shop", "reader"):
        refused = _get(closed, "/", key)
        assert (refused.status_code, "In flight" in refused.text) == (403, False), key
    headers = {"Authorization": "Bearer no-such-key"}
    assert requests.get(f"{closed.stack.url}/admin/fleet/", headers=headers, timeout=60).status_code == 403
    assert _get(closed, "/static/style.css").status_code == 200


def test_operators_steer_the_fleet(closed: Closed) -> None:
    """Pages, links and forms work under the mount; a change is recorded by the operator's name."""
    page = _get(closed, "/", "operator")
    assert page.status_code == 200
    assert 'href="/admin/fleet/workers"' in page.text
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    form = _get(closed, "/change/pause?queue=payments", "operator")
    assert "Pause the queue payments?" in form.text
    fields = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form.text)
    data = {name: html.unescape(value) for name, value in fields}
    address = f"{closed.stack.url}/admin/fleet/change/pause"
    headers = {"Authorization": f"Bearer {closed.keys['operator']}"}
    without = requests.post(address, data=data, headers=headers, timeout=60)
    assert without.status_code == 403
    posted = requests.post(
        address, data=data, headers=headers, cookies=form.cookies, allow_redirects=False, timeout=60
    )
    assert posted.status_code == 303
    assert posted.headers["Location"].startswith("/admin/fleet/changed/")
    audit = _get(closed, "/audit", "operator").text
    assert re.search(r"operator</th>\s*<td[^>]*>pause</td>", audit)
