"""Suites that hold every implementation of a Dramatiq plug-in point to the same behaviour."""
