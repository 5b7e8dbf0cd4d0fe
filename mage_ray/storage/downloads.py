"""Models and data that others have put at a URL: a node fetches each once, for all its processes."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path, PurePosixPath

from mage_ray.errors import UserError
from mage_ray.files import cache_folder, locked
from mage_ray.storage.store import Store, is_url


def local_path(place: Path | str) -> Path:
    """A file or folder as a path of this node: itself, or a copy of what is at a URL now.

    What has changed there, by names, sizes and the storage's own marks, is fetched anew. Raises UserError where there
    is nothing, or the storage fails for too long.
    """
    if not is_url(place):
        return Path(place).expanduser()
    store = Store(str(place))
    name = PurePosixPath(store.url.rpartition("/")[2])
    marks = store.marks()
    if not marks:
        raise UserError(f"{place}: nothing is there, allowed: a file or folder in a storage that can be reached")
    digest = hashlib.sha256(repr((store.url, sorted(marks.items()))).encode()).hexdigest()[:16]
    here = cache_folder() / "fetched" / digest / name
    with locked(here.parent.parent / f"{digest}.lock"):
        if not here.exists():
            partial = here.parent.with_name(f".{digest}.{uuid.uuid4().hex}.partial")
            try:
                for file in marks:
                    to = partial / name / file
                    to.parent.mkdir(parents=True, exist_ok=True)
                    store.get(file, to)
                partial.rename(here.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return here
