"""Prints a new key for TOKEN_KEY: ``python -m tasks.token_key``. It needs no server."""

from __future__ import annotations

from cryptography.fernet import Fernet

if __name__ == "__main__":
    print(Fernet.generate_key().decode())
