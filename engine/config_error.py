"""What every part of the configuration raises. It stands below them all, so that each can be a
file of its own."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that can't be used: says which key, what was given, and what is possible."""
