"""What the checks of clients say when something is wrong."""


class FailedError(Exception):
    """The result of a check is wrong."""


def check(holds: bool, otherwise: object) -> None:
    if not holds:
        raise FailedError(str(otherwise))
