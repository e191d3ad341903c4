"""Random commands and faults against the broker and a real server, in one process; `test_stateful` runs them.

`machine` has the commands and faults, `app` the program that they drive, `model` what was promised, and `broken` broken
builds of the broker that the machine finds.
"""
