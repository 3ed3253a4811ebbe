"""The user of programs that refuse to run as root."""

import os
import pwd
from pathlib import Path


def user_without_rights(folder: Path) -> int | None:
    """Give the folder of such a program to its user, and return that; None if this process is not root itself."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return nobody.pw_uid
