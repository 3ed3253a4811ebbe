"""Sessions and their turns, written on Trio. :mod:`service.sessions.sessions` says which module does which part."""
