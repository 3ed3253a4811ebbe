"""A package, so that pytest's fixtures of the scope ``package`` end with the last of these tests."""
