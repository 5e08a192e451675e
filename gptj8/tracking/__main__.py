"""Start the recorder: `python -m gptj8.tracking JOURNAL FOLDER`."""

from gptj8.tracking.recorder import main

main()
