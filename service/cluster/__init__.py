"""Other processes of this service, as sessions see them."""
