"""The exceptions whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can mend: bad input, a wrong param, a missing file, no room on the disk.

    The message is one line that names the thing, the value and the way out. Stages and the command
    line print it without a traceback and exit with code 2 (`gptj8.runtime.process.run`).
    """


class QuantizationError(UserError, ValueError):
    """A tensor, block size or codebook that cannot be quantized or restored, named."""
