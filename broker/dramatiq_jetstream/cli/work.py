"""`fleet abort`, `schedules` and `progress`: single messages and periodic tasks."""

from __future__ import annotations

import click

COMMANDS: list[click.Command] = []
