"""The other tools, trained and timed in environments of their own; a package, so that tests/peers is another."""
