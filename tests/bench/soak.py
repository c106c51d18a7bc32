"""Mixed load on a store for an hour, with faults: prints what was done and what came of each.

    python tests/bench/soak.py [--minutes N] [--user] [--seed N]

Rounds of some ten seconds. In each, two mounts of one store, the API and commands make, change, read, rename
and remove containers and images, some commands are killed, and at the end one mount is killed (kill -9),
stopped (SIGTERM, SIGINT) or unmounted, and mounted again. What was acknowledged is noted outside, and looked
for afterwards; `fusestore check` must be silent, and nothing over. The other mount lives all the time. The
first round that goes wrong is the last: the store stays as it is, and the exit code is 1.

Needs root, and of Debian what the tests need. --user: all is done by the plain user of the tests.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rig.images import make_images
from rig.mounts import make_area, sweep
from rig.namespace import leave_the_mounts_of_others
from rig.people import plain_user, root
from rig.soak import FAULTS, Soak

_ROUND_S = (4, 15)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="default: 60")
    parser.add_argument("--user", action="store_true", help="as the plain user of the tests")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), metavar="N")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("only root can make the images and drop the kernel's caches")
    leave_the_mounts_of_others()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what is mounted is unmounted first
    parent = os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp")
    sweep(parent)
    area = make_area(parent)
    print(f"seed {arguments.seed}, in {area}", flush=True)
    person = plain_user() if arguments.user else root()
    chance = random.Random(arguments.seed)
    images = make_images()
    end_s = time.monotonic() + arguments.minutes * 60
    soak = Soak(person, area / "soak", images.busybox, images.debian, arguments.seed)
    is_good = True
    try:
        soak.begin()
        while is_good and time.monotonic() < end_s:
            fault = chance.choices(FAULTS, (4, 1, 1, 1))[0]
            is_good = soak.round(fault, chance.uniform(*_ROUND_S))
            row = soak.rows[fault]
            print(f"{time.strftime('%T')} {fault}: {'good' if is_good else 'BAD'}, {row.tries}", flush=True)
        is_good = is_good and soak.finish()
    finally:
        print(f"\n{soak.table()}\n", flush=True)
        soak.close()
    for said in soak.problems():
        print(said)
    if is_good:
        shutil.rmtree(area)
    else:
        print(f"\nThe store is left in {area}.")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
