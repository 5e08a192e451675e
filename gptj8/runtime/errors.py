"""Exceptions whose message is shown to the user."""


class UserError(Exception):
    """An error that the user can fix: invalid input, a wrong param, a missing file, a full disk.

    The message is one line per problem, with the name, the value and how to fix it. Stages and the
    command line print it without a traceback and exit with code 2 (`gptj8.runtime.process.run`).
    """


class QuantizationError(UserError, ValueError):
    """A tensor, block size or codebook that cannot be quantized or dequantized."""
