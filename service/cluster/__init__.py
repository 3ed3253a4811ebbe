"""The other processes of this service: connections to them, requests, and the proof that they belong to the service."""
