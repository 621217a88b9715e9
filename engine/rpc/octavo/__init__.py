"""Proto package ``octavo``."""
