"""Proto package ``octavo.v1``: the engine's own service."""
