"""The process that mounts: whoever asks it is answered."""

import errno
from concurrent.futures import ThreadPoolExecutor

from fusestore.mounter import Mounter


def test_what_it_did_not_expect_is_answered_with_eio() -> None:
    mounter = Mounter()
    with ThreadPoolExecutor() as waiting:
        answer = waiting.submit(mounter.walk_to, "/no\0path")
        try:
            error = answer.exception(timeout=20)
        finally:
            mounter.close()  # ends the wait too
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO and "null character" in str(error)
