"""Webhooks: the events of orders, sent to the receivers of customers and operators.

::

    ORDER.> → project_event → one delivery for each webhook that wants the event → deliver_webhook → its receiver

A *webhook* is an address with the events that it wants (`subscriptions`). A customer's gets the events of that
customer's orders, an operator's those of all orders. Only what the ledger confirms is sent, in the ledger's words, so
another program's events are not. A *delivery* is one event for one webhook (`deliveries`); its id follows from both.

**At least once.** A receiver may get a delivery twice, always with the same `webhook-id`, and must ignore the second.
**No order is promised.** Deliveries run beside each other and are retried on their own; each says when its event was.

A crash at each line:

- *before a delivery is stored*: the event is not acked and comes again. Deliveries that exist are found by their id.
- *before its message is stored*: the same; a delivery that was never tried is sent on its way once more.
- *after the request, before its answer is recorded*: the message comes again after ACK_WAIT, and is sent again.
- *after a failure is recorded, before the retry is stored*: the message comes again and finds when it is due.
- *after success is recorded, before the ack*: the message comes again, and finds nothing to do.

An interrupt (a time limit, a shutdown) is a crash of the one run: the connection is closed, and the message stays.

A slow receiver holds up no other. Deliveries have a queue of their own; of one customer, or of one operator's webhook,
`AT_ONCE` run at a time in the whole fleet; each has WEBHOOK_TIMEOUT, all together; and a receiver that fails again and
again rests (`health`), while its deliveries wait on the server. After days of failure its webhook is disabled.

No request goes into private networks, unless WEBHOOK_NETWORKS names them (`addresses`).
"""
