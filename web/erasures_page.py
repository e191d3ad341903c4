"""The page on which administrators have customers erased; `python -m tasks.erase` does the same.

The page only asks for it: the erasure is stored before it answers, and a worker carries it out.
"""

from __future__ import annotations

from flask import Blueprint, Response, request

from tasks import actors, app
from tasks.archive import ArchiveBroken
from tasks.erasure import Job, NotErasable
from tasks.parsing import check_customer_id
from tasks.service import InvalidOrder
from web.access import needs
from web.acts import acting, recorded
from web.rendering import page, see_other

blueprint = Blueprint("erasures_page", __name__)


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
    try:
        job: Job = app.erasure().begin(customer_id, acting())
        with recorded("customer.ask_to_erase", job.id):
            actors.erase_customer.send(job.id)
    except (NotErasable, ArchiveBroken) as error:
        return _page(problem=f"Nothing was erased. {error}")
    return see_other("/admin/erasures")


def _page(problem: str = "") -> Response:
    jobs = sorted(app.erasure().jobs(), key=lambda job: job.at, reverse=True)
    return page("erasures.html", status=422 if problem else 200, jobs=jobs, problem=problem)
