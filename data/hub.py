"""Lists and fetches files of a dataset repository on the Hugging Face hub, and checks their hashes.

huggingface_hub does the transfers: it talks to HF_ENDPOINT with the user's token and resumes after a broken connection.
This module decides where files go, and checks them. A file is downloaded to `.part` beside its final name, survives a
kill in that form, and gets its name only when its bytes have the hash that the hub publishes. There is no cache with a
second copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from errors import PrepareError, library

WORKERS = 4  # transfers at a time
ATTEMPTS = 3  # at one file whose bytes turn out wrong, before giving up
RETRIES = 5  # after a reset connection or a server's error that brought nothing, 62 seconds in all
HF_SOURCE = re.compile(r"hf:(?P<repo>[^/:@]+/[^/:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
CONVERTED = "refs/convert/parquet"  # the branch where the hub keeps each dataset as CONFIG/SPLIT/0000.parquet
TEXT_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository with what the hub publishes about it."""

    path: str
    size: int
    git_sha1: str  # of small files; of a large file's pointer otherwise
    sha256: str | None = None  # of large files

    @property
    def digest(self) -> str:
        """The hash that the file's bytes must have: SHA-256 of a large file, git's own SHA-1 of a small one."""
        return self.sha256 or self.git_sha1

    def digest_of(self, path: Path) -> str:
        """The same hash of a local file."""
        with open(path, "rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
            return digest.hexdigest()

    def part(self, path: Path) -> Path:
        """Where what has arrived of it is kept, on the way to `path`."""
        return path.with_name(f"{path.name}.{self.digest[:12]}.part")

    def missing(self, path: Path) -> int:
        """Bytes that are yet to come, by the sizes of what is there."""
        there = [place.stat().st_size for place in (path, self.part(path)) if place.is_file()]
        return max(0, self.size - max(there, default=0))

    def intact(self, path: Path) -> bool:
        """Whether the local file is this one, to the last bit."""
        return path.is_file() and path.stat().st_size == self.size and self.digest_of(path) == self.digest


class NoSuchRevision(PrepareError):
    """The repository is there, the branch, tag or commit is not."""


class _Stopped(Exception):
    """Ends a transfer because another one failed or the user interrupted."""


class _Meter:
    """An open file that tells how much is written to it, and stops the writer where `progress` raises."""

    def __init__(self, file: io.BufferedIOBase, progress: Callable[[int], None]):
        self.file, self.progress = file, progress
        self.seek = file.seek
        self.tell = file.tell
        self.truncate = file.truncate

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        self.progress(len(data))
        return self.file.write(data)


class Repository:
    """A dataset repository at one commit: that of the revision when this object was made.

    Everything raises PrepareError, in one line, for what the network, the hub or the repository's name refuses.
    """

    def __init__(self, repo: str, revision: str | None = None):
        self.hub = library("huggingface_hub")
        for name in ("constants", "errors", "hf_api", "utils"):  # The package loads nothing by itself.
            library(f"huggingface_hub.{name}")
        self.repo, self.api = repo, self.hub.HfApi()
        with self._plain_errors(f"--revision {revision}" if revision else "the main branch"):
            timeout = self.hub.constants.HF_HUB_ETAG_TIMEOUT
            self.commit = self.api.dataset_info(repo, revision=revision, timeout=timeout).sha

    def files(self, folder: str = "") -> dict[str, RemoteFile]:
        """All files below a folder, by their path in the repository; empty if there is no such folder."""
        listed = {}
        with self._plain_errors(folder), contextlib.suppress(self.hub.errors.EntryNotFoundError):
            for item in self.api.list_repo_tree(
                self.repo, folder or None, recursive=True, revision=self.commit, repo_type="dataset"
            ):
                if isinstance(item, self.hub.hf_api.RepoFile):
                    _check_listed(self.repo, item.path, item.size)
                    sha256 = item.lfs.sha256 if item.lfs else None
                    listed[item.path] = RemoteFile(item.path, item.size, item.blob_id, sha256)
        return listed

    def fetch(self, wanted: Mapping[Path, RemoteFile], progress: Callable[[int], None]) -> None:
        """Fetch files to local paths. Intact files stay as they are, and partial ones are completed.

        progress: called with the number of bytes that are new, or already there; negative for bytes thrown away.
        """
        stop, lock = threading.Event(), threading.Lock()

        def advance(count: int) -> None:
            if stop.is_set():
                raise _Stopped
            with lock:
                progress(count)

        with ThreadPoolExecutor(WORKERS) as pool:
            jobs = [pool.submit(self._fetch, file, path, advance) for path, file in wanted.items()]
            try:
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            except BaseException:
                stop.set()
                for job in jobs:
                    job.cancel()
                raise

    def _fetch(self, file: RemoteFile, path: Path, progress: Callable[[int], None]) -> None:
        if file.intact(path):
            progress(file.size)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = file.part(path)
        for _ in range(ATTEMPTS):
            with self._plain_errors(file.path):
                self._transfer(file, part, progress)
            found = file.digest_of(part)
            if found == file.digest:
                os.replace(part, path)
                return
            progress(-part.stat().st_size)
            part.unlink()
        raise PrepareError(
            f"{self.repo}: {file.path} comes with the hash {found} and not with the published "
            f"{file.digest}, {ATTEMPTS} times; it was removed, what is complete is kept"
        )

    def _transfer(self, file: RemoteFile, part: Path, progress: Callable[[int], None]) -> None:
        """Append to `part` what it lacks. Its length may be wrong in the end, which the hash then shows."""
        from httpx2 import ReadError  # The client that huggingface_hub talks through.
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils.tqdm import silent_tqdm

        url = self.hub.hf_hub_url(self.repo, file.path, repo_type="dataset", revision=self.commit)
        # A compressed answer would have other byte ranges.
        headers = {**self.hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with open(part, "ab") as raw:
            progress(raw.tell())
            fruitless = 0
            while True:
                held = raw.tell()
                try:
                    http_get(
                        url,
                        cast(BinaryIO, _Meter(raw, progress)),  # All of a file that http_get uses.
                        resume_size=held,
                        headers=headers,
                        expected_size=file.size,
                        displayed_filename=file.path,
                        tqdm_class=cast(Any, silent_tqdm),
                    )
                    break
                # A reset connection, or a server that is busy: http_get does not retry these.
                except (ReadError, self.hub.errors.HfHubHTTPError) as error:
                    fruitless = fruitless + 1 if raw.tell() == held else 0
                    refused = not isinstance(error, ReadError) and error.response.status_code < 500
                    if refused or fruitless > RETRIES:
                        raise
                    time.sleep(2**fruitless)
                except OSError as error:
                    if error.errno is not None:
                        raise
                    break  # http_get's complaint about the length.
            raw.flush()
            os.fsync(raw.fileno())

    @contextlib.contextmanager
    def _plain_errors(self, what: str) -> Iterator[None]:
        """Say in one line what the hub or the network refused about `what`."""
        from httpx2 import HTTPError, InvalidURL

        errors = self.hub.errors
        place = f"{self.repo} at {self.hub.constants.ENDPOINT}"
        try:
            yield
        except errors.OfflineModeIsEnabled:
            raise PrepareError(f"{self.repo}: HF_HUB_OFFLINE is set, which forbids the download") from None
        except errors.HFValidationError:
            raise PrepareError(f"{self.repo}: not a repository's name; it must be OWNER/NAME") from None
        except errors.RevisionNotFoundError:
            raise NoSuchRevision(f"{place}: {what}: no such revision (404)") from None
        except errors.EntryNotFoundError:
            raise PrepareError(f"{place}: there is no {what} (404)") from None
        except errors.RepositoryNotFoundError as error:
            status = error.response.status_code
            raise PrepareError(
                f"{place}: no such dataset repository, or it is private or gated and HF_TOKEN does not "
                f"open it ({status})"
            ) from None
        except errors.HfHubHTTPError as error:
            raise PrepareError(
                f"{place}: {what}: the hub answers {error.response.status_code} {error.response.reason_phrase}"
            ) from None
        except ValueError:
            raise PrepareError(f"{place}: {what}: the answer is not JSON; is HF_ENDPOINT a hub?") from None
        except (HTTPError, InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise PrepareError(
                f"{place}: {what}: no connection ({reason}); what has arrived is kept, the same command goes on"
            ) from None


def _check_listed(repo: str, path: object, size: object) -> None:
    """Refuse what a hub lists where it would lie outside of the folder for downloads. Raises PrepareError."""
    name = path if isinstance(path, str) else ""
    parts = PurePosixPath(name).parts
    inside = bool(parts) and not name.startswith("/") and ".." not in parts and name.isprintable()
    if not inside or type(size) is not int or size < 0:
        raise PrepareError(f"{repo}: the hub lists a file {path!a} of {size!a} bytes, which is no path or size")


def check_room(option: str, folder: Path, wanted: Mapping[Path, RemoteFile]) -> None:
    """Refuse a download that the folder's disk can't hold, before it begins. Raises PrepareError."""
    needed = sum(file.missing(path) for path, file in wanted.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PrepareError(
            f"{option} {folder}: {needed / 1e9:.1f} GB are to be downloaded, and {free / 1e9:.1f} GB are free there"
        )


# ------------------------------------------------------------------------------------------- text of any dataset


def text_files(source: str, revision: str | None) -> tuple[Repository, list[RemoteFile]]:
    """The files of `hf:OWNER/NAME[:CONFIG][@SPLIT]`, in order, and where they are.

    The hub's own conversion to parquet comes first, as it has the same layout for every dataset; it is passed over
    where it is cut to the dataset's beginning, or for a given revision. Then parquet files of the repository itself,
    then .jsonl. Raises PrepareError that says what there is.
    """
    named = HF_SOURCE.fullmatch(source)
    if not named:
        raise PrepareError(f"{source}: must be hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or either with @SPLIT behind it")
    repository = Repository(named["repo"], revision)
    config, split = named["config"], named["split"]
    found = []
    if revision is None:
        with contextlib.suppress(NoSuchRevision):  # Not every dataset has this branch.
            converted = Repository(named["repo"], CONVERTED)
            listed = converted.files()
            if chosen := _converted_files(listed, config, split or "train"):
                return converted, chosen
            found += sorted({str(PurePosixPath(path).parent) for path in listed if path.endswith(".parquet")})
    listed = repository.files()
    for suffixes in ((".parquet",), TEXT_SUFFIXES):
        of_kind = [file for path, file in sorted(listed.items()) if path.endswith(suffixes)]
        if chosen := _own_files(of_kind, config, split):
            return repository, chosen
        found += sorted({str(PurePosixPath(file.path).parent) for file in of_kind})
    there = ", ".join(found[:20]) + (" ..." if len(found) > 20 else "")
    raise PrepareError(
        f"{source}: no {', '.join(('.parquet', *TEXT_SUFFIXES))} file fits; "
        + (f"folders with such files: {there}" if found else "the repository has none at all")
    )


def _converted_files(listed: Mapping[str, RemoteFile], config: str | None, split: str) -> list[RemoteFile]:
    """CONFIG/SPLIT/*.parquet; without a name the only configuration, or the one called default."""
    parts = {path: PurePosixPath(path).parts for path in sorted(listed) if path.endswith(".parquet")}
    configs = {part[0] for part in parts.values()}
    config = config or ("default" if "default" in configs or len(configs) != 1 else min(configs))
    return [listed[path] for path, part in parts.items() if len(part) == 3 and part[:2] == (config, split)]


def _own_files(files: list[RemoteFile], config: str | None, split: str | None) -> list[RemoteFile]:
    """Files in the folder, or of the name, of the configuration and the split; `train` if there is one and none named.

    `sample/10BT` and `sample-10BT` both name the folder sample/10BT.
    """

    def words(file: RemoteFile) -> set[str]:
        path = PurePosixPath(file.path)
        return {*path.parts[:-1], *re.split(r"[-_.]", path.name)}

    if config:
        folder = config.replace("/", "-") + "-"
        files = [file for file in files if config in words(file) or file.path.replace("/", "-").startswith(folder)]
    wanted = [file for file in files if (split or "train") in words(file)]
    return wanted if split or wanted else files
