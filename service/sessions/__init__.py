"""Sessions and their turns: the lifetimes this service is about. Written on Trio.

What is where is said in :mod:`service.sessions.sessions`.
"""
