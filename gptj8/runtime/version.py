"""The version of gptj8, for what is written down; pyproject.toml reads it from here."""

__version__ = "0.1.0"
