"""Bytes to and from the server: connections, their threads, and what nats-py does not publish. Private."""
