"""Published datasets: their files are downloaded into the user's cache folder, and compared with a pinned sha256."""

import functools
import importlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distdl.errors import UserError, quoted

#: The start of every URL of a download, redirects included.
DOWNLOADS_FROM = "https://"
MOST_REDIRECTS = 5
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 2**16


@dataclass(frozen=True)
class Published:
    """A dataset in files, as first published, and its mirrors."""

    name: str
    title: str
    mirrors: tuple[str, ...]
    files: dict[str, tuple[int, str]]
    """Bytes and sha256 of each file, in the order in which they are read."""
    class_names: tuple[str, ...] | None = None
    """None: the classes are the digits."""

    @property
    def what(self) -> str:
        """The files, in words."""
        return f"the file {next(iter(self.files))}" if len(self.files) == 1 else f"the four {self.title} files"


def download_all(published: Published) -> list[Path]:
    """Return the paths of the files in the user's cache folder; download the missing ones."""
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise UserError(
            f"downloading {published.title} needs pooch, which is not installed: pip install 'distdl-mpi[data]', "
            f"or give the folder with {published.what} by --data-dir"
        ) from error
    return [_download(pooch, published, name) for name in published.files]


def _download(pooch: Any, published: Published, name: str) -> Path:
    """Return the path of one file, from the cache or from the first mirror that has it intact."""
    cache = pooch.os_cache("distdl") / published.name
    size, sha256 = published.files[name]
    fetch = functools.partial(_fetch, size)
    failures = []
    for mirror in published.mirrors:
        try:
            return Path(pooch.retrieve(mirror + name, f"sha256:{sha256}", fname=name, path=cache, downloader=fetch))
        except (OSError, ValueError) as error:  # the internet access or the disk; another sha256
            failures.append(f"{mirror}: {textwrap.shorten(str(error), 160)}")
    raise UserError(
        f"{name} could not be downloaded to {quoted(cache)} ({'; '.join(failures)}): expected internet access and "
        f"free space there; or fetch {published.what} elsewhere and give their folder by --data-dir"
    )


def _fetch(size: int, url: str, output: str, _pooch: Any) -> None:
    """Download exactly `size` bytes from `url` to the file `output`, over HTTPS only, redirects included.

    pooch calls it, and compares the sha256. Raises `OSError` or `ValueError` if the download fails or is too long.
    """
    requests = importlib.import_module("requests")  # pooch needs it too
    with requests.Session() as session:
        for _ in range(MOST_REDIRECTS):
            if not url.startswith(DOWNLOADS_FROM):
                raise ValueError(f"it redirects to {url}, which does not start with {DOWNLOADS_FROM}")
            response = session.get(url, stream=True, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            if not response.is_redirect:
                break
            url = response.next.url
        else:
            raise ValueError(f"it redirects more than {MOST_REDIRECTS} times")
        response.raise_for_status()
        missing = size
        with Path(output).open("wb") as file:
            for block in response.iter_content(BLOCK_BYTES):
                missing -= len(block)
                if missing < 0:
                    raise ValueError(f"it is longer than the {size} bytes expected")
                file.write(block)
        if missing:
            raise ValueError(f"it ends {missing} of {size} bytes early")
