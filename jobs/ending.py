"""How a job that writes a run ends: what went wrong as one sentence and an exit status, SIGTERM as Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

STATUS = """
exit status
  0    done, and something is kept (some sources may have failed: the last lines say how many and why)
  1    done, and nothing is kept: every source failed, or every clip was dropped
  2    the command, the recipe or a SOURCE is wrong: said before any work where that can be; what is done is kept
  3    with --strict: done and something is kept, but a source failed or a captioner failed on a clip
  4    the output cannot be written or read; what is done is kept
  5    the run was ended because its workers or the cluster failed; what is done is kept
  130  stopped by Ctrl-C, 143 by SIGTERM; what is done is kept
"""
STDERR = os.dup(2) if sys.stderr else 2
PATIENCE_S = 25.0  # to stop in order after SIGTERM; clusters send SIGKILL after 30 s


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as for Ctrl-C."""


class Ending:
    """The end of one job.

    Args:
        job: as typed: 'clipmill curate'.
    """

    def __init__(self, job: str):
        self.job = job

    def of(self, main: Callable[[], int]) -> int:
        """What `main` returns; SIGTERM ends the process with 143 at any moment of it, and one sentence."""
        if threading.current_thread() is not threading.main_thread():
            return main()
        before = signal.signal(signal.SIGTERM, self.stopped)  # nothing is done yet
        try:
            return main()
        except Terminated:
            self.stopped()
        finally:
            signal.signal(signal.SIGTERM, before)

    def of_work(self, work: Callable[[], int]) -> int:
        """What the job's work returns, or the status of what it raises; SIGTERM stops it in order.

        After imports: Ray and others must not be loaded for a mistyped option.
        """
        from pipeline.faults import StoreError, WorkerFault
        from pipeline.recipe import RecipeError
        from pipeline.run.job import RunEnded
        from pipeline.run.outcome import Exit
        from pipeline.run.worker import RunError
        from pipeline.sources.names import SourceError

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.terminate)
        try:
            return work()
        except (RecipeError, SourceError) as e:
            return self.sorry(e, Exit.BAD_INPUT)
        except StoreError as e:
            return self.sorry(e, Exit.OUTPUT)
        except (RunEnded, WorkerFault) as e:
            return self.sorry(e, Exit.ENDED)
        except RunError as e:
            return self.sorry(e, Exit.BAD_INPUT)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return self.sorry("stopped; run the same command again to go on", Exit.INTERRUPTED)

    def sorry(self, e: object, status: int) -> int:
        """Say what is wrong."""
        print(f"{self.job}: {e}", file=sys.stderr)
        return status

    def terminate(self, signum: int, frame: object) -> None:
        """Stop as for Ctrl-C; a second signal ends the process at once, and so does stopping that takes too long."""
        signal.signal(signal.SIGTERM, self.stopped)
        _thread.start_new_thread(self._stopped_later, ())  # `threading` takes locks that the code may hold
        raise Terminated("SIGTERM")

    def _stopped_later(self) -> None:
        time.sleep(PATIENCE_S)
        self.stopped()

    def stopped(self, *_: object) -> NoReturn:
        """End the process by SIGTERM's status: Ray's C++ side, taken down in order, now and then aborts."""
        # not by sys.stderr, which a signal may interrupt in the middle of a write, and fd 2 may be turned away
        said = f"{self.job}: stopped by SIGTERM; run the same command again to go on\n"
        with contextlib.suppress(OSError):
            os.write(STDERR, said.encode())
        os._exit(143)
