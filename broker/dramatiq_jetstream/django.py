"""For Django: a message that is enqueued when the transaction commits, and not when it is rolled back.

    with transaction.atomic():
        order = Order.objects.create(...)
        message = enqueue_on_commit(charge.message(order.id))

Without it a worker may run the actor before the row is committed, or for a row that never is. The broker itself is set
up by `django_dramatiq` and its settings.

If the process dies between the commit and the enqueue, or the server cannot be reached then, the row is there and the
message is not. Where that must not be, write what is to be sent into a table in the same transaction, and have a
periodic actor send it.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import dramatiq
from django.db import transaction
from dramatiq.message import Message

__all__ = ["enqueue_on_commit"]

R = TypeVar("R")


def enqueue_on_commit(
    message: Message[R], *, delay: int | None = None, using: str | None = None
) -> Message[R]:
    """Enqueue a message when the current transaction commits; at once when there is none.

    Parameters:
      message: As `actor.message(...)` makes it. Its arguments are those of now.
      delay: Milliseconds until it runs, from the commit on.
      using: The database whose transaction it is; None for the default.

    Returns:
      The message, whose id can be stored in the same transaction.

    Raises:
      As `JetStreamBroker.enqueue`, out of the block that commits; the transaction is committed then.

    Examples:
      ```python
      with transaction.atomic():
          order = Order.objects.create(total=total)
          order.charge_id = enqueue_on_commit(charge.message(order.id)).message_id
          order.save()
      ```
    """
    actor = dramatiq.get_broker().get_actor(message.actor_name)
    transaction.on_commit(partial(actor.broker.enqueue, message, delay=delay), using=using)
    return message
