"""Generated stubs, checked in; `make proto` writes them from ``proto/``."""
