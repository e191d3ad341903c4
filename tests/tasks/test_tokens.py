"""Payment tokens are encrypted at rest, and gone when they have been used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from dramatiq_jetstream import JetStreamBroker
from tasks.tokens import Tokens, TokenUnreadable, is_reference, reference
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY, dramatiq_worker
from tests.tasks.fakes import FakeBucket
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack, order_body

TOKEN = "tok_visa_only_this_order_has_it"


def key() -> str:
    return Fernet.generate_key().decode()


def kept(stack: Stack) -> list[str]:
    """The orders whose tokens the store has."""
    broker = JetStreamBroker(stack.nats.url)
    try:
        return broker.bucket("tokens").keys()
    finally:
        broker.close()


def stored(directory: Path, secret: str) -> list[Path]:
    """The files of the server that have a secret in them."""
    return [p for p in directory.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_token_is_never_stored_in_clear_and_goes(tmp_path: Path) -> None:
    """While the order waits the store has it encrypted; when it is paid, rejected or declined, not at all."""
    with Stack(tmp_path, workers=False) as stack:
        bodies = [
            order_body(("MUG-01", 1), payment_token=TOKEN),
            order_body(("TEE-01", 1), payment_token="tok_declined"),
            order_body(("PRINT-01", 999), payment_token=f"{TOKEN}_2"),
        ]
        answers = [
            stack.post("/api/orders", json=body, headers={"Idempotency-Key": "a"}) for body in bodies[:1]
        ]
        answers += [stack.post("/api/orders", json=body) for body in bodies[1:]]
        assert [answer.status_code for answer in answers] == [202] * 3
        ids = [answer.json()["order_id"] for answer in answers]
        # Asked again it is the same order, although encryption never gives the same twice.
        again = stack.post("/api/orders", json=bodies[0], headers={"Idempotency-Key": "a"})
        assert again.json()["order_id"] == ids[0]
        assert sorted(kept(stack)) == sorted(ids)
        assert not stored(tmp_path / "nats", TOKEN)
        with dramatiq_worker("tasks", log=tmp_path / "late.log", env=stack.environment):
            assert [stack.final(order_id)["status"] for order_id in ids] == [
                "confirmed",
                "rejected",
                "rejected",
            ]
            eventually(lambda: kept(stack) == [])
        assert not stored(tmp_path / "nats", TOKEN)


def test_another_program_may_send_a_token(shop: Stack, producer: Producer) -> None:
    """A token in an event is used; a reference to one that is not kept is no token."""
    assert shop.final(producer.publish(created(payment_token="tok_declined")))["status"] == "rejected"
    borrowed = shop.final(producer.publish(created(payment_token=reference("c-42", "tok_visa"))))
    assert borrowed["status"] == "rejected"
    assert "payment_token" in borrowed["reason"]


def test_keys_are_rotated() -> None:
    """A new key encrypts, the old one still decrypts; without it the token cannot be read."""
    bucket, old, new = FakeBucket(), key(), key()
    Tokens(bucket, [old], ttl=60_000).keep("o-1", "c-1", TOKEN)
    both = Tokens(bucket, [new, old], ttl=60_000)
    both.keep("o-2", "c-1", TOKEN)
    named = reference("c-1", TOKEN)
    assert both.find("o-1", named) == both.find("o-2", named) == TOKEN
    assert Tokens(bucket, [new], ttl=60_000).find("o-2", named) == TOKEN
    with pytest.raises(TokenUnreadable, match="TOKEN_KEY") as refusal:
        Tokens(bucket, [new], ttl=60_000).find("o-1", named)
    assert TOKEN not in str(refusal.value)


def test_an_entry_opens_nothing_elsewhere() -> None:
    """An entry that is copied under another order's id, or named by another reference, is none."""
    bucket = FakeBucket()
    tokens = Tokens(bucket, [key()], ttl=60_000)
    tokens.keep("o-1", "c-1", TOKEN)
    bucket.create("o-2", bucket.entries["o-1"].value)
    assert tokens.find("o-2", reference("c-1", TOKEN)) is None
    assert tokens.find("o-1", reference("c-2", TOKEN)) is None
    tokens.drop("o-1")
    tokens.drop("o-1")
    assert tokens.find("o-1", reference("c-1", TOKEN)) is None


def test_a_token_that_looks_like_a_reference_is_a_token() -> None:
    """What a client sends is always kept under a reference of its own."""
    named = reference("c-1", TOKEN)
    assert is_reference(named)
    assert reference("c-1", named) != named
    assert not is_reference(TOKEN)
    assert reference("c-1", "") == ""


@pytest.mark.parametrize("value", ["", "secret"])
def test_a_worker_does_not_start_without_a_key(tmp_path: Path, value: str) -> None:
    """It ends, and one line says what to set, without the value."""
    done = subprocess.run(
        [sys.executable, "-c", "from tasks.settings import worker_settings; worker_settings()"],
        cwd=REPOSITORY,
        env={"TOKEN_KEY": value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "TOKEN_KEY" in line
    assert "python -m tasks.token_key" in line
    assert "secret" not in line.replace("secrets", "")
