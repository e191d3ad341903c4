"""A delivery on its way through a worker, until its ack: pull, ledger, consumer, settle. Private."""
