"""HTTP/1.1 to a model server: the transport beneath the client's httpx. Decision 0014 says why it is ours."""
