"""The pipeline's stages, each run as `python -m stages.NAME`."""

import signal
import sys

# While its imports are read a stage has nothing to tidy up: it ends at once, without a traceback.
# `gptj8.runtime.process.run` takes over. (Python's argv begins with -m until the module is found.)
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
