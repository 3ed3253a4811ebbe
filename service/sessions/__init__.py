"""Sessions and their turns: the lifetimes this service is about. Written on Trio."""
