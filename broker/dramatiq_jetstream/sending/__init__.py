"""A message on its way to the server, until the acknowledgement: delays, batches, what is stored. Private."""
