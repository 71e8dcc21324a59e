"""Recognize files among photos that are not photos: those of operating systems, programs, cloud drives and cameras."""

import stat
from pathlib import Path, PurePath

SYSTEM_FOLDERS = {  # by name in lowercase
    name: what
    for what, names in {
        "thumbnails": ("@eadir", ".@__thumb", ".thumbnails", "thumbnails"),
        "deleted files": ("$recycle.bin", "#recycle", "@recycle", ".trash", ".trashes", ".trash-1000", ".recycle"),
        "macOS metadata": ("__macosx", ".appledouble", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
        "a system folder": ("system volume information", "lost+found", "network trash folder", "temporary items"),
        "earlier versions of files": ("#snapshot", "@snapshot", "@recently-snapshot", ".snapshot", ".stversions"),
        "a cache": (".dropbox.cache", ".tmp.drivedownload", ".tmp.driveupload", ".ipynb_checkpoints", "__pycache__"),
        "copies made by Picasa": (".picasaoriginals",),
    }.items()
    for name in names
}
SYSTEM_FOLDER_SUFFIXES = (".lrdata", ".photoslibrary", ".cocatalog")  # catalogs with previews of photos
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r"}
METADATA = (".json", ".xml", ".csv", ".aae", ".xmp", ".pp3", ".dop", ".thm")  # .thm: a camera's thumbnail of a video
PLACEHOLDERS = (".icloud", ".cloud", ".cloudf", ".nextcloud", ".owncloud")  # iCloud, odrive, Nextcloud, ownCloud
NOT_DOWNLOADED = "not yet downloaded from its cloud drive; make it available offline, or copy the photo itself"
STAND_INS = {  # files in place of photos, by suffix
    suffix: reason
    for reason, suffixes in {
        NOT_DOWNLOADED: PLACEHOLDERS,
        "an unfinished download; download it again": (".crdownload", ".part", ".partial", ".download", ".opdownload"),
        "a shortcut; copy the photo itself": (".lnk", ".url", ".webloc"),
        "a video; export frames as photos": (
            *(".mov", ".mp4", ".mp", ".m4v", ".avi", ".mkv", ".mts", ".3gp", ".webm", ".lrv"),
        ),
        "a camera's raw file; export it as JPEG": (
            *(".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".pef"),
            *(".srw", ".x3f", ".3fr", ".iiq", ".erf", ".kdc", ".mrw"),  # Pillow would read the preview of most of them
        ),
    }.items()
    for suffix in suffixes
}
ONLINE_ONLY = (  # of a file in OneDrive or another cloud drive on Windows
    stat.FILE_ATTRIBUTE_OFFLINE | 0x00040000 | 0x00400000  # RECALL_ON_OPEN, RECALL_ON_DATA_ACCESS
)
DATALESS = 0x40000000  # SF_DATALESS: a file in iCloud Drive or another cloud drive on macOS


def is_hidden(path: PurePath) -> bool:
    """Return whether a file or folder is hidden, and neither a system folder nor an iCloud placeholder."""
    name = path.name.lower()
    return name.startswith(".") and name not in SYSTEM_FOLDERS and not name.endswith(PLACEHOLDERS)


def explain_clutter(name: str, is_folder: bool) -> str:
    """Return why the name of a file or folder excludes it from the photos; "" if it may be one."""
    lower = name.lower()
    if is_folder:
        catalog = "a catalog of another program" if lower.endswith(SYSTEM_FOLDER_SUFFIXES) else ""
        return SYSTEM_FOLDERS.get(lower, catalog)
    if lower in SYSTEM_FILES:
        return "a system file"
    return "metadata" if lower.endswith(METADATA) else ""


def explain_stand_in(path: Path) -> str:
    """Return why a file only stands in for a photo, and the remedy; "" if it may be a photo.

    The content is read only if a local file takes no space on the disk: reading an online-only file would download it.
    Raises OSError if the file is missing or unreadable.
    """
    if reason := STAND_INS.get(path.suffix.lower()):
        return reason
    status = path.stat()
    attributes, flags = getattr(status, "st_file_attributes", 0), getattr(status, "st_flags", 0)
    if attributes & ONLINE_ONLY or flags & DATALESS:
        return NOT_DOWNLOADED
    if not stat.S_ISREG(status.st_mode):
        return ""
    if status.st_size and getattr(status, "st_blocks", 1):
        return ""
    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        return f"not an image: the file is empty, or {NOT_DOWNLOADED}"
    return "" if any(start) else f"not an image: the file contains only zeros, or is {NOT_DOWNLOADED}"
