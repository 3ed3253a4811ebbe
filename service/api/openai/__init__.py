"""OpenAI's API. There are no calls yet: what is under ``/v1`` is refused, in the shape that its clients read."""
