"""The supervisor of `fleet work`, the worker processes under it, and the memory they share. Private."""
