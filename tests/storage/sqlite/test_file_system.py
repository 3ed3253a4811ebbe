"""Network file systems are recognised, because locks on them cannot be relied on."""

from pathlib import Path

import pytest

from service.storage.sqlite.file_system import network_file_system

MOUNTS = r"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
45 22 0:40 / /srv/shared rw shared:20 - nfs4 files:/export rw
46 45 0:41 / /srv/shared/local rw - tmpfs tmpfs rw
47 22 0:42 / /srv/with\040space rw - cifs //files/x rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/lastcall.db", None),
        ("/srv/shared/lastcall.db", "nfs4"),
        ("/srv/shared-not/lastcall.db", None),
        ("/srv/shared/local/lastcall.db", None),
        ("/srv/with space/lastcall.db", "cifs"),
    ],
)
def test_a_network_file_system_is_recognised(path: str, kind: str | None, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert network_file_system(Path(path), mounts) == kind


def test_without_a_list_of_mounts_the_kind_of_a_file_system_is_unknown(tmp_path: Path) -> None:
    assert network_file_system(tmp_path, tmp_path / "nowhere") is None
