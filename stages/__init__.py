"""The pipeline's stages, each run as `python -m stages.NAME`."""

import signal
import sys

# During its imports a stage has nothing to clean up, so an interrupt stops it without a traceback.
# `gptj8.runtime.process.run` restores the handler. (sys.argv[0] is -m until Python has found the
# module.)
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
