"""Taking the addresses, with what hypercorn's own command line or configuration may have said."""

import pytest
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.serve import take_addresses


def test_address_that_can_be_none_is_refused_by_its_name() -> None:
    with pytest.raises(StartupError, match=r"^Cannot listen on fd://x: "):
        take_addresses(Config.from_mapping(bind=["fd://x"]))


def test_certificate_that_can_be_none_is_refused_by_its_name() -> None:
    with pytest.raises(StartupError, match=r"^The certificate a\0 and its key b cannot be used: "):
        take_addresses(Config.from_mapping(bind=["127.0.0.1:0"], certfile="a\0", keyfile="b"))
