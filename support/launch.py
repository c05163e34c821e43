"""torchrun without its own traceback after a failed rank's sentence or a signal; exits with that code."""

import logging
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: no traceback. torchrun listens later
    logging.raiseExceptions = False  # nor for a second signal, within torchrun's line about the first

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: it stays ignored, here and in the ranks
        sys.argv[1:1] = ["--signals_to_handle", "SIGTERM,SIGINT,SIGQUIT"]
    os.environ["LAUNCHER"] = str(os.getpid())  # so that a rank knows whose child it is
    try:
        main()
    except ChildFailedError as error:
        sys.exit(abs(error.get_first_failure()[1].exitcode))
    except SignalException as error:
        sys.exit(128 + error.sigval)
