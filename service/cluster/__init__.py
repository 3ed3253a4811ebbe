"""The other processes of this service: how they are reached, asked, and known to be of this service."""
