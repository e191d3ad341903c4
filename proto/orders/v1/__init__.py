"""Version 1 of the events, generated from events.proto."""
