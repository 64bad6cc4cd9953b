"""AnarchoBot: make a language model of your own. The rooms and the floors they stand on: docs/architecture.md."""

__version__ = "0.5.0"
