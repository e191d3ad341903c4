"""Bytes to and from the server: a protocol without I/O, under the loop and under a single thread. Private."""
