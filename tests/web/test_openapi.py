"""The description of the API is true: generated requests, good and bad, are answered as it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.web.stack import Stack
from web.openapi import document

# Not checked: that every order which fits the schema is accepted, because no schema can say which products
# exist; and that every other one is refused, because members that are not known are ignored.
NOT_CHECKED = [positive_data_acceptance, negative_data_rejection]

FIT, UNFIT = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [(method.upper(), path) for path, methods in document()["paths"].items() for method in methods]

# Requests that do not fit exist only where there is something that can be wrong.
REQUESTS = [(*operation, FIT) for operation in OPERATIONS] + [
    ("POST", "/api/orders", UNFIT),
    ("GET", "/api/orders", UNFIT),
]


@pytest.fixture(scope="module")
def description(service: Stack) -> Any:
    """The service's own description, read as its clients read it."""
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


@pytest.mark.parametrize(("method", "path", "mode"), REQUESTS, ids=str)
def test_every_answer_is_as_described(description: Any, method: str, path: str, mode: GenerationMode) -> None:
    """No request, fit or unfit, is answered with a status, header or body that the description lacks."""
    operation = description[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        # An order's body has by far the most in it that can be wrong.
        max_examples=100 if (method, path) == ("POST", "/api/orders") else 25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def answers_as_described(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=NOT_CHECKED, timeout=20)

    answers_as_described()


def test_every_address_of_the_api_is_described(service: Stack) -> None:
    """What the application serves below /api and /health is in the description, and nothing else is."""
    from tasks.settings import Settings
    from web import create_app

    served = {
        (method, re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in create_app(Settings(access="open", host="127.0.0.1")).url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/api", "/health"))
    }
    assert served == set(OPERATIONS)
