"""torchrun, without its own traceback after the sentence of a rank that failed; exits with that rank's code."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        sys.exit(abs(error.get_first_failure()[1].exitcode))
