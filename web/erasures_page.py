"""The page on which administrators have customers erased; `python -m tasks.erase` does the same.

The page only asks for it: the erasure is stored before it answers, and a worker carries it out. What the request costs
does not depend on how many orders or erasures there are: it looks into the lists of the customer's orders for one that
is under way. The worker looks at everything, and the page says why it waits.
"""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Response, request

from tasks import actors, app, service
from tasks.model import FINAL_STATUSES, STATUSES
from tasks.numbers import whole_number
from tasks.parsing import check_customer_id
from tasks.service import InvalidOrder, Wanted
from web.access import needs
from web.acts import acting, recorded
from web.rendering import page, see_other

blueprint = Blueprint("erasures_page", __name__)

PER_PAGE: Final = 25


@blueprint.get("/admin/erasures")
@needs("admin")
def list_erasures() -> Response:
    """Show the form and all certificates."""
    return _page()


@blueprint.post("/admin/erasures")
@needs("admin")
def erase_customer() -> Response:
    """Ask for an erasure, if the customer's id was given twice."""
    try:
        customer_id = check_customer_id(request.form.get("customer_id", "").strip())
    except InvalidOrder as error:
        return _page(problem=f"The customer id {error.problem}")
    if request.form.get("again", "").strip() != customer_id:
        return _page(problem="The two customer ids differ. Nothing was erased.")
    if order_id := _under_way(customer_id):
        return _page(
            problem=f"Nothing was erased. Order {order_id} is under way. Wait until it is over, or cancel it; then ask "
            "again."
        )
    job = app.erasure_jobs().begin(customer_id, acting())
    with recorded("customer.ask_to_erase", job.id):
        actors.erase_customer.send(job.id)
    return see_other("/admin/erasures")


def _under_way(customer_id: str) -> str:
    """Return an order of a customer that is under way, as far as the lists say so; empty when none is."""
    for status in STATUSES:
        if status not in FINAL_STATUSES:
            for order in service.list_orders(1, None, Wanted(customer_id=customer_id, status=status)).orders:
                return order.order_id
    return ""


def _page(problem: str = "") -> Response:
    jobs = app.erasure_jobs()
    before = whole_number(request.args.get("before", ""), 1, 2**63 - 1)
    found, following = jobs.page(PER_PAGE, before)
    return page(
        "erasures.html",
        status=422 if problem else 200,
        jobs=[(job, jobs.problem(job)) for job in found],
        first=before is None,
        following=following,
        problem=problem,
    )
