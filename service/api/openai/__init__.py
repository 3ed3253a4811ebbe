"""OpenAI's API. It has no calls yet: requests under ``/v1`` are refused, with errors that its clients can read."""
