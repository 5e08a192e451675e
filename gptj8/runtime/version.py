"""The version of gptj8, which is written to outputs. pyproject.toml reads it from here."""

__version__ = "0.1.0"
