"""A delivery on its way through a worker, until its ack: fetch, run, settle. Private."""
