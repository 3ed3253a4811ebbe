"""Certificates of replicas, made for a test."""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import trustme

from service.cluster.peer_certificates import PeerCertificates


@cache
def authority(name: str = "ours") -> trustme.CA:
    """The authority of this name, whose key is made once."""
    return trustme.CA(organization_name=name)


def peer_files(
    folder: Path,
    *,
    signed_by: str = "ours",
    trusts: Sequence[str] = ("ours",),
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> dict[str, str]:
    """Write the three files of a replica into a folder, and return the settings that name them."""
    folder.mkdir(exist_ok=True)
    made = authority(signed_by).issue_cert("replica", not_before=not_before, not_after=not_after)
    paths = {name: folder / f"{name}.pem" for name in ("peer_certfile", "peer_keyfile", "peer_cafile")}
    paths["peer_keyfile"].write_bytes(made.private_key_pem.bytes())
    paths["peer_certfile"].write_bytes(b"".join(it.bytes() for it in made.cert_chain_pems))
    paths["peer_cafile"].write_bytes(b"".join(authority(it).cert_pem.bytes() for it in trusts))
    return {name: str(path) for name, path in paths.items()}


def peer_certificates(folder: Path, *, signed_by: str = "ours", trusts: Sequence[str] = ("ours",)) -> PeerCertificates:
    """The certificates of a replica."""
    files = peer_files(folder, signed_by=signed_by, trusts=trusts)
    return PeerCertificates(files["peer_certfile"], files["peer_keyfile"], files["peer_cafile"])
