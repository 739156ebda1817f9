"""The smoke chain of a working copy, run once for the files that test it, whichever worker is first
to need it.
"""

import os
from pathlib import Path

from filelock import FileLock
from workspace import Workspace, copied

SMOKE = ("reproduce", "--profile", "smoke")
FIRST, AGAIN = "printed-first.txt", "printed-again.txt"


def find_run(tmp_path_factory):
    """The folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def make(tmp_path_factory) -> Workspace:
    """The copy after its chain and a second one, with what both printed; a failed run is no
    result: the next file that needs it starts anew and fails alike. Were data/embedded not what its
    code makes, the chain would refuse to run and say so.
    """
    run = find_run(tmp_path_factory)
    with FileLock(run / "smoke.lock"):
        place = run / "smoke-is-in"
        if not place.exists():
            copy = copied(tmp_path_factory.mktemp("smoke"))
            copy.commit()
            for name in (FIRST, AGAIN):
                (copy.root.parent / name).write_text(copy.run(*SMOKE))
            place.write_text(str(copy.root))
        copy = Workspace(Path(place.read_text()))
    copy.printed, copy.again = ((copy.root.parent / name).read_text() for name in (FIRST, AGAIN))
    return copy
